"""Losses in float64 against loops in NumPy, gradients against central differences of those loops, and known limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import losses


def unit(x):
    return x / math.sqrt(sum(float(v) * float(v) for v in x))


def nt_xent_by_hand(a, b, temperature):
    views = [unit(x) for x in a] + [unit(x) for x in b]
    total = 0.0
    for i, z in enumerate(views):
        partner = (i + len(a)) % len(views)
        others = sum(math.exp(float(z @ views[j]) / temperature) for j in range(len(views)) if j != i)
        total -= math.log(math.exp(float(z @ views[partner]) / temperature) / others)
    return total / len(views)


def info_nce_by_hand(q, k, queue, temperature):
    total = 0.0
    for query, key in zip(q, k):
        positive = math.exp(float(unit(query) @ unit(key)) / temperature)
        negative = sum(math.exp(float(unit(query) @ unit(n)) / temperature) for n in queue)
        total -= math.log(positive / (positive + negative))
    return total / len(q)


def cosine_by_hand(p, z):
    return -sum(float(unit(a) @ unit(b)) for a, b in zip(p, z)) / len(p)


def triplet_by_hand(a, p, n, margin):
    def distance(x, y):
        return math.sqrt(sum((float(u) - float(v) + 1e-6) ** 2 for u, v in zip(x, y)))

    return sum(max(0.0, distance(x, y) - distance(x, z) + margin) for x, y, z in zip(a, p, n)) / len(a)


def in_batch_info_nce_by_hand(q, k, temperature):
    total = 0.0
    for i, query in enumerate(q):
        odds = [math.exp(float(unit(query) @ unit(key)) / temperature) for key in k]
        total -= math.log(odds[i] / sum(odds))
    return total / len(q)


LABELS = np.int32([0, 1, 0, -1, -1])  # images of a class with two, a class with one, and two without a label


def sup_con_by_hand(a, b, temperature):
    views = [(unit(x), y if y >= 0 else f"image {i}") for x_ in (a, b) for i, (x, y) in enumerate(zip(x_, LABELS))]
    total = 0.0
    for i, (z, y) in enumerate(views):
        others = sum(math.exp(float(z @ w) / temperature) for j, (w, _) in enumerate(views) if j != i)
        found = [float(z @ w) / temperature for j, (w, other) in enumerate(views) if j != i and other == y]
        total -= sum(s - math.log(others) for s in found) / len(found)
    return total / len(views)


# loss, by hand, shapes, hyper-parameters, positions of arguments that get a gradient
CASES = {
    "nt_xent": (losses.nt_xent, nt_xent_by_hand, [(5, 4), (5, 4)], {"temperature": 0.3}, (0, 1)),
    "info_nce": (losses.info_nce, info_nce_by_hand, [(3, 4), (3, 4), (7, 4)], {"temperature": 0.2}, (0, 1, 2)),
    "negative_cosine": (losses.negative_cosine, cosine_by_hand, [(6, 3), (6, 3)], {}, (0,)),
    "in_batch_info_nce": (
        losses.in_batch_info_nce,
        in_batch_info_nce_by_hand,
        [(5, 4), (5, 4)],
        {"temperature": 0.4},
        (0,),
    ),
    "sup_con": (
        lambda a, b, temperature: losses.sup_con(a, b, jnp.asarray(LABELS), temperature=temperature),
        sup_con_by_hand,
        [(5, 4), (5, 4)],
        {"temperature": 0.3},
        (0, 1),
    ),
    "triplet": (losses.triplet, triplet_by_hand, [(6, 5), (6, 5), (6, 5)], {"margin": 0.7}, (0, 1, 2)),
}


def numeric_gradient(function, inputs, position, step=1e-5):
    """The gradient of function(*inputs) with respect to inputs[position], by central differences."""
    numeric = np.zeros_like(inputs[position])
    for place in np.ndindex(numeric.shape):
        moved = [x.copy() for x in inputs]
        moved[position][place] += step
        up = function(*moved)
        moved[position][place] -= 2 * step
        numeric[place] = (up - function(*moved)) / (2 * step)
    return numeric


@functools.cache
def value_and_gradients(name):
    loss, _, _, hyper, positions = CASES[name]
    return jax.jit(jax.value_and_grad(lambda *x: loss(*x, **hyper), argnums=positions))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_equal_loops(name, seed):
    _, by_hand, shapes, hyper, positions = CASES[name]
    generator = np.random.default_rng(seed)
    inputs = [generator.normal(size=shape) for shape in shapes]
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(name)(*inputs)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, by_hand(*inputs, **hyper), rtol=1e-12)
        for position, gradient in zip(positions, gradients):
            numeric = numeric_gradient(lambda *x: by_hand(*x, **hyper), inputs, position)
            np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_limits():
    @jax.jit
    def made(one, identity, many):
        return {
            "collapse: ln(2N - 1)": losses.nt_xent(one, one, temperature=0.5),
            "perfect alignment": losses.nt_xent(identity, identity, temperature=0.01),
            "collapse with a queue": losses.info_nce(one, one, many, temperature=0.1),
            "same direction": losses.negative_cosine(one, 3 * one),
            "opposite direction": losses.negative_cosine(one, -one),
            "margin": losses.triplet(one, one, one, margin=0.3),
            "far negative": losses.triplet(one, one, one + 9, margin=0.3),
            "collapse in the batch": losses.in_batch_info_nce(one, one, temperature=0.1),
            "collapse of classes": losses.sup_con(one, one, jnp.arange(4), temperature=0.1),
            "one image in each class": losses.sup_con(identity, 2 * identity, jnp.arange(6), temperature=0.2),
            "without classes": losses.nt_xent(identity, identity, temperature=0.2),
        }

    made = {name: float(x) for name, x in made(*map(np.float32, (np.ones((4, 6)), np.eye(6), np.ones((9, 6))))).items()}
    assert made["far negative"] == 0
    assert made["perfect alignment"] == pytest.approx(0, abs=1e-5)
    assert made["margin"] == pytest.approx(0.3, rel=1e-5)
    wanted = {
        "collapse: ln(2N - 1)": math.log(7),
        "collapse with a queue": math.log(10),
        "same direction": -1,
        "opposite direction": 1,
        "collapse in the batch": math.log(4),
        "collapse of classes": math.log(7),
        "one image in each class": made["without classes"],
    }
    assert {name: made[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)


def test_no_gradient_into_the_target():
    z = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    for loss in (losses.negative_cosine, functools.partial(losses.in_batch_info_nce, temperature=0.2)):
        assert not np.any(jax.jit(jax.grad(loss, argnums=1))(z, z + 1))


@pytest.mark.parametrize("name", CASES)
def test_zero_inputs_are_finite(name):
    made = value_and_gradients(name)(*(np.zeros(shape, np.float32) for shape in CASES[name][2]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(made))
