"""What a score must beat, arms that were trained too briefly, and the names of results."""

import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from toy_encoder import toy_encoder, toy_images
from toy_study import NAMES, toy_config, toy_run, toy_sources

from ssl_jax import evaluation
from ssl_jax.config import Data, Eval, Finetune, default, resolve
from ssl_jax.evaluate.finetuning import finetune, loss_curve, still_falling
from ssl_jax.evaluate.knn import knn_scores
from ssl_jax.evaluate.references import References, _votes, over_pixels, pixels, untrained
from ssl_jax.report import cautions
from ssl_jax.report.summary import _sharper
from ssl_jax.report.tables import summarise, verdicts


def test_pixels_are_the_images_and_large_ones_are_reduced():
    small = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    np.testing.assert_allclose(pixels(small), small.reshape(3, -1) / 255, rtol=1e-6)
    halves = np.zeros((2, 64, 64, 3), np.uint8)
    halves[:, :, 32:] = 255
    made = pixels(halves).reshape(2, 32, 32, 3)
    assert made[:, :, :15].max() < 0.05 and made[:, :, 17:].min() > 0.95


def test_a_random_encoder_has_the_same_network_and_other_weights():
    trained = toy_encoder(seed=5)
    other = untrained(trained)
    assert other.network is trained.network and not np.allclose(other.params["w"], trained.params["w"])
    np.testing.assert_array_equal(other.params["w"], untrained(toy_encoder(seed=6)).params["w"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    (images, labels), (test, truth) = toy_images(60), toy_images(90, seed=1)
    labels = np.where(np.arange(60) < 20, 1, labels)  # the most frequent class is the second
    compared = References({"random encoder": toy_encoder()}, test, truth, NAMES, Eval())
    path = tmp_path_factory.mktemp("references") / "0.json"
    return compared, (images, labels, test, truth), path, compared.of(path, images, labels, seed=0)


def test_references_by_an_independent_computation(made):
    _, (images, labels, test, truth), _, scores = made
    assert scores["majority class"]["top1"] == (truth == 1).mean() and scores["majority class"]["macro_auc"] == 0.5
    x, q = images.reshape(60, -1) / 255.0, test.reshape(90, -1) / 255.0
    scale = x.std(axis=0)
    fits = [LogisticRegression(C=c, max_iter=1000).fit(x / scale, labels).score(q / scale, truth) for c in (0.001, 0.1)]
    assert min(fits) - 0.05 <= scores["raw pixels, linear"]["top1"] <= max(fits) + 0.05
    near = x - x.mean(axis=0), q - x.mean(axis=0)
    near = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in near]
    similar = near[1] @ near[0].T
    votes = np.zeros((90, 3))
    for row, vote in zip(similar, votes, strict=True):
        for i in np.argsort(-row)[:20]:
            vote[labels[i]] += np.exp(row[i] / 0.1)
    assert scores["raw pixels, kNN"]["top1"] == pytest.approx((votes.argmax(1) == truth).mean())
    assert list(scores)[3:] == ["random encoder, linear", "random encoder, kNN"]


def test_references_are_computed_once_and_again_if_an_image_changes(made, monkeypatch):
    compared, (images, labels, test, truth), path, scores = made
    monkeypatch.setattr(References, "_compute", None)  # calling it would fail
    again = References({"random encoder": toy_encoder()}, test, truth, NAMES, Eval())
    found = again.of(path, images, labels, seed=0)
    assert found == scores and list(found) == list(scores) and not again.features
    changed = images.copy()
    changed[0, 0, 0] ^= 1
    other = References({}, test, truth, NAMES, Eval(knn_k=3))
    for different, pictures, seed in ((again, changed, 0), (again, images, 1), (other, images, 0)):
        with pytest.raises(TypeError):
            different.of(path, pictures, labels, seed=seed)
    path.write_text('{"key": "')  # as a machine that loses power may leave it
    monkeypatch.undo()
    assert compared.of(path, images, labels, seed=0) == scores


def test_several_labels_an_image(tmp_path):
    (images, labels), (test, truth) = toy_images(60), toy_images(30, seed=1)
    each, known = (np.float32(y[:, None] == np.arange(3)) for y in (labels, truth))
    each[:9, 1] = np.nan
    rare = np.where(np.arange(60)[:, None] < 50, [[1, 1, np.nan]], each)  # of most nothing is known
    near = {"classes": 3, "k": 5, "temperature": 0.1}
    want = knn_scores(pixels(images), rare, pixels(test), **near)
    votes = _votes(pixels(images), pixels(test), rare, **near)
    np.testing.assert_allclose(votes, want, atol=0.02)
    scores = References({}, test, known, NAMES, Eval()).of(tmp_path / "0.json", images, each, seed=0)
    assert scores["majority class"]["macro_auc"] == 0.5
    assert min(scores["raw pixels, linear"]["macro_auc"], scores["raw pixels, kNN"]["macro_auc"]) > 0.7


def test_the_margin_over_raw_pixels():
    drawn = [{"raw pixels, linear": p, "raw pixels, kNN": 0.3, "random encoder, kNN": 0.9} for p in (0.5, 0.6, 0.55)]
    margin = over_pixels([0.6, 0.7, 0.66], drawn)
    assert margin.name == "raw pixels, linear" and margin.difference == pytest.approx(0.31 / 3)
    assert margin.words == "above raw pixels"
    assert over_pixels([0.4, 0.8, 0.6], drawn).words == "not shown to be above raw pixels"
    assert over_pixels([0.5, 0.6, 0.55], drawn).words == over_pixels([0.4], drawn[:1]).words == "not above raw pixels"


def test_short_training_shows_in_its_loss():
    images, labels = toy_images(90)
    settings = Finetune(steps=100, epochs=0, batch=32, lr=(0.01,), head="zero")
    settings = dataclasses.replace(settings, augment=dataclasses.replace(settings.augment, preset="none"))
    long = loss_curve(finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0))
    settings = dataclasses.replace(settings, steps=20)
    short = loss_curve(finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0))
    assert long[0] > 0.5 and long[-1] < 0.15 and not still_falling(long)
    assert 0.9 < short[0] < 1.3 and still_falling(short)
    assert not still_falling([]) and not still_falling([0.9] * 10)


def _cells(scores, **more):
    """Cells of {arm: {label count: [score of each seed]}}."""
    return [
        {"arm": arm, "labels": count, "seed": seed, "scores": {"top1": value}, **more.get(arm, {})}
        for arm, counts in scores.items()
        for count, values in counts.items()
        for seed, value in enumerate(values)
    ]


def test_an_arm_that_more_labels_do_not_help_is_undertrained():
    more = {"ssl": {250: [0.80, 0.81], 1000: [0.83, 0.83]}}
    cells = _cells({"scratch": {250: [0.74, 0.75], 1000: [0.75, 0.74]}, **more})
    assert list(cautions.undertrained(cells, [], "top1")) == [("scratch", 1000)]
    (told,) = cautions.sentences(cautions.undertrained(cells, [], "top1"), {}, {})
    assert "scratch looks undertrained with 1,000 labels: it does no better than with 250 (74.5 against 74.5)" in told
    # If nothing gains by more labels, the data are used up; close to 1 little is left to gain.
    alike = {"scratch": {250: [0.7], 1000: [0.7]}, "ssl": {250: [0.8], 1000: [0.8]}}
    assert cautions.undertrained(_cells(alike), [], "top1") == {}
    assert cautions.undertrained(_cells({"scratch": {250: [0.97], 1000: [0.973]}, **more}), [], "top1") == {}
    falling = {"scratch": {"loss": np.linspace(1, 0.4, 10).tolist()}}
    cells = _cells({"scratch": {250: [0.7, 0.7]}}, **falling)
    assert "its training loss still fell" in cautions.undertrained(cells, [], "top1")["scratch", 250]


def test_nothing_is_better_than_an_undertrained_baseline():
    cells = _cells({"scratch": {50: [0.5, 0.6, 0.55]}, "ssl": {50: [0.6, 0.69, 0.66]}})
    rows, short = summarise(cells, "scratch"), {("scratch", 50): "why"}
    (said,) = verdicts(rows, "scratch", "top1", (), short)
    assert said.endswith("not judged, as scratch looks undertrained.") and "better" not in said
    assert "better, the interval" in verdicts(rows, "scratch", "top1", (), {("ssl", 50): "why"})[0]
    (worse,) = verdicts(summarise(cells, "ssl"), "ssl", "top1", (), short)
    assert "not judged, as scratch" in worse


def test_the_difference_is_called_sharper_only_where_it_is():
    alike, apart = {50: [0.5, 0.6, 0.7]}, {50: [0.7, 0.6, 0.52]}
    gain = {50: [0.61, 0.7, 0.8]}

    def said(other):
        return _sharper(summarise(_cells({"scratch": alike, "ssl": other}), "scratch"), "scratch")

    assert said(gain) == "The difference is known better than either score."
    assert said(apart) == "Here the difference is not known better than the scores."
    assert "nothing is known" in said({50: [0.7]})
    cells = _cells({"scratch": {**alike, 90: [0.5, 0.6, 0.7]}, "ssl": {**gain, 90: apart[50]}})
    told = _sharper(summarise(cells, "scratch"), "scratch")
    assert told == "The difference is known better than either score for ssl with 50 labels, and not for the others."


def test_a_study_shows_what_costs_nothing(tmp_path):
    config = toy_config(labels=(30,), seeds=2, finetune={"lr": (1e-2,), "steps": 1, "epochs": 0})
    toy_run(config, tmp_path)
    words = (tmp_path / "summary.md").read_text()
    for name in ("majority class", "raw pixels, linear", "raw pixels, kNN", "random encoder, linear"):
        assert f"| {name} | " in words
    assert re.search(r"good is not (shown to be )?above raw pixels: with 30 labels ", words)  # one step of training
    told = json.loads((tmp_path / "cautions.json").read_text())
    assert {"arm": "good", "labels": 30} in [{k: c[k] for k in ("arm", "labels")} for c in told["not_above_pixels"]]
    rows = (tmp_path / "references.csv").read_text().splitlines()
    assert rows[0] == "reference,labels,metric,seeds,mean,half" and "majority class,30,top1,2,0.333333,0" in rows
    saved = json.loads((tmp_path / "references" / "30" / "1.json").read_text())
    train, test = toy_sources()
    drawn = np.load(tmp_path / "cells/scratch/30/1.npz")["indices"]
    fresh = References({"random encoder": toy_encoder()}, test.arrays(), test.labels, NAMES, Eval())
    again = fresh._compute(train.arrays()[drawn], train.labels[drawn], 1, None)
    assert saved["scores"] == pytest.approx({k: pytest.approx(v) for k, v in again.items()})


def test_results_are_named_by_their_data_and_settings(tmp_path):
    config = resolve(default("simclr"))
    usual = evaluation.conditions(config, "knn", config.data, None)
    assert evaluation.suffix(usual, evaluation.conditions(config, "knn", config.data, None)) == ""
    read = dataclasses.replace(config.data, workers=7)  # how, not which
    assert evaluation.suffix(usual, evaluation.conditions(config, "knn", read, None)) == ""
    tuned = dataclasses.replace(config, finetune=Finetune(steps=7))
    assert evaluation.suffix(usual, evaluation.conditions(tuned, "knn", config.data, None)) == ""  # of no concern
    other = dataclasses.replace(config, eval=Eval(knn_k=3))
    names = [evaluation.suffix(usual, evaluation.conditions(other, "knn", config.data, None))]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "new scans.csv").write_text("")
        data = Data(name="csv", path=str(tmp_path / folder / "new scans.csv"))
        names.append(evaluation.suffix(usual, evaluation.conditions(config, "knn", data, None)))
        names.append(evaluation.suffix(usual, evaluation.conditions(config, "knn", config.data, data)))
    assert len(set(names)) == 5 and re.fullmatch(r"-settings-[0-9a-f]{6}", names[0])
    assert all(re.fullmatch(r"-new_scans-[0-9a-f]{6}", name) for name in names[1:])
