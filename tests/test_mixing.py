"""Mixup, CutMix and smoothing against loops in float64; what fine-tuning makes of them."""

import dataclasses

import jax
import numpy as np
import pytest
from test_evaluate_finetune import SETTINGS, several
from toy_encoder import toy_encoder, toy_images

from ssl_jax.errors import UserError
from ssl_jax.evaluate import finetune, metrics, self_train
from ssl_jax.evaluate.mixing import Mix, draw_mix, least_loss, loss_of_targets, mix_images, soft_labels
from ssl_jax.evaluate.tuning_step import loss_of_labels

RNG = np.random.default_rng(0)
IMAGES, LOGITS = RNG.random((5, 6, 6, 2)), RNG.normal(size=(5, 4))
LABELS = np.array([2, 0, 3, 3, 1])
MANY = np.where(RNG.random((5, 4)) < 0.3, np.nan, RNG.integers(0, 2, (5, 4)).astype(float))
UP = Mix(np.float64(0.3), np.zeros(4, int))  # mixup
CUT = Mix(np.float64(1 - 8 / 36), np.array([1, 5, 4, 6]))  # CutMix: 4 x 2 of 36 px


def log_softmax(row):
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def loss_by_loops(logits, labels, smoothing, share, weights):
    """Mean over images of what each of the two labels costs, weighted by its share."""
    total, classes = 0.0, logits.shape[1]
    for i, row in enumerate(logits):
        for label, part in ((labels[i], share), (labels[len(labels) - 1 - i], 1 - share)):
            for k, log_p in enumerate(log_softmax(row)):
                target = (k == label) * (1 - smoothing) + smoothing / classes
                total -= part * weights[k] * target * log_p
    return total / len(logits)


def many_by_loops(logits, labels, smoothing, share, weights):
    terms = []
    for i, row in enumerate(logits):
        for k, z in enumerate(row):
            a, b = (labels[j, k] * (1 - smoothing) + smoothing / 2 for j in (i, len(labels) - 1 - i))
            if np.isnan(a) or np.isnan(b):  # not known of both
                continue
            y, p = share * a + (1 - share) * b, 1 / (1 + np.exp(-z))
            terms.append(-weights[1][k] * y * np.log(p) - weights[0][k] * (1 - y) * np.log(1 - p))
    return np.mean(terms)


@pytest.mark.parametrize("mix", [UP, CUT])
def test_images_are_mixed_with_the_reversed_batch(mix):
    with jax.enable_x64(True):
        made = np.asarray(mix_images(IMAGES, mix))
    for i, image in enumerate(IMAGES):
        other = IMAGES[len(IMAGES) - 1 - i]
        for y in range(6):
            for x in range(6):
                want = 0.3 * image[y, x] + 0.7 * other[y, x]
                if mix is CUT:
                    want = other[y, x] if 1 <= y < 5 and 4 <= x < 6 else image[y, x]
                np.testing.assert_allclose(made[i, y, x], want, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [None, UP, CUT])
def test_losses_equal_loops(mix, smoothing, weighted):
    share = 1.0 if mix is None else float(mix.share)
    one, both = np.array([0.5, 2.0, 1.0, 1.5]), np.array([[0.5, 1.0, 0.7, 2.0], [3.0, 1.0, 1.3, 0.2]])
    cases = [(LABELS, loss_by_loops, one, np.ones(4)), (MANY, many_by_loops, both, np.ones((2, 4)))]
    for labels, loops, weights, equal in cases:
        # Without mixing, what is unknown of the reversed batch does not matter.
        known = labels if mix is not None or labels.ndim == 1 else np.where(np.isnan(labels), 0, labels)
        with jax.enable_x64(True):
            given = weights if weighted else None
            loss, above = loss_of_labels(LOGITS, known, given, smoothing, mix)
        want = loops(LOGITS, known, smoothing, share, weights if weighted else equal)
        np.testing.assert_allclose(loss, want, rtol=1e-12)
        assert (above < loss) == bool(smoothing or mix is not None)


def test_smoothing_is_that_of_the_formula():
    with jax.enable_x64(True):
        made = loss_of_labels(LOGITS, LABELS, None, 0.1)[0]
    log_p = np.array([log_softmax(row) for row in LOGITS])
    want = 0.9 * -log_p[np.arange(5), LABELS].mean() + 0.1 * -log_p.mean()  # timm's LabelSmoothingCrossEntropy
    np.testing.assert_allclose(made, want, rtol=1e-12)


@pytest.mark.parametrize("labels", [LABELS, MANY])
def test_the_least_loss_is_a_minimum(labels):
    several = labels.ndim == 2
    weights = RNG.random((2, 4)) + 0.5 if several else RNG.random(4) + 0.5
    with jax.enable_x64(True):
        targets = soft_labels(labels, 4, 0.2, UP)
        least = float(least_loss(targets, weights, several))
        t, w = np.asarray(targets), np.asarray(weights)
        best = np.log(w[1] * t) - np.log(w[0] * (1 - t)) if several else np.log(w * t)
        best = np.where(np.isnan(best), 0.0, best)
        value, slope = jax.value_and_grad(loss_of_targets)(best, targets, weights, several)
        np.testing.assert_allclose(value, least, rtol=1e-9)
        np.testing.assert_allclose(slope, 0, atol=1e-12)
        for _ in range(20):
            assert loss_of_targets(best + 0.3 * RNG.normal(size=best.shape), targets, weights, several) > least


def test_what_is_drawn():
    made = [draw_mix(0.8, 1.0, 32, 5, step) for step in range(3000)]
    cut = np.array([mix.box.any() for mix in made])
    assert cut.mean() == pytest.approx(0.5, abs=0.04)
    shares = np.array([mix.share for mix in made])
    assert shares[~cut].mean() == pytest.approx(0.5, abs=0.03)
    assert shares[~cut].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(a, a)
    for mix in np.array(made, dtype=object)[cut]:
        top, bottom, left, right = mix[1]
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32
        assert mix[0] == pytest.approx(1 - (bottom - top) * (right - left) / 32**2)
    again = draw_mix(0.8, 1.0, 32, 5, 7)
    assert again.share == made[7].share and (again.box == made[7].box).all()
    assert draw_mix(0.8, 1.0, 32, 6, 7).share != made[7].share
    assert not any(draw_mix(0.8, 0.0, 32, 5, step).box.any() for step in range(50))
    alone = [draw_mix(0.0, 1.0, 32, 5, step) for step in range(2000)]
    assert np.mean([mix.box.any() for mix in alone]) > 0.99  # now and then, the box is of no pixel
    assert all(mix.share == 1 for mix in alone if not mix.box.any())


@pytest.mark.parametrize("how", [{"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}, {"cutmix": 1.0}])
def test_it_learns_from_mixtures(how):
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, head="zero", class_weights="balanced", **how)
    made, again = (finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0) for _ in range(2))
    test_images, truth = toy_images(300, seed=7)
    logits = made.logits(test_images)
    assert (logits.argmax(1) == truth).mean() > 0.8 and made.losses is None
    np.testing.assert_array_equal(logits, again.logits(test_images))


def test_several_labels_are_learnt_from_mixtures():
    images, labels = several()
    settings = dataclasses.replace(SETTINGS, head="zero", mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    made = finetune(toy_encoder(), images, labels, classes=5, settings=settings, seed=0)
    test_images, truth = several(seed=7)
    assert metrics(made.logits(test_images), truth, list("abcde"))["macro_auc"] > 0.85
    assert not made.params["head"]["w"][:, 3].any()  # of which nothing is known


def test_with_smoothing_the_loss_told_is_what_can_be_learnt():
    images, labels = toy_images()
    settings = dataclasses.replace(SETTINGS, steps=200, label_smoothing=0.3)
    made = finetune(toy_encoder(), images, labels, classes=3, settings=settings, seed=0)
    assert made.losses[-20:].mean() < 0.15  # although the loss itself cannot fall below half of guessing


def test_a_teacher_knows_no_mixtures():
    images, labels = toy_images(20)
    settings = dataclasses.replace(SETTINGS, unlabelled="all", teacher="propagated", cutmix=1.0)
    with pytest.raises(UserError, match=r"^config.finetune.cutmix=1: .*; allowed with unlabelled: 0$"):
        self_train(None, toy_encoder(), images, labels, images, classes=3, settings=settings, seed=0)
