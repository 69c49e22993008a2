"""The study of data with several labels per image: draws by patient, AUC by class, intervals over test patients."""

import csv
import functools
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from toy_study import TABLES, toy_config, toy_run

from ssl_jax.data.source import Source
from ssl_jax.errors import UserError
from ssl_jax.evaluate import bootstrap_by_group
from ssl_jax.report import tables

FINDINGS = ["top", "middle", "bottom", "never tested"]
SHARE = (0.5, 0.3, 0.15, 0.2)
ALL = (*TABLES, "classes.csv", "patients.csv", "study.json")


def _source(n, seed, *, test=False):
    """Images whose bright bands are their findings, two of each patient; a fifth of the training labels not known."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 4)) < SHARE).astype(np.float32)
    images = rng.integers(0, 120, (n, 8, 8, 1))
    for c in range(3):
        images[labels[:, c] == 1, 3 * c : 3 * c + 2] += 80
    if test:
        labels[:, 3] = 0
    else:
        labels[rng.random(labels.shape) < 0.2] = np.nan
        labels[:5] = np.nan
    names, groups = [f"patient{i // 2:03}/view{i % 2}.png" for i in range(n)], np.arange(n) // 2 + 1000 * seed
    images = images.astype(np.uint8)
    more = {"labels": labels, "classes": FINDINGS, "groups": groups, "array": images}
    return Source(names, (8, 8, 1), images.__getitem__, **more)


@functools.cache
def _sources():
    return {"train": _source(200, 0), "test": _source(60, 1, test=True)}


def _config(**changes):
    return toy_config(labels=(20, 60), seeds=2, finetune={"steps": 12, "lr": (1e-2,)}, **changes)


@pytest.fixture(autouse=True, scope="module")
def _few_repeats():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "REPEATS", 40)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, *toy_run(_config(), folder, pictures=True, **_sources())


def _rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_number_can_be_computed_again(whole):
    folder, _, lines, rows = whole
    assert "macro AUC 0." in lines[0]
    truth, train = np.load(folder / "test.npz"), _sources()["train"]
    assert list(truth["names"][:2]) == ["patient000/view0.png", "patient000/view1.png"]
    np.testing.assert_array_equal(truth["groups"], _sources()["test"].groups)
    auc, seen = {}, {}
    for row in _rows(folder / "results.csv"):
        saved = np.load(folder / "cells" / row["arm"] / row["labels"] / f"{row['seed']}.npz")
        auc[row["arm"], row["labels"], row["seed"]] = [
            roc_auc_score(truth["labels"][:, c], saved["scores"][:, c]) for c in range(3)
        ]
        assert float(row["macro_auc"]) == pytest.approx(np.mean(auc[row["arm"], row["labels"], row["seed"]]), rel=1e-5)
        assert len(saved["indices"]) == int(row["labels"]) and min(saved["indices"]) >= 5
        # The same labels in every arm; smaller draws within larger ones; hardly a patient is drawn in part.
        drawn = seen.setdefault((row["labels"], row["seed"]), set(saved["indices"].tolist()))
        assert drawn == set(saved["indices"].tolist())
        # Where a draw ends, and where the leading positives of each class stand, a patient may be cut.
        assert np.bincount(train.groups[saved["indices"]]).max() == 2
    assert all(seen["20", seed] < seen["60", seed] for seed in "01")
    (gain,) = [r for r in _rows(folder / "classes.csv") if (r["labels"], r["class"]) == ("60", "middle")]
    each = [auc["good", "60", s][1] - auc["scratch", "60", s][1] for s in "01"]
    assert float(gain["gain"]) == pytest.approx(np.mean(each), rel=1e-4)
    column = train.labels[:, 1]
    assert float(gain["share"]) == pytest.approx(column[~np.isnan(column)].mean(), rel=1e-4)
    about = json.loads((folder / "study.json").read_text())
    assert about["share"]["middle"] == pytest.approx(float(gain["share"]), rel=1e-4)
    words = (folder / "summary.md").read_text()
    assert "Macro ROC AUC on the test set (60 images)" in words and "both labels: never tested." in words
    assert "| bottom | " in words and "over test patients" in words and "Rank correlation" in words
    for name in ("curve.png", "gain_by_class.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_killed_anywhere_or_done_in_parts_the_files_are_the_same(whole, tmp_path):
    told = []

    def kill(line):
        told.append(line)
        if len(told) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_run(_config(), tmp_path / "killed", log=kill, **_sources())
    (tmp_path / "killed/cells/good/20/0.npz").unlink()
    toy_run(_config(), tmp_path / "killed", **_sources())
    for k in (2, 1):
        toy_run(_config(), tmp_path / "parts", part=(k, 2), **_sources())
    _, lines, _ = toy_run(_config(), tmp_path / "parts", **_sources())
    assert all("(reused)" in line for line in lines)
    for folder in (tmp_path / "killed", tmp_path / "parts"):
        for name in ALL:
            assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name


def test_the_interval_over_patients_is_that_of_scikit_learns_auc(monkeypatch):
    rng = np.random.default_rng(0)
    labels = (rng.random((50, 3)) < (0.5, 0.2, 0)).astype(np.float32)
    labels[:4, 0] = np.nan
    groups = np.arange(50) // 3
    scores = {(arm, 9): rng.normal(size=(2, 50, 3)).round(1).astype(np.float32) for arm in ("a", "b")}  # with ties

    def mean_auc(arm, chosen):
        found = []
        for c in range(2):
            at = chosen[~np.isnan(labels[chosen, c])]
            if len(np.unique(labels[at, c])) == 2:
                found.append(np.mean([roc_auc_score(labels[at, c], s[at, c]) for s in scores[arm, 9]]))
        return np.mean(found)

    (row,) = tables.over_patients(scores, labels, groups, "b")
    wanted = bootstrap_by_group(lambda chosen: mean_auc("a", chosen) - mean_auc("b", chosen), groups, repeats=40)
    assert (row["low"], row["high"]) == pytest.approx(wanted, abs=1e-9) and row["low"] < row["high"]
    monkeypatch.setattr(tables, "MAX_TESTED", 49)
    assert tables.over_patients(scores, labels, groups, "b") == []


def test_rare_classes_that_gain_more():
    share = {"rare": 0.05, "some": 0.2, "many": 0.5}
    gains = {
        ("ssl", 0): (0.3, 0.2, 0.1),
        ("ssl", 1): (0.3, 0.1, 0.2),
        ("scratch", 0): (0, 0, 0),
        ("scratch", 1): (0, 0, 0),
    }
    cells = [
        {"arm": arm, "labels": 9, "seed": seed, "scores": {"auc": dict(zip(share, gain, strict=True))}}
        for (arm, seed), gain in gains.items()
    ]
    (row,) = tables.rarity(cells, "scratch", share)
    assert row["correlation"] == pytest.approx((-1.0 - 0.5) / 2)  # by hand: ranks 3 2 1 and 3 1 2 against 1 2 3


@pytest.mark.parametrize(
    ("low", "word"),
    [
        (0.01, "better, both intervals lie above zero."),
        (-0.01, "which may not hold for other patients: the second int"),
    ],
)
def test_a_gain_must_hold_for_other_patients(low, word):
    row = {"arm": "ssl", "labels": 9, "metric": "macro_auc", "difference": 0.05, "difference_half": 0.02}
    (said,) = tables.verdicts([row], "scratch", "macro_auc", [{"arm": "ssl", "labels": 9, "low": low, "high": 0.1}])
    assert f"over test patients {100 * low:+.1f} to +10.0" in said and word in said


def test_what_cannot_be_judged_is_told_first(tmp_path):
    test = _source(60, 1, test=True)
    test.labels[:] = 0
    with pytest.raises(UserError, match="config.study.test: no class has both positive and negative images"):
        toy_run(_config(), tmp_path, train=_sources()["train"], test=test)
