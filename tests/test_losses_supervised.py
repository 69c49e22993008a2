"""Losses against labels, in float64 against loops, gradients against central differences."""

import jax
import numpy as np
import optax
import pytest

from ssl_jax.losses import binary_cross_entropy, cross_entropy


def softmax_by_hand(logits, label, weights):
    losses = []
    for row, y in zip(logits, label, strict=True):
        if y >= 0:
            losses.append(-weights[y] * (row[y] - np.log(sum(np.exp(v) for v in row))))
    return sum(losses) / len(losses)


def sigmoid_by_hand(logits, labels, weights):
    losses = []
    for b, k in np.ndindex(labels.shape):
        y, p = labels[b, k], 1 / (1 + np.exp(-logits[b, k]))
        if not np.isnan(y):
            losses.append(-(weights[1, k] * y * np.log(p) + weights[0, k] * (1 - y) * np.log(1 - p)))
    return sum(losses) / len(losses)


def several_labels(rng):
    labels = rng.choice([0, 1, 0.7, np.nan], (6, 4), p=[0.4, 0.3, 0.1, 0.2])
    labels[2], labels[:, 3] = np.nan, np.nan  # an image, and a class, of which nothing is known
    return labels, rng.uniform(0.5, 3, (2, 4))


CASES = {
    "one": (cross_entropy, softmax_by_hand, lambda rng: (np.array([0, 3, -1, 2, 2, -1]), rng.uniform(0.5, 3, 4))),
    "several": (binary_cross_entropy, sigmoid_by_hand, several_labels),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_loops(case, weighted):
    loss, by_hand, draw = CASES[case]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)) * 3
    labels, weights = draw(rng)
    given, weights = (weights, weights) if weighted else (None, np.ones_like(weights))
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(loss))(logits, labels, weights=given)
    np.testing.assert_allclose(value, by_hand(logits, labels, weights), rtol=1e-12)
    numeric, step = np.zeros_like(logits), 1e-5
    for place in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[place] += step
        down[place] -= step
        numeric[place] = (by_hand(up, labels, weights) - by_hand(down, labels, weights)) / (2 * step)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)


def test_without_weights_they_are_those_of_optax():
    rng = np.random.default_rng(1)
    logits, label, labels = (
        rng.normal(size=(5, 3)).astype(np.float32),
        rng.integers(0, 3, 5),
        rng.integers(0, 2, (5, 3)).astype(np.float32),
    )
    one = np.asarray(jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits, label))
    several = np.asarray(jax.jit(optax.sigmoid_binary_cross_entropy)(logits, labels))
    assert jax.jit(cross_entropy)(logits, label) == pytest.approx(float(one.mean()), rel=1e-6)
    assert jax.jit(binary_cross_entropy)(logits, labels) == pytest.approx(float(several.mean()), rel=1e-6)


@pytest.mark.parametrize("loss, labels", [(cross_entropy, [-1, -1]), (binary_cross_entropy, np.full((2, 3), np.nan))])
def test_nothing_known_is_no_loss_and_no_gradient(loss, labels):
    logits = np.float32([[9e4, -9e4, 0.0]] * 2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits, np.asarray(labels))
    assert value == 0 and not np.any(gradient)


def test_large_logits_stay_finite():
    logits, labels = np.float32([[200, -200]]), np.float32([[0, 1]])
    value, gradient = jax.jit(jax.value_and_grad(binary_cross_entropy))(logits, labels)
    assert value == 200 and gradient.tolist() == [[0.5, -0.5]]
