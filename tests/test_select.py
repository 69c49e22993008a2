"""`ssl-jax select` on files, and the mistakes that people make with it."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from ssl_jax import cli, labelling
from ssl_jax.classifier import save_about, save_weights
from ssl_jax.config import Data, Model, default, resolve, to_json
from ssl_jax.data import open_source
from ssl_jax.data.labelled import labelled_part
from ssl_jax.encoder import export, load_encoder, random_encoder
from ssl_jax.evaluate.finetuning import Classifier
from ssl_jax.files import write_json
from ssl_jax.selection import select


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run folder whose images are 60 files of 30 people, and a classifier's folder."""
    root = tmp_path_factory.mktemp("select")
    rng, rows = np.random.default_rng(0), [["path", "person"]]
    for i in range(60):
        shade = rng.integers(0, 60, (20, 24)) + 20
        shade[(i % 3) * 6 : (i % 3) * 6 + 7] += 150
        path = root / "images" / "abc"[i % 3] / f"ü {i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade.astype(np.uint8)).save(path)
        rows.append([f"images/{path.parent.name}/{path.name}", f"{i // 2}"])
    write(root / "all.csv", rows)
    write(root / "one.csv", [rows[0], *([path, "7"] for path, _ in rows[1:])])
    encoder = random_encoder(Model(name="ssl_jax.testing.model"), 16, 1, 0)
    export(root / "run" / "encoder", encoder)
    config = resolve(default("simclr"))
    data = dataclasses.replace(config.data, name="folder", path=str(root / "images"))
    write_json(root / "run" / "config.json", to_json(dataclasses.replace(config, data=data)))
    width = encoder.embed(np.zeros((1, 16, 16, 1), np.uint8)).shape[1]
    head = {"w": np.random.default_rng(1).standard_normal((width, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
    trained = Classifier(encoder, {"encoder": encoder.params, "head": head}, encoder.stats, {})
    save_weights(root / "classifier", trained)
    save_about(root / "classifier", {**encoder.about, "chosen": {}, "classes": ["a", "b", "c"]})
    return root


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def run(*args):
    return cli.main(["select", *map(str, args)])


def table(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_and_what_is_expected_of_it(place, tmp_path, capsys):
    out = tmp_path / "to_label.csv"
    assert run(place / "run", "--labels=12", f"--out={out}", "--seed=3", "--json") == 0
    *lines, as_json = capsys.readouterr().out.splitlines()
    rows = table(out)
    assert list(rows[0]) == ["path", "label"] and {row["label"] for row in rows} == {""}
    files = sorted((place / "images").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path).convert("L").resize((16, 16), 2, (2, 0, 22, 20))) for path in files])
    features = load_encoder(place / "run").embed(images[..., None])
    assert [row["path"] for row in rows] == [str(files[i]) for i in select(features, 12, seed=3)]
    found = json.loads(as_json)
    assert (found["labels"], found["images"], found["strategy"]) == (12, 60, "typical")
    assert lines[0] == f"12 of 60 images to label (typical): {out}"
    assert re.search(r"is 0\.\d{3} from the nearest labelled one on average, 0\.\d{3} if they are drawn", lines[1])
    assert "near duplicates among them: 0 (0.0%), " in lines[2]


def test_the_filled_table_is_read_and_counts_as_labelled(place, tmp_path, capsys):
    assert run(place / "run", "--labels=12", f"--out={tmp_path / 'first.csv'}") == 0
    rows = table(tmp_path / "first.csv")
    for row in rows[:10]:  # two stay without a label
        row["label"] = row["path"].split("/")[-2]
    have = write(tmp_path / "labelled.csv", [list(rows[0]), *(row.values() for row in rows)])
    train = open_source(Data(name="csv", path=str(have), size=16))  # as finetune does
    assert len(labelled_part(train, train, "here").labels) == 10 and train.classes == ["a", "b", "c"]
    labelled = {row["path"] for row in rows[:10]}
    for strategy in ("typical", "uncertain", "margin"):
        out = tmp_path / f"{strategy}.csv"
        assert run(place / "run", "--labels=50", f"--have={have}", f"--strategy={strategy}", f"--out={out}") == 0
        assert not labelled & {row["path"] for row in table(out)}  # the other 50 of 60
    assert run(place / "run", "--labels=51", f"--have={have}", f"--out={tmp_path}/b.csv") == 2
    assert "--labels=51: there are 50 images to choose from; allowed: at most 50" in capsys.readouterr().err
    # In another folder: labelled, but not among those to choose from.
    other = place / "images" / "a"
    assert run(place / "run", f"--data={other}", "--labels=20", f"--have={have}", f"--out={tmp_path}/c.csv") == 2
    count = 20 - sum("/a/" in path for path in labelled)
    assert f"there are {count} images to choose from" in capsys.readouterr().err


def test_by_person_with_columns_of_several_labels(place, tmp_path):
    out = tmp_path / "to_label.csv"
    options = ["--config.data.group=person", "--config.data.labels=('hat','scarf')"]
    assert run(place / "run", f"--data={place / 'all.csv'}", "--labels=30", f"--out={out}", *options) == 0
    rows = table(out)
    assert list(rows[0]) == ["path", "person", "hat", "scarf"]
    assert len({row["person"] for row in rows}) == 30


def test_a_classifier_says_what_it_doubts(place, tmp_path, capsys):
    out = tmp_path / "to_label.csv"
    assert run(place / "classifier", f"--out={out}", "--labels=6", "--strategy=margin") == 2
    assert "--data: missing; " in capsys.readouterr().err
    flags = [f"--data={place / 'images'}", "--labels=6", "--strategy=margin", f"--out={out}"]
    assert run(place / "classifier", *flags) == 0
    assert cli.main(["predict", str(place / "classifier"), str(place / "images"), f"--out={tmp_path}/p.csv"]) == 0
    shares = {row["path"]: sorted(float(row[c]) for c in "abc") for row in table(tmp_path / "p.csv")}
    closest = sorted(shares, key=lambda path: shares[path][2] - shares[path][1])[:6]
    assert {row["path"] for row in table(out)} == {str(place / "images" / path) for path in closest}


def test_images_that_are_no_files_are_written_as_files(place, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 1)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    flags = [place / "run", f"--data={tmp_path / 'images.npz'}"]
    assert run(*flags, "--labels=10", f"--out={tmp_path / 'first.csv'}") == 0
    rows = table(tmp_path / "first.csv")
    for row in rows:
        number = int(row["path"].split("/")[-1].removesuffix(".png"))
        np.testing.assert_array_equal(np.asarray(Image.open(row["path"])), images[number, ..., 0])
    have = write(tmp_path / "have.csv", [list(rows[0]), *([row["path"], "x"] for row in rows)])
    assert run(*flags, "--labels=20", f"--have={have}", f"--out={tmp_path / 'second.csv'}") == 0
    first, second = ({r["path"].split("/")[-1] for r in table(tmp_path / f"{n}.csv")} for n in ("first", "second"))
    assert len(first | second) == 30


def test_the_page_gets_whole_pictures_and_the_classes(place, tmp_path, monkeypatch):
    asked, real = {}, labelling.write_page

    def write_page(path, images, names, classes, **options):
        asked.update(path=path, images=images, names=names, classes=classes, options=options)
        real(path, images, names, classes, **options)

    monkeypatch.setattr(labelling, "write_page", write_page)
    rows = [["path", "label"], [place / "images/a/ü 00.png", "c"]]
    have, out = write(tmp_path / "have.csv", rows), tmp_path / "to_label.csv"
    assert run(place / "run", "--labels=4", f"--out={out}", f"--have={have}", "--page", "--classes=b,a, c") == 0
    assert asked["names"] == [row["path"] for row in table(out)] and asked["path"] == tmp_path / "to_label.html"
    for picture, name in zip(asked["images"], asked["names"], strict=True):
        np.testing.assert_array_equal(picture[..., 0], np.asarray(Image.open(name)))  # 20 x 24, not cropped
    assert asked["classes"] == ["b", "a", "c"]
    assert asked["options"] == {"multilabel": False, "columns": ("path", "label"), "more": {}}
    assert (tmp_path / "to_label.html").stat().st_size > 5000
    flags = ["--labels=4", f"--out={tmp_path / 'new.csv'}", "--page", "--classes=nan,b"]
    assert run(place / "run", *flags) == 2 and not (tmp_path / "new.csv").exists()
    # By person, with several labels per image, as the settings name the columns.
    flags = [f"--data={place / 'all.csv'}", "--labels=3", f"--out={tmp_path / 'new.csv'}", "--page"]
    assert run(place / "run", *flags, "--config.data.group=person", "--config.data.labels=('hat','scarf')") == 0
    persons = [int(row["person"]) for row in table(tmp_path / "new.csv")]
    assert asked["classes"] == ["hat", "scarf"]
    assert asked["options"] == {"multilabel": True, "columns": ("path", "hat"), "more": {"person": persons}}


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([], ["--labels=61"], "--labels=61: there are 60 images to choose from"),
        ([], ["--labels=0"], "--labels=0: allowed: 1 or more"),
        ([], ["--strategy=typicl"], "--strategy='typicl': unknown; did you mean 'typical'"),
        ([], ["--strategy=margin"], "--strategy=margin: needs --have=labelled.csv, or the folder of a classifier"),
        ([], ["--seed=-1"], "--seed=-1: allowed: 0 or more"),
        ([("a/ü 00.png", "a"), ("a/ü 03.png", "a")], ["--strategy=margin"], "have.csv are 'a'"),
        ([("a/ü 00.png", "aa")], ["--classes=ab,aab"], "have.csv: class='aa': unknown; did you mean 'aab'"),
        ([("a/ü 00.png", "a"), ("gone.png", "b")], [], "gone.png' (line 3): No such file or directory"),
        (
            [("a/ü 00.png", "a"), ("a/../a/ü 00.png", "b")],
            [],
            "has two labels: 'a' and 'b'; allowed: one row per image",
        ),
        ([("a/ü 00.png", ""), ("a/ü 03.png", "")], [], "have.csv: has no labels"),
        (
            [],
            ["--data=one.csv", "--config.data.group=person"],
            "all 60 images are of one group (config.data.group='person')",
        ),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, monkeypatch, capsys, rows, flags, message):
    monkeypatch.chdir(place)
    if rows:
        absolute = [(f"{place}/images/{path}", label) for path, label in rows]
        flags = [*flags, f"--have={write(tmp_path / 'have.csv', [('path', 'label'), *absolute])}"]
    assert run(place / "run", f"--out={tmp_path / 'to_label.csv'}", "--labels=5", *flags) == 2
    (line,) = (
        line
        for line in capsys.readouterr().err.splitlines()
        if "counts as" not in line and "listed already" not in line
    )
    assert message in line and not (tmp_path / "to_label.csv").exists()


def test_more_mistakes(place, tmp_path, capsys):
    (tmp_path / "done.csv").write_text("path,label\nx.png,cat\n")
    assert run(place / "run", f"--out={tmp_path / 'done.csv'}") == 2
    assert "exists already, and may hold labels" in capsys.readouterr().err
    assert run(tmp_path, f"--out={tmp_path / 'new.csv'}") == 2
    assert "no encoder.json" in capsys.readouterr().err
