"""`ssl-jax compare` on run folders whose scores, and so their differences, are known."""

import html
import json
import re

import numpy as np
import pytest

from ssl_jax import cli, comparing
from ssl_jax import config as configs
from ssl_jax.evaluate.scores import metrics
from ssl_jax.evaluate.uncertainty import class_aucs
from ssl_jax.files import write_json, write_npz

CLASSES = ["bag", "c&t", "hat"]
N = 300
LABELS = np.arange(N) % 3


def make_run(folder, lr=0.1, method="simclr"):
    config = configs.default(method)
    config.data.name, config.data.path, config.optim.lr = "folder", "no/such/folder", lr
    write_json(folder / "config.json", configs.to_json(configs.resolve(config)))
    line = {"epoch": 0.5, "grad_norm": 1.0, "embedding_std": 0.9, "lr": lr}
    lines = [{**line, "step": step, "epoch": step / 20, "loss": 3 / step} for step in (10, 20)]
    lines.append({"step": 20, "knn_accuracy": 0.8})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def evaluate(folder, scores, labels=LABELS, stem="knn-all", names=None, groups=None, classes=CLASSES):
    """As `ssl-jax evaluate` leaves it; scores [S, N, K]."""
    protocol, count = stem.split("-")[:2]
    each = [metrics(s, labels, classes) for s in scores]
    metric = "top1" if labels.ndim == 1 else "macro_auc"
    about = {"protocol": protocol, "labels": count if count == "all" else int(count), "seeds": len(scores)}
    about |= {"classes": classes, "test": "test split", "metric": metric, "per_seed": each}
    about |= {"mean": {metric: each[0][metric]}, "interval": {metric: None}}
    write_json(folder / "evaluation" / f"{stem}.json", about)
    arrays = {"scores": np.asarray(scores), "labels": labels}
    arrays["names"] = np.array([str(i) for i in range(len(labels))] if names is None else names)
    write_npz(folder / "evaluation" / f"{stem}.npz", **arrays, **({} if groups is None else {"groups": groups}))


def wrong_in(share, seed, kinds=(0, 1, 2)):
    """Scores [1, N, 3] under which this share of the images of these classes is taken for the next class."""
    rng = np.random.default_rng(seed)
    wrong = (rng.random(N) < share) & np.isin(LABELS, kinds)
    return np.eye(3)[None, np.where(wrong, (LABELS + 1) % 3, LABELS)]


def test_difference_and_its_interval(tmp_path, monkeypatch, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.3)
    worse, better = wrong_in(0.4, 1), np.concatenate([wrong_in(0.1, 2), wrong_in(0.2, 3)])
    evaluate(a, worse)
    evaluate(b, better)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "a", "b", "--json"]) == 0
    told = capsys.readouterr().out
    result = json.loads(told.splitlines()[-1])
    assert result["options"] == {"config.optim.lr": {"a": "0.1", "b": "0.3"}}
    hits = [(s.argmax(axis=2) == LABELS).mean(axis=0) for s in (worse, better)]
    difference = hits[1] - hits[0]
    first, second = (row for row in result["scores"] if not row["of"])
    assert (first["run"], first["metric"], first["difference"]) == ("a", "top1", None)
    assert second["difference"] == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / N**0.5  # by the normal approximation
    assert second["low"] == pytest.approx(difference.mean() - half, abs=0.012)
    assert second["high"] == pytest.approx(difference.mean() + half, abs=0.012)
    bag = next(row for row in result["scores"] if row["of"] == "bag" and row["run"] == "b")
    assert bag["score"] == pytest.approx(hits[1][LABELS == 0].mean()) and bag["metric"] == "recall"
    assert bag["difference"] == pytest.approx(difference[LABELS == 0].mean())
    assert "better" in told and "classes that are clearly better: bag (b, knn, all labels)" in told
    page = (tmp_path / "compare.html").read_text()
    assert "config.optim.lr" in page and "c&amp;t" in page and page.count("<svg") == 3
    assert not re.findall(r"<script|<link|(?:src|href)=\"(?!data:|#)", page)


def test_equal_scores_are_no_difference_and_only_equal_images_are_compared(tmp_path):
    a, b, c, d = (make_run(tmp_path / name) for name in "abcd")
    evaluate(a, wrong_in(0.3, 1))
    evaluate(b, wrong_in(0.3, 1))
    evaluate(c, wrong_in(0.3, 1), names=[f"other/{i}" for i in range(N)])
    evaluate(a, wrong_in(0.3, 1), stem="linear-30")  # nobody else has it
    result = comparing.compare([str(each) for each in (a, b, c, d)], str(tmp_path / "c.html"))
    whole = [row for row in result["scores"] if not row["of"]]
    assert [(row["run"], row["protocol"]) for row in whole] == [(str(a), "knn"), (str(b), "knn")]
    assert (whole[1]["difference"], whole[1]["low"], whole[1]["high"]) == (0, 0, 0)
    assert result["left_out"][:2] == [
        f"{c}: knn with all labels is tested on other images, so it is left out",
        f"{d}: knn with all labels is not there, so it is left out",
    ]
    assert result["options"] == {} and "tested on other images" in html.unescape((tmp_path / "c.html").read_text())


def test_several_labels_and_patients(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "REPEATS", 200)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 3)
    labels = (rng.random((120, 2)) < 0.4).astype(np.float32)
    labels[5, 1] = np.nan
    scores = [rng.normal(size=(1, 120, 2)) + strength * np.nan_to_num(labels) for strength in (0.5, 3)]
    for name, each in zip("ab", scores, strict=True):
        evaluate(make_run(tmp_path / name), each, labels, "linear-30", groups=groups, classes=["x", "y"])
    result = comparing.compare([str(tmp_path / name) for name in "ab"], str(tmp_path / "c.html"))
    mine, theirs = (class_aucs(each[0], labels) for each in scores)
    of_b = [row for row in result["scores"] if row["run"].endswith("b")]
    assert [(row["metric"], row["of"]) for row in of_b] == [("macro_auc", ""), ("auc", "x"), ("auc", "y")]
    np.testing.assert_allclose([row["difference"] for row in of_b[1:]], theirs - mine)
    assert of_b[0]["difference"] == pytest.approx((theirs - mine).mean()) and of_b[0]["low"] > 0
    # Whole patients are drawn: with each image a patient of its own, the interval is another one.
    for name, each in zip("cd", scores, strict=True):
        evaluate(make_run(tmp_path / name), each, labels, "linear-30", classes=["x", "y"])
    alone = comparing.compare([str(tmp_path / name) for name in "cd"], str(tmp_path / "d.html"))
    assert alone["scores"][3]["difference"] == of_b[0]["difference"] and alone["scores"][3]["low"] != of_b[0]["low"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a"], "compare: 1 run folder; write two or more: ssl-jax compare runs/a runs/b"),
        (["a", "a"], "compare: a run is named twice"),
        (["a", "nowhere"], "--workdir=nowhere: no config.json; allowed: a folder made by `ssl-jax pretrain`"),
        (["a", "b", "--out=x.csv"], "--out=x.csv: unknown ending '.csv'; allowed: .html"),
        (
            ["a", "b"],
            r"compare: no evaluation on the same test images in two of the runs \(b: knn with all labels is tested on",
        ),
        (["a", "c"], "c/evaluation/knn-all.npz: damaged; its `ssl-jax evaluate` command makes it anew"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        evaluate(make_run(tmp_path / name), wrong_in(0.1, 1), names=[f"{name}{i}" for i in range(N)])
    (tmp_path / "c/evaluation/knn-all.npz").write_bytes(b"PK\3\4 not much")
    assert cli.main(["compare", *argv]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"ssl-jax: {message}", line), line
