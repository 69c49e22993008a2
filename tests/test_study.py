"""The study: its table, its resuming, what makes a cell stale, and its figures."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import scipy.stats
from toy_encoder import toy_images
from toy_study import ARMS, NAMES, toy_config, toy_run, toy_sources, toy_tables

from ssl_jax import study
from ssl_jax.config import Data
from ssl_jax.data.arrays import from_array
from ssl_jax.errors import UserError
from ssl_jax.evaluate import metrics, nested_subset
from ssl_jax.report.tables import class_gains, summarise, verdicts
from ssl_jax.study import from_scratch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, *toy_run(toy_config(), folder, pictures=True)


def test_outputs_are_complete_and_can_be_recomputed(whole):
    folder, asked, lines, rows = whole
    assert asked == [("good", 0), ("scratch", 0), ("scratch", 1)]
    assert len(lines) == 8
    assert re.fullmatch(r"\[1/8\]  scratch, 6 labels, seed 0: top-1 0\.\d{4}  \(\d+ s; 00:\d\d:\d\d left\)", lines[0])
    results = list(csv.DictReader((folder / "results.csv").open()))
    assert [(r["arm"], r["labels"], r["seed"]) for r in results[:3]] == [
        ("scratch", "6", "0"),
        ("scratch", "6", "1"),
        ("scratch", "30", "0"),
    ]
    truth = np.load(folder / "test.npz")
    _, test = toy_sources()
    np.testing.assert_array_equal(truth["labels"], test.labels)
    for row in results:
        saved = np.load(folder / "cells" / row["arm"] / row["labels"] / f"{row['seed']}.npz")
        again = metrics(saved["scores"], truth["labels"], NAMES)
        assert float(row["top1"]) == pytest.approx(again["top1"], rel=1e-5)
        drawn = nested_subset(toy_sources()[0].labels, int(row["labels"]), int(row["seed"]))
        np.testing.assert_array_equal(saved["indices"], drawn)
        cell = json.loads((folder / "cells" / row["arm"] / row["labels"] / f"{row['seed']}.json").read_text())
        assert cell["scores"] == again and len(cell["chosen"]["trials"]) == 2
    assert len(rows) == 2 * 2 * 3 and "Paired difference to scratch" in (folder / "summary.md").read_text()
    for name in ("curve.png", "gain_by_class.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_a_finished_study_is_not_run_again(whole, monkeypatch):
    folder, *_ = whole
    before = toy_tables(folder)
    monkeypatch.setattr(study, "train_classifier", None)  # calling it would fail
    _, lines, _ = toy_run(toy_config(), folder, mean=[0.5])  # as an encoder says of itself that comes from disk
    assert all("(reused)" in line for line in lines) and toy_tables(folder) == before


def test_a_killed_study_ends_with_the_same_tables(whole, tmp_path):
    def kill(line):
        if line.startswith("[5/8]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_run(toy_config(), tmp_path, log=kill)
    (tmp_path / "cells/good/6/0.json").write_text('{"arm": "go')  # as a machine that loses power may leave it
    (tmp_path / "cells/scratch/30/0.npz").unlink()
    _, lines, _ = toy_run(toy_config(), tmp_path)
    assert sum("(reused)" in line for line in lines) == 3
    assert toy_tables(tmp_path) == toy_tables(whole[0])


def test_only_what_changed_is_run_again(tmp_path):
    def reused(config, **more):
        _, lines, _ = toy_run(config, tmp_path, **more)
        return {line.split("  ")[1].split(":")[0] for line in lines if "(reused)" in line}

    config = toy_config(labels=(6,), finetune={"lr": (1e-2,), "steps": 3})
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
    config = toy_config(labels=(30,), seeds=1, finetune={"lr": (1e-2,), "steps": 2})
    toy_run(config, tmp_path, train=source, test=source)
    cell = json.loads((tmp_path / "cells/scratch/30/0.json").read_text())
    assert sum(cell["scores"]["support"].values()) == 30
    assert np.load(tmp_path / "cells/scratch/30/0.npz")["indices"].tolist() == list(range(1, 60, 2))
    with pytest.raises(UserError, match=r"config.study.labels=\(31,\): allowed: 1 to 30"):
        toy_run(toy_config(labels=(31,)), tmp_path, train=source)


def test_the_linear_protocol_and_renumbered_test_classes(tmp_path):
    train, test = toy_sources()
    order = [2, 0, 1]  # the test data lists its classes in another order
    moved = from_array(
        test.arrays(), np.argsort(order)[test.labels], [NAMES[i] for i in order], Data(name="npz"), "there"
    )
    toy_run(toy_config(protocol="linear_quick"), tmp_path / "a")
    toy_run(toy_config(protocol="linear_quick", finetune={"steps": 99}), tmp_path / "b", test=moved)
    assert toy_tables(tmp_path / "a") == toy_tables(tmp_path / "b")
    cell = json.loads((tmp_path / "a/cells/good/30/0.json").read_text())
    assert cell["scores"]["top1"] > 0.7 and set(cell["chosen"]) == {"strength", "validation"}


def test_mistakes_are_told_before_anything_is_trained(tmp_path):
    train, test = toy_sources()
    unlabelled = from_array(test.arrays(), None, [], Data(name="npz"), "here")
    strange = from_array(test.arrays(), test.labels, ["coat", "bag", "boat"], Data(name="npz"), "here")
    for config, sources, message in [
        (toy_config(baseline="scrach"), {}, "config.study.baseline='scrach': unknown; did you mean 'scratch'"),
        (toy_config(labels=()), {}, "config.study.labels: empty"),
        (toy_config(), {"train": unlabelled}, "config.data: has no labels"),
        (toy_config(), {"test": unlabelled}, "config.study.test: has no labels"),
        (toy_config(), {"test": strange}, "config.study.test: class='boat': unknown"),
    ]:
        with pytest.raises(UserError, match=message):
            toy_run(config, tmp_path / "new", **sources)
    assert not (tmp_path / "new").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds a pretraining run"):
        toy_run(toy_config(), tmp_path)


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
        ({0: 0.4, 1: 0.7, 2: 0.56}, "no difference shown, the interval includes zero."),
        ({0: 0.6}, "on a single seed, which shows nothing."),
        ({7: 0.6}, "no seed in common."),
    ],
)
def test_verdicts(mine, word):
    rows = summarise(_cells({"scratch": {0: 0.5, 1: 0.6, 2: 0.55}, "ssl": mine}), "scratch")
    (said,) = verdicts(rows, "scratch", "top1")
    assert said.startswith("With 50 labels, ssl against scratch: ") and said.endswith(word)


def test_an_arm_from_scratch_changes_at_most_its_fine_tuning():
    assert from_scratch({}) and from_scratch({"finetune": {"lr": (1e-3,)}})
    assert not from_scratch({"method": {"name": "byol"}}) and not from_scratch({"train": {}, "finetune": {}})
