"""The study: its table, its resuming, what makes a cell stale, and its figures."""

import csv
import dataclasses
import functools
import json

import numpy as np
import pytest
import scipy.stats
from toy_encoder import toy_encoder, toy_images

from ssl_jax import study
from ssl_jax.config import Augment, Data, Finetune, Study, default, resolve
from ssl_jax.data.source import from_array
from ssl_jax.errors import UserError
from ssl_jax.evaluate import metrics, nested_subset
from ssl_jax.report.tables import class_gains, summarise, verdicts
from ssl_jax.study import from_scratch, run_study

ARMS = {"scratch": {}, "good": {"train": {"seed": 1}}}
NAMES = ["coat", "bag", "boot"]
TABLES = ("results.csv", "summary.csv", "summary.md")


@functools.cache
def _sources():
    made = []
    for n, seed in ((120, 0), (60, 1)):
        images, labels = toy_images(n, seed=seed)
        made.append(from_array(images, labels, NAMES, Data(name="npz"), "here"))
    return made


def _config(**changes):
    tuning = Finetune(steps=12, batch=16, lr=(3e-3, 1e-2), augment=Augment(preset="none"))
    changes = {"arms": ARMS, "labels": (6, 30), "seeds": 2, **changes}
    tuning = dataclasses.replace(tuning, **changes.pop("finetune", {}))
    return dataclasses.replace(resolve(default("simclr")), finetune=tuning, study=Study(**changes))


def _run(config, workdir, *, log=None, shift=0.0, mean=(0.5,), **sources):
    """Runs the study; returns the encoders that were asked for and the lines."""
    asked, lines = [], []

    def get_encoder(arm, arm_config, seed):
        asked.append((arm, seed))
        made = toy_encoder(seed)._replace(about={"model": {"mean": mean}})
        return made._replace(params={**made.params, "scale": made.params["scale"] + (shift if arm == "good" else 0)})

    train, test = _sources()
    given = {"train": train, "test": test, **sources}
    rows = run_study(config, workdir, get_encoder=get_encoder, log=log or lines.append, **given)
    return asked, lines, rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, *_run(_config(), folder)


def _tables(folder):
    return {name: (folder / name).read_bytes() for name in TABLES}


def test_outputs_are_complete_and_can_be_recomputed(whole):
    folder, asked, lines, rows = whole
    assert asked == [("good", 0), ("scratch", 0), ("scratch", 1)]
    assert (
        len(lines) == 8 and lines[0].startswith("[1/8]  scratch, 6 labels, seed 0: top-1 0.") and "left 00:" in lines[0]
    )
    results = list(csv.DictReader((folder / "results.csv").open()))
    assert [(r["arm"], r["labels"], r["seed"]) for r in results[:3]] == [
        ("scratch", "6", "0"),
        ("scratch", "6", "1"),
        ("scratch", "30", "0"),
    ]
    truth = np.load(folder / "test.npz")
    _, test = _sources()
    np.testing.assert_array_equal(truth["labels"], test.labels)
    for row in results:
        saved = np.load(folder / "cells" / row["arm"] / row["labels"] / f"{row['seed']}.npz")
        again = metrics(saved["scores"], truth["labels"], NAMES)
        assert float(row["top1"]) == pytest.approx(again["top1"], rel=1e-5)
        drawn = nested_subset(_sources()[0].labels, int(row["labels"]), int(row["seed"]))
        np.testing.assert_array_equal(saved["indices"], drawn)
        cell = json.loads((folder / "cells" / row["arm"] / row["labels"] / f"{row['seed']}.json").read_text())
        assert cell["scores"] == again and len(cell["chosen"]["trials"]) == 2
    assert len(rows) == 2 * 2 * 3 and "Paired difference to scratch" in (folder / "summary.md").read_text()
    for name in ("curve.png", "gain_by_class.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_a_finished_study_is_not_run_again(whole, monkeypatch):
    folder, *_ = whole
    before = _tables(folder)
    monkeypatch.setattr(study, "finetune", None)  # calling it would fail
    _, lines, _ = _run(_config(), folder, mean=[0.5])  # as an encoder says of itself that comes from disk
    assert all("(reused)" in line for line in lines) and _tables(folder) == before


def test_a_killed_study_ends_with_the_same_tables(whole, tmp_path):
    def kill(line):
        if line.startswith("[5/8]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(_config(), tmp_path, log=kill)
    (tmp_path / "cells/good/6/0.json").write_text('{"arm": "go')  # as a machine that loses power may leave it
    (tmp_path / "cells/scratch/30/0.npz").unlink()
    _, lines, _ = _run(_config(), tmp_path)
    assert sum("(reused)" in line for line in lines) == 3
    assert _tables(tmp_path) == _tables(whole[0])


def test_only_what_changed_is_run_again(tmp_path):
    def reused(config, **more):
        _, lines, _ = _run(config, tmp_path, **more)
        return {line.split("  ")[1].split(":")[0] for line in lines if "(reused)" in line}

    config = _config(labels=(6,), finetune={"lr": (1e-2,), "steps": 3})
    everything = {f"{arm}, 6 labels, seed {s}" for arm in ARMS for s in (0, 1)}
    assert reused(config) == set() and reused(config) == everything
    # Another encoder in one arm, other settings in one arm, other test images.
    scratch = {name for name in everything if name.startswith("scratch")}
    assert reused(config, shift=0.5) == scratch and reused(config, shift=0.5) == everything
    arms = {**ARMS, "good": {"train": {"seed": 1}, "finetune": {"steps": 4}}}
    assert reused(dataclasses.replace(config, study=dataclasses.replace(config.study, arms=arms)), shift=0.5) == scratch
    images, labels = toy_images(60, seed=2)
    assert reused(config, shift=0.5, test=from_array(images, labels, NAMES, Data(name="npz"), "here")) == set()


def test_labels_that_are_unknown_are_neither_drawn_nor_scored(tmp_path):
    images, labels = toy_images(60)
    labels[::2] = -1
    source = from_array(images, labels, NAMES, Data(name="npz"), "here")
    config = _config(labels=(30,), seeds=1, finetune={"lr": (1e-2,), "steps": 2})
    _run(config, tmp_path, train=source, test=source)
    cell = json.loads((tmp_path / "cells/scratch/30/0.json").read_text())
    assert sum(cell["scores"]["support"].values()) == 30
    assert np.load(tmp_path / "cells/scratch/30/0.npz")["indices"].tolist() == list(range(1, 60, 2))
    with pytest.raises(UserError, match=r"config.study.labels=\(31,\): allowed: 1 to 30"):
        _run(_config(labels=(31,)), tmp_path, train=source)


def test_the_linear_protocol_and_renumbered_test_classes(tmp_path):
    train, test = _sources()
    order = [2, 0, 1]  # the test data lists its classes in another order
    moved = from_array(
        test.arrays(), np.argsort(order)[test.labels], [NAMES[i] for i in order], Data(name="npz"), "there"
    )
    _run(_config(protocol="linear"), tmp_path / "a")
    _run(_config(protocol="linear", finetune={"steps": 99}), tmp_path / "b", test=moved)
    assert _tables(tmp_path / "a") == _tables(tmp_path / "b")
    cell = json.loads((tmp_path / "a/cells/good/30/0.json").read_text())
    assert cell["scores"]["top1"] > 0.7 and set(cell["chosen"]) == {"strength", "validation"}


def test_mistakes_are_told_before_anything_is_trained(tmp_path):
    train, test = _sources()
    unlabelled = from_array(test.arrays(), None, [], Data(name="npz"), "here")
    strange = from_array(test.arrays(), test.labels, ["coat", "bag", "boat"], Data(name="npz"), "here")
    for config, sources, message in [
        (_config(baseline="scrach"), {}, "config.study.baseline='scrach': unknown; did you mean 'scratch'"),
        (_config(labels=()), {}, "config.study.labels: empty"),
        (_config(), {"train": unlabelled}, "config.data: has no labels"),
        (_config(), {"test": unlabelled}, "config.study.test: has no labels"),
        (_config(), {"test": strange}, "config.study.test: class='boat': unknown"),
    ]:
        with pytest.raises(UserError, match=message):
            _run(config, tmp_path / "new", **sources)
    assert not (tmp_path / "new").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds a pretraining run"):
        _run(_config(), tmp_path)


def _cells(values):
    support = {"a": 10, "b": 10}
    return [
        {
            "arm": arm,
            "labels": 50,
            "seed": seed,
            "scores": {"top1": v, "support": support, "recall": {"a": v, "b": 1 - v}},
        }
        for arm, scores in values.items()
        for seed, v in scores.items()
    ]


def test_summary_pairs_the_seeds_that_both_arms_have():
    base, mine = {0: 0.5, 1: 0.6, 2: 0.55, 3: 0.9}, {0: 0.6, 1: 0.68, 2: 0.66}
    rows = summarise(_cells({"scratch": base, "ssl": mine}), "scratch")
    assert [(r["arm"], r["seeds"]) for r in rows] == [("scratch", 4), ("ssl", 3)]
    want = scipy.stats.ttest_rel(list(mine.values()), [0.5, 0.6, 0.55]).confidence_interval(0.95)
    row = rows[1]
    low, high = row["difference"] - row["difference_half"], row["difference"] + row["difference_half"]
    assert (low, high) == pytest.approx((want.low, want.high))
    assert row["mean"] == pytest.approx(np.mean(list(mine.values())))
    assert rows[0]["difference"] is None
    gains = class_gains(_cells({"scratch": base, "ssl": mine}), "scratch", "recall")
    assert [g["gain"] for g in gains] == pytest.approx([row["difference"], -row["difference"]])


@pytest.mark.parametrize(
    ("mine", "word"),
    [
        ({0: 0.6, 1: 0.69, 2: 0.66}, "better, the interval lies above zero."),
        ({0: 0.4, 1: 0.51, 2: 0.44}, "worse, the interval lies below zero."),
        ({0: 0.4, 1: 0.7, 2: 0.56}, "no difference shown, the interval holds zero."),
        ({0: 0.6}, "on one seed, which supports nothing."),
        ({7: 0.6}, "nothing to pair."),
    ],
)
def test_verdicts(mine, word):
    rows = summarise(_cells({"scratch": {0: 0.5, 1: 0.6, 2: 0.55}, "ssl": mine}), "scratch")
    (said,) = verdicts(rows, "scratch", "top1")
    assert said.startswith("With 50 labels, ssl against scratch: ") and said.endswith(word)


def test_an_arm_from_scratch_changes_at_most_its_fine_tuning():
    assert from_scratch({}) and from_scratch({"finetune": {"lr": (1e-3,)}})
    assert not from_scratch({"method": {"name": "byol"}}) and not from_scratch({"train": {}, "finetune": {}})
