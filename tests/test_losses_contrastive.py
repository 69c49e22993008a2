"""Losses with mined triplets, memory banks and several spaces: float64 against loops in plain Python, and limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import numeric_gradient, unit

from ssl_jax import losses

LABEL = np.int32([0, 1, 0, 2, 1, -1, 0, 1, -1])  # class 2 has one example, two have no label


def mined_by_hand(z, margin, mining):
    def distance(i, j):
        return math.sqrt(sum((float(u) - float(v) + 1e-6) ** 2 for u, v in zip(z[i], z[j])))

    terms = []
    for a in range(len(z)):
        others = [n for n in range(len(z)) if min(LABEL[a], LABEL[n]) >= 0 and LABEL[n] != LABEL[a]]
        for p in range(len(z)):
            if p == a or LABEL[p] != LABEL[a] or LABEL[a] < 0:
                continue
            chosen = others
            if mining == "hard":
                chosen = [min(others, key=lambda n: distance(a, n))]
            if mining == "semi_hard":
                beyond = [n for n in others if distance(a, n) > distance(a, p)]
                nearest = min(beyond, key=lambda n: distance(a, n)) if beyond else None
                chosen = [max(others, key=lambda n: distance(a, n)) if nearest is None else nearest]
            terms += [max(0.0, distance(a, p) - distance(a, n) + margin) for n in chosen]
    return sum(terms) / len(terms)


def info_nce_with_own_by_hand(q, k, queue, own, temperature):
    total = 0.0
    for query, key, mine in zip(q, k, own):
        odds = [math.exp(float(unit(query) @ unit(v)) / temperature) for v in (key, *queue, *mine)]
        total -= math.log(odds[0] / sum(odds))
    return total / len(q)


INDEX = np.int32([4, 0, 4])


def indexed_by_hand(q, keys, temperature):
    total = 0.0
    for query, i in zip(q, INDEX):
        odds = [math.exp(float(unit(query) @ unit(v)) / temperature) for v in keys]
        total -= math.log(odds[i] / sum(odds))
    return total / len(q)


def nce_by_hand(q, positive, noise, normalizer, examples, temperature):
    def h(query, row):
        p = math.exp(float(unit(query) @ row) / temperature) / normalizer
        return p / (p + len(noise) / examples)

    each = [
        -math.log(h(query, own)) - sum(math.log(1 - h(query, row)) for row in noise) for query, own in zip(q, positive)
    ]
    return sum(each) / len(each)


def nce_normalizer_by_hand(q, positive, noise, examples, temperature):
    odds = [math.exp(float(unit(query) @ r) / temperature) for query, p in zip(q, positive) for r in (p, *noise)]
    return examples * sum(odds) / len(odds)


def mined(mining):
    return (
        lambda z, margin: losses.mined_triplet(z, jnp.asarray(LABEL), margin=margin, mining=mining),
        lambda z, margin: mined_by_hand(z, margin, mining),
        [(9, 4)],
        {"margin": 0.9},
    )


# loss, by hand, shapes, hyper-parameters; every array gets a gradient
CASES = {f"mined_triplet {mining}": mined(mining) for mining in ("all", "hard", "semi_hard")} | {
    "info_nce with own negatives": (
        losses.info_nce,
        info_nce_with_own_by_hand,
        [(3, 4), (3, 4), (7, 4), (3, 2, 4)],
        {"temperature": 0.3},
    ),
    "indexed_info_nce": (
        lambda q, keys, temperature: losses.indexed_info_nce(q, keys, jnp.asarray(INDEX), temperature=temperature),
        indexed_by_hand,
        [(3, 4), (6, 4)],
        {"temperature": 0.3},
    ),
    "nce": (
        losses.nce,
        nce_by_hand,
        [(3, 4), (3, 4), (6, 4)],
        {"normalizer": 30.0, "examples": 20, "temperature": 0.5},
    ),
    "nce_normalizer": (
        losses.nce_normalizer,
        nce_normalizer_by_hand,
        [(3, 4), (3, 4), (6, 4)],
        {"examples": 20, "temperature": 0.5},
    ),
}


@functools.cache
def value_and_gradients(name):
    loss, _, _, hyper = CASES[name]
    return jax.jit(jax.value_and_grad(lambda x: loss(*x, **hyper)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_equal_loops(name, seed):
    _, by_hand, shapes, hyper = CASES[name]
    generator = np.random.default_rng(seed)
    inputs = [generator.normal(size=shape) for shape in shapes]
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(name)(inputs)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, by_hand(*inputs, **hyper), rtol=1e-12)
        for position, gradient in enumerate(gradients):
            numeric = numeric_gradient(lambda *x: by_hand(*x, **hyper), inputs, position)
            np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_zero_inputs_are_finite(name):
    made = value_and_gradients(name)([np.zeros(shape, np.float32) for shape in CASES[name][2]])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize("mining", ["all", "hard", "semi_hard"])
def test_limits_of_mined_triplets(mining):
    mined = jax.jit(functools.partial(losses.mined_triplet, margin=0.3, mining=mining))

    def loss(z, label):
        return mined(np.float32(z), np.array(label))

    two = [[0.0], [0.0], [5.0], [5.0]]
    assert loss(np.ones((4, 2)), [0, 0, 1, 1]) == pytest.approx(0.3, rel=1e-5)  # collapsed: the margin
    assert loss(two, [0, 0, 1, 1]) == 0  # apart by more than the margin
    crossed = {"all": 2.8, "hard": 5.3, "semi_hard": 0.3}  # no negative lies beyond the positive, the farthest at it
    assert loss(two, [0, 1, 0, 1]) == pytest.approx(crossed[mining], rel=1e-5)
    for alone in ([0, 1, 2, 3], [0, 0, 0, 0], [-1, -1, -1, -1], [0, 0, -1, -1]):  # no pair with a negative
        assert loss(two, alone) == 0


def test_semi_hard_takes_the_farthest_negative_where_none_lies_beyond_the_positive():
    z, label = np.float32([[0.0], [4.0], [1.0], [2.0]]), np.array([0, 0, 1, -1])
    loss = jax.jit(functools.partial(losses.mined_triplet, margin=0.5, mining="semi_hard"))
    # From 0 the positive lies at 4 and the one negative at 1: 4 - 1 + m. From 4: 4 - 3 + m. The pair of 1 is alone.
    assert loss(z, label) == pytest.approx(2.5, rel=1e-5)


def test_limits_of_memory_banks():
    one, many, identity = map(np.float32, (np.ones((4, 6)), np.ones((9, 6)), np.eye(6)))
    indexed, nce = jax.jit(losses.indexed_info_nce), jax.jit(losses.nce)
    assert indexed(one, many, np.arange(4), temperature=0.07) == pytest.approx(math.log(9))
    assert indexed(identity, identity, np.arange(6), temperature=0.01) == pytest.approx(0, abs=1e-5)
    aligned = {"normalizer": 6 * math.exp(20) / 6, "examples": 6, "temperature": 0.05}
    # Aligned with the positive (P = 1) and orthogonal to the noise (P = exp(-20)): h = 1 / (1 + 2 / 6).
    assert nce(identity[:4], identity[:4], identity[4:], **aligned) == pytest.approx(-math.log(0.75), rel=1e-4)


def test_nce_at_a_low_temperature_is_finite():
    """exp(1 / 0.01) is no float32; the loss never forms it."""
    q = np.eye(4, dtype=np.float32)
    value, gradient = jax.jit(jax.value_and_grad(losses.nce))(q, q, -q, normalizer=1.0, examples=10, temperature=0.01)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_own_negatives_count_like_the_queue():
    """Moving negatives from the queue to `own` changes nothing."""
    rng, loss = np.random.default_rng(0), jax.jit(functools.partial(losses.info_nce, temperature=0.2))
    q, k, queue = (np.float32(rng.normal(size=shape)) for shape in [(3, 4), (3, 4), (5, 4)])
    own = np.broadcast_to(queue[None, :2], (3, 2, 4))
    whole = loss(q, k, queue)
    assert loss(q, k, queue[2:], own) == pytest.approx(float(whole), rel=1e-6)


CHUNKED = {
    "nt_xent": lambda a, b, c: losses.nt_xent(a, b, temperature=0.2),
    "info_nce": lambda a, b, c: losses.info_nce(a, b, c, temperature=0.2),
    "indexed_info_nce": lambda a, b, c: losses.indexed_info_nce(a, c, jnp.arange(len(a))[::-1], temperature=0.2),
    "sup_con": lambda a, b, c: losses.sup_con(a, b, jnp.arange(len(a)) % 3 - 1, temperature=0.2),
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_in_chunks_as_in_one_piece(name, dtype, monkeypatch):
    """Value and gradients; 150 and 300 similarities a row are no multiple of the 128 that are the least chunk."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):
        given = [rng.normal(size=(n, 5)).astype(dtype) for n in (150, 150, 301)]
        whole, in_one = jax.jit(jax.value_and_grad(CHUNKED[name], (0, 1, 2)))(*given)
        monkeypatch.setattr("ssl_jax.losses.contrastive.DENSE_UP_TO", 150)
        chunked = jax.jit(jax.value_and_grad(lambda *x: CHUNKED[name](*x), (0, 1, 2))).trace(*given)  # traced anew
        value, gradients = chunked.lower().compile()(*given)
        text = str(chunked.jaxpr)
    assert "scan" in text and "300,300" not in text and "150,301" not in text
    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(value, whole, rtol=tolerance)
    for a, b in zip(gradients, in_one):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
