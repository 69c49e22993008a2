"""`ssl-jax check` on folders in which problems were planted, and its parts against known answers."""

import csv
import re

import numpy as np
import pytest
from PIL import Image
from planted import picture, plant
from toy_encoder import toy_encoder

from ssl_jax import cli, load
from ssl_jax.check import command, copies, labels
from ssl_jax.config import Data
from ssl_jax.data import open_source

ODD = {
    "unreadable": "train/a/zz-broken.png",
    "blank": "train/a/zz-blank.png",
    "tiny": "train/b/zz-tiny.png",
    "odd shape": "train/b/zz-long.png",
    "odd kind": "train/c/zz-colour.png",
}


def rows_of(folder):
    with (folder / "check.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def paths_of(rows, problem):
    return {row["path"] for row in rows if row["problem"] == problem}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(folder, planted, output folder, result) of a check with an encoder that is random but for its size."""
    root = tmp_path_factory.mktemp("images")
    planted = plant(root) | {problem: {path} for problem, path in ODD.items()}
    (root / ODD["unreadable"]).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    Image.new("L", (32, 32), 99).save(root / ODD["blank"])
    image = picture(np.random.default_rng(7), 1)
    image.resize((6, 6)).save(root / ODD["tiny"])
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((90, 32)).save(root / ODD["odd shape"])
    colours = np.random.default_rng(8).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(colours).save(root / ODD["odd kind"])
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_encoder", lambda workdir, step: toy_encoder(size=32))
        result = command.check(str(root), workdir=str(root), out=str(out))
    return root, planted, out, result


def test_what_was_planted_is_found(checked):
    root, planted, out, result = checked
    rows = rows_of(out)
    for problem in (*ODD, "duplicate", "leak"):
        assert paths_of(rows, problem) == planted[problem], problem
    found = paths_of(rows, "near duplicate")
    assert len(found & planted["near duplicate"]) >= 14 and len(found - planted["near duplicate"]) <= 1
    doubtful = paths_of(rows, "label")
    assert len(doubtful & planted["label"]) >= 4 and len(doubtful - planted["label"]) <= 3
    assert result["problems"]["patient in both"] == 0 and result["images"] == 269


def test_rows_name_the_other_image_and_why(checked):
    root, planted, out, _ = checked
    rows = {(row["problem"], row["path"]): row for row in rows_of(out)}
    copy = rows["duplicate", min(planted["duplicate"])]
    assert copy["other path"] == copy["path"].replace("/z", "/").replace("-same", "") and copy["score"] == "1"
    leak = rows["leak", min(planted["leak"])]
    assert leak["other path"].startswith("test/") and leak["file"] == str(root / leak["path"])
    assert "not an image" in rows["unreadable", ODD["unreadable"]]["note"]
    assert rows["tiny", ODD["tiny"]]["note"] == "6 x 6 px; the median of the shorter sides is 32 px"
    assert "colour" in rows["odd kind", ODD["odd kind"]]["note"]
    assert re.match(r"labelled a, looks like c \(\d+%\)", rows["label", min(planted["label"])]["note"])


def test_page_needs_nothing_else(checked):
    page = (checked[2] / "check.html").read_text()
    assert not re.findall(r"<script|<link|@import|(?:src|href)=\"(?!data:|#)|url\((?!#)", page)
    assert page.count("<h2>") == 9 and "Created by ssl-jax check" in page and "train/c/zz-colour.png" in page


def test_listed_images_are_left_out_elsewhere(checked, tmp_path, capsys):
    root, planted, out, _ = checked
    listed = {row["path"] for row in rows_of(out)}
    whole = Data(name="folder", path=str(root), size=32, channels=1, max_bad_share=1)
    rest = Data(name="folder", path=str(root), size=32, channels=1, exclude=str(out / "check.csv"))
    assert set(open_source(rest).names) == set(open_source(whole).names) - listed
    assert open_source(rest).skipped == []  # without them, nothing is unreadable
    assert len(open_source(rest, "test")) == len(open_source(whole, "test"))
    again = command.check(str(root), out=str(tmp_path), overrides=[f"--config.data.exclude={out}/check.csv"])
    assert sum(again["problems"].values()) == again["problems"]["near duplicate"] <= 1
    (tmp_path / "own.csv").write_text(f"path\ntrain/a/0000.png\n{root}/train/b/0001.png\n")
    exclude = ["--exclude", str(tmp_path / "own.csv")]
    assert cli._overrides(exclude) == ([f"--config.data.exclude={tmp_path}/own.csv"], [])
    values, overrides = cli.parse("pretrain", ["simclr", str(root), "--workdir=W", *exclude])
    assert cli._config_of("pretrain", values, overrides).data.exclude == exclude[1]
    kept = open_source(Data(name="folder", path=str(root), max_bad_share=1, exclude=exclude[1]))
    assert len(kept) == len(open_source(whole)) - 2


def test_images_of_arrays_are_told_apart_by_part(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    images[7] = images[3]
    np.savez(tmp_path / "a.npz", train_images=images, test_images=np.concatenate([images[5:6], images[:4] // 2 + 90]))
    command.check(str(tmp_path / "a.npz"), out=str(tmp_path))
    rows = rows_of(tmp_path)
    assert [(row["problem"], row["path"], row["other path"]) for row in rows if row["score"] == "1"] == [
        ("duplicate", "7", "3"),
        ("leak", "5", "0"),
    ]
    rest = Data(name="npz", path=str(tmp_path / "a.npz"), exclude=str(tmp_path / "check.csv"))
    assert {"7", "5"} & set(open_source(rest).names) == set() and len(open_source(rest, "test")) >= 4


def test_patients_in_both_sets(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcdef":
        picture(rng, 0).save(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("path,patient\na.png,P1\nb.png,P2\nc.png,P2\n")
    (tmp_path / "test.csv").write_text("path,patient\nd.png,P3\ne.png,P2\nf.png,P4\n")
    argv = ["check", f"{tmp_path}/train.csv", f"--test={tmp_path}/test.csv", f"--out={tmp_path}/out"]
    assert cli.main([*argv, "--config.data.group=patient"]) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["path"], row["problem"], row["other path"]) for row in rows] == [
        ("b.png", "patient in both", "e.png"),
        ("c.png", "patient in both", "e.png"),
    ]


def test_even_points_are_no_copies_in_any_dimension():
    """The bound on chance holds for points that lie evenly, and planted copies are far below it."""
    rng = np.random.default_rng(0)
    for dimension in (2, 5, 12):
        points = rng.uniform(size=(700, dimension))
        points[:20] = points[20:40] + rng.normal(size=(20, dimension)) * 1e-5
        distance = np.sqrt(((points[:, None] - points) ** 2).sum(axis=2))
        np.fill_diagonal(distance, np.inf)
        nearest = copies.by_chance(np.sort(distance, axis=1)[:, :10])[:, 0]
        assert (nearest[:20] < 1e-4).all()
        assert (nearest[40:] < 1e-2).mean() < 3e-2 and (nearest[40:] < 1e-4).sum() <= 3


def test_labels_that_fit_their_probabilities_are_not_doubted():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.2] * 5, 4000)
    given = np.array([rng.choice(5, p=p) for p in probabilities])
    assert len(labels.improbable(probabilities, given)) < 10
    wrong = rng.permutation(4000)[:100]
    given[wrong] = probabilities[wrong].argmin(axis=1)
    found = labels.improbable(probabilities, given)
    assert len(set(found.tolist()) & set(wrong.tolist())) > 70 and len(found) < 200


def test_a_model_that_is_too_sure_is_calibrated():
    rng = np.random.default_rng(0)
    true = rng.dirichlet([1.0] * 3, 5000)
    given = np.array([rng.choice(3, p=p) for p in true])
    sure = true**3 / (true**3).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(labels.calibrated(sure, given), true, atol=0.02)


def test_folds_hold_out_patients_and_small_classes_are_not_judged():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    given = np.repeat(rng.integers(0, 2, 60), 4)  # nothing but the patient tells the label
    given[:4] = 2
    features = np.repeat(rng.normal(size=(60, 40)), 4, axis=0)
    told = labels.out_of_fold(features, given, groups)
    assert np.isnan(told[:4]).all() and np.isfinite(told[4:]).all()
    assert (told[4:].argmax(axis=1) == given[4:]).mean() < 0.7
    assert (labels.out_of_fold(features, given)[4:].argmax(axis=1) == given[4:]).mean() > 0.75


def test_classes_that_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    given = np.arange(300) % 3
    features = rng.normal(size=(300, 4))
    features[given == 2] += 5
    ((a, b, error),) = labels.alike(labels.out_of_fold(features, given), given)
    assert (a, b) == (0, 1) and 0.35 < error < 0.65


def test_several_labels_are_doubted_one_by_one():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3))
    given = (features[:, :2] > 0).astype(np.float32)
    clear = np.flatnonzero((np.abs(features) > 0.5).all(axis=1))[:12]
    given[clear, 1] = 1 - given[clear, 1]
    given[50:100, 0] = np.nan
    found = labels.doubts_of_several(features, given)
    assert len({d.image for d in found if d.column == 1} & set(clear.tolist())) >= 10
    assert len(found) < 24 and not {d.image for d in found if d.column == 0} & set(range(50, 100))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "."], "config.data.path='.*': no images; allowed: jpg"),
        (["check", "/no/such"], "--data=/no/such: not found; allowed: a folder"),
        (["check", ".", "--workdir=."], "\\.: no encoder.json; allowed: a folder made by"),
        (["check", ".", "--out=a.txt"], "--out=a.txt: is a file; allowed: a folder"),
        (["check", "a.npz", "--test=b.npz"], "--test=b.npz: images of \\[9, 9, 1\\]; allowed: \\[8, 8, 1\\]"),
        (["check", "a.npz", "--exclude=a.txt"], "config.data.exclude='.*a.txt': column='path': unknown; available: x"),
        (["check", "a.npz", "--exclude=no.csv"], "config.data.exclude='.*no.csv': No such file"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x\n1\n")
    for name, side in (("a", 8), ("b", 9)):
        np.savez(tmp_path / f"{name}.npz", images=np.arange(2 * side * side, dtype=np.uint8).reshape(2, side, side))
    assert cli.main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssl-jax: ")]
    assert re.match(f"ssl-jax: {message}", line), line
