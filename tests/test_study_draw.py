"""How the arms of a study draw their labels."""

import dataclasses
import json

import numpy as np
import pytest
from toy_encoder import toy_encoder
from toy_study import ARMS, toy_config, toy_run, toy_sources

from ssl_jax import study as studies
from ssl_jax.data.source import Source
from ssl_jax.errors import UserError
from ssl_jax.evaluate import Neighbourhood, nested_subset
from ssl_jax.evaluate.propagation import spread_probe
from ssl_jax.report import summary
from ssl_jax.selection import select

CHOOSING = {**ARMS, "choosing": {"train": {"seed": 1}, "select": "typical"}}


@pytest.fixture(autouse=True, scope="module")
def _no_references():
    """They take most of the time, and are those of every study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "_references", lambda *_: [])
        yield


def run(folder, part=(1, 1), **changes):
    """Runs the cells, without tables and figures; returns the lines."""
    sources = {"train": changes.pop("train")} if "train" in changes else {}
    _, lines, _ = toy_run(toy_config(protocol="linear_quick", **changes), folder, part=part, **sources)
    return lines


def drawn(folder, arm, labels, seed):
    return np.load(folder / f"cells/{arm}/{labels}/{seed}.npz")["indices"].tolist()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run(folder)
    return folder, run(folder, arms=CHOOSING)


def test_an_arm_can_choose_its_labels_with_its_own_encoder(study):
    folder, lines = study
    assert sum("(reused)" in line for line in lines) == 8  # the cells of the arms that were there
    train, _ = toy_sources()
    features = toy_encoder(0).embed(train.arrays())
    for seed in (0, 1):
        order = select(features, 30, "typical", seed=seed)
        for labels in (6, 30):
            assert drawn(folder, "choosing", labels, seed) == sorted(order[:labels].tolist())
            for arm in ARMS:
                assert drawn(folder, arm, labels, seed) == nested_subset(train.labels, labels, seed).tolist()


def test_an_arm_can_spread_its_labels_to_all_training_images(tmp_path):
    def lines(**changes):
        arms = {"scratch": {}, "spreading": {"train": {"seed": 1}, "finetune": {"unlabelled": "all", **changes}}}
        return run(tmp_path, arms=arms)

    lines(align="equal")
    train, test = toy_sources()
    features = toy_encoder(0).embed(train.arrays())
    pool, labels = Neighbourhood(features), np.asarray(train.labels)
    for count in (6, 30):
        index = drawn(tmp_path, "spreading", count, 1)
        probe = spread_probe(features[index], labels[index], pool, classes=3, seed=1, align="equal")
        scores = np.load(tmp_path / f"cells/spreading/{count}/1.npz")["scores"]
        np.testing.assert_allclose(scores, probe.scores(toy_encoder(0).embed(test.arrays())), atol=1e-3)
    again = lines()  # not aligned: other answers
    assert ["(reused)" in line for line in again] == ["spreading" not in line for line in again]


@pytest.mark.slow
def test_a_study_in_parts_draws_the_same(study, tmp_path):
    for part in ((1, 2), (2, 2)):
        run(tmp_path, part, arms=CHOOSING)
    for path in (study[0] / "cells").rglob("*.npz"):
        again = np.load(tmp_path / path.relative_to(study[0]))
        np.testing.assert_array_equal(np.load(path)["indices"], again["indices"])


def test_the_summary_says_how_labels_were_drawn(study):
    about = json.loads((study[0] / "study.json").read_text())
    assert about["draws"] == {"scratch": "stratified", "good": "stratified", "choosing": "typical"}
    said = summary._drawn(about)
    assert "not the same ones (choosing typical, good stratified, scratch stratified)" in said
    assert summary._drawn({"draws": {"a": "random", "b": "random"}}) == "All arms share the labels of a seed."
    assert "labels that nobody has before labelling" in summary._drawn({"draws": {"a": "stratified"}})


@pytest.mark.parametrize("draw", ["random", "typical"])
def test_all_arms_draw_as_the_study_says(tmp_path, draw):
    train, _ = toy_sources()
    arms = {**CHOOSING, "drawing": {"train": {"seed": 1}, "select": "stratified"}}
    arms["far"] = {"train": {"seed": 1}, "select": "kcenter"}
    run(tmp_path, arms=arms, draw=draw, seeds=1, labels=(30,))
    at_random = nested_subset(train.labels, 30, 0, stratified=False).tolist()
    typical = sorted(select(toy_encoder(0).embed(train.arrays()), 30, "typical").tolist())
    assert drawn(tmp_path, "scratch", 30, 0) == at_random  # it has no encoder to choose with
    assert drawn(tmp_path, "good", 30, 0) == (typical if draw == "typical" else at_random)
    assert drawn(tmp_path, "choosing", 30, 0) == typical
    assert drawn(tmp_path, "far", 30, 0) == sorted(select(toy_encoder(0).embed(train.arrays()), 30, "kcenter").tolist())
    assert drawn(tmp_path, "drawing", 30, 0) == nested_subset(train.labels, 30, 0).tolist()


def test_only_images_with_a_label_are_chosen_and_one_of_each_patient(tmp_path):
    whole, _ = toy_sources()
    labels = np.where(np.arange(120) % 2, whole.labels, -1)
    groups = np.arange(120) // 4  # two labelled images each
    options = {"labels": labels, "classes": whole.classes, "groups": groups, "array": whole.arrays()}
    train = Source(whole.names, whole.shape, whole.load, **options)
    arms = {**ARMS, "choosing": {"train": {"seed": 1}, "select": "typical"}}
    run(tmp_path, arms=arms, seeds=1, labels=(20, 30), train=train)
    chosen = np.array(drawn(tmp_path, "choosing", 30, 0))
    assert (labels[chosen] >= 0).all() and len(set(groups[chosen].tolist())) == 30
    assert set(drawn(tmp_path, "choosing", 20, 0)) < set(chosen.tolist())


def test_random_draws_are_nested_and_keep_patients_together():
    labels, groups = np.random.default_rng(0).integers(-1, 5, 300), np.arange(300) // 3
    alone = [nested_subset(labels, n, 4, stratified=False) for n in (20, 50)]
    assert set(alone[0]) < set(alone[1]) and (labels[alone[1]] >= 0).all()
    assert alone[0].tolist() != nested_subset(labels, 20, 5, stratified=False).tolist()
    together = nested_subset(labels, 50, 4, groups, stratified=False)
    whole = [
        set(np.flatnonzero((groups == g) & (labels >= 0))) <= set(together) for g in set(groups[together].tolist())
    ]
    assert whole.count(False) <= 1


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"train": {"seed": 1}, "select": "typicl"}, "config.study.arms: x: select='typicl': unknown; did you mean"),
        ({"select": "typical"}, "x: select='typical': the arm starts from scratch; allowed: stratified or random"),
    ],
)
def test_mistakes(tmp_path, arm, message):
    config = toy_config(arms={**ARMS, "x": arm})
    with pytest.raises(UserError, match=message):
        toy_run(config, tmp_path)
    assert dataclasses.asdict(config)["study"]["draw"] == "stratified"
