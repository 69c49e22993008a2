"""Losses without negatives and with clusters, in float64 against loops, gradients against central differences."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import numeric_gradient

from ssl_jax import losses


def unit(x):
    return x / math.sqrt(sum(float(v) * float(v) for v in x))


def variance(column, ddof):
    mean = sum(column) / len(column)
    return sum((v - mean) ** 2 for v in column) / (len(column) - ddof)


def covariance(a, b, ddof):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b)) / (len(a) - ddof)


def barlow_by_hand(a, b, off_diagonal):
    total = 0.0
    for i, j in itertools.product(range(a.shape[1]), repeat=2):
        scale = math.sqrt((variance(a[:, i], 0) + 1e-5) * (variance(b[:, j], 0) + 1e-5))
        c = covariance(a[:, i], b[:, j], 0) / scale
        total += (c - 1) ** 2 if i == j else off_diagonal * c * c
    return total


def hinge_by_hand(z):
    return sum(max(0.0, 1 - math.sqrt(variance(column, 1) + 1e-4)) for column in z.T) / z.shape[1]


def redundancy_by_hand(z):
    pairs = itertools.permutations(range(z.shape[1]), 2)
    return sum(covariance(z[:, i], z[:, j], 1) ** 2 for i, j in pairs) / z.shape[1]


def mse_by_hand(a, b):
    return sum(float(d) ** 2 for d in (a - b).ravel()) / a.size


def vicreg_by_hand(a, b, invariance, variance, covariance):
    spread = (hinge_by_hand(a) + hinge_by_hand(b)) / 2
    return (
        invariance * mse_by_hand(a, b)
        + variance * spread
        + covariance * (redundancy_by_hand(a) + redundancy_by_hand(b))
    )


def vicregl_by_hand(*arrays, alpha, matches, invariance, variance, covariance):
    count = len(arrays) // 3
    z, maps, positions = arrays[:count], arrays[count : 2 * count], arrays[2 * count :]
    pairs = [(i, j) for i in (0, 1) for j in range(count) if i != j]
    whole = invariance * sum(mse_by_hand(z[i], z[j]) for i, j in pairs) / len(pairs)
    whole += variance * sum(map(hinge_by_hand, z)) / count + covariance * sum(map(redundancy_by_hand, z)) / count

    def matched(i, j, key, most):
        """For each image the pairs of places: each of view i with its nearest of view j, the `most` closest ones."""
        rows = []
        for b in range(len(maps[i])):
            found = []
            for p, here in enumerate(key[i][b]):
                distances = [math.dist(here, there) for there in key[j][b]]
                found.append((min(distances), p, distances.index(min(distances))))
            rows.append(sorted((p, q) for _, p, q in sorted(found)[:most]))
        a = np.array([[maps[i][b][p] for p, _ in row] for b, row in enumerate(rows)])
        b = np.array([[maps[j][b][q] for _, q in row] for b, row in enumerate(rows)])
        places = range(a.shape[1])
        terms = [vicreg_by_hand(a[:, p], b[:, p], invariance, variance, covariance / 2) for p in places]
        return sum(terms) / len(terms)

    local = 0.0
    for i, j in pairs:
        for one, other in ((i, j), (j, i)):
            local += matched(one, other, maps, None) / 2
            local += matched(one, other, positions, matches[0 if one < 2 else 1]) / 2
    return alpha * whole + (1 - alpha) * local / len(pairs)


def tico_by_hand(z, target, old, beta, rho, fixed=None):
    """`fixed`: the z from which the covariance comes, for central differences of the others alone."""
    z, target = [unit(x) for x in z], [unit(x) for x in target]
    m = beta * old + (1 - beta) * sum(np.outer(x, x) for x in (z if fixed is None else map(unit, fixed))) / len(z)
    loss = 1 - sum(float(a @ b) for a, b in zip(z, target)) / len(z)
    return loss + rho * sum(float(x @ m @ x) for x in z) / len(z)


def softmax(row):
    powers = [math.exp(v - max(row)) for v in row]
    return [p / sum(powers) for p in powers]


def swapped_by_hand(logits, targets):
    terms = []
    for t, target in enumerate(targets):
        for v, view in enumerate(logits):
            if v != t:
                each = [-sum(q * math.log(p) for q, p in zip(a, softmax(b))) for a, b in zip(target, view)]
                terms.append(sum(each) / len(each))
    return sum(terms) / len(terms)


def swav_by_hand(a, b, c, q_a, q_b, temperature):
    return swapped_by_hand([a / temperature, b / temperature, c / temperature], [q_a, q_b])


def dino_by_hand(a, b, c, t_a, t_b, centre, temperature, teacher_temperature):
    targets = [[softmax((row - centre) / teacher_temperature) for row in t] for t in (t_a, t_b)]
    return swapped_by_hand([a / temperature, b / temperature, c / temperature], targets)


def sinkhorn_by_hand(scores, epsilon, iterations):
    """The plain iteration on a matrix [K, B]."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(axis=1, keepdims=True) / q.shape[0]
        q = q / q.sum(axis=0, keepdims=True) / q.shape[1]
    return (q / q.sum(axis=0, keepdims=True)).T


WEIGHTS = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
MAPS = [(3, 3)] * 3 + [(3, 4, 2), (3, 4, 2), (3, 3, 2)] * 2


def vicregl(*arrays, **hyper):
    return losses.vicregl(arrays[:3], arrays[3:6], arrays[6:], **hyper)


# loss, by hand, shapes, hyper-parameters, positions of arguments that get a gradient
CASES = {
    "barlow_twins": (losses.barlow_twins, barlow_by_hand, [(6, 4), (6, 4)], {"off_diagonal": 0.1}, (0, 1)),
    "barlow_twins, wide": (losses.barlow_twins, barlow_by_hand, [(4, 7), (4, 7)], {"off_diagonal": 0.1}, (0, 1)),
    "vicreg": (losses.vicreg, vicreg_by_hand, [(6, 4), (6, 4)], WEIGHTS, (0, 1)),
    "vicreg, wide": (losses.vicreg, vicreg_by_hand, [(4, 7), (4, 7)], WEIGHTS, (0, 1)),
    "vicregl": (vicregl, vicregl_by_hand, MAPS, {**WEIGHTS, "alpha": 0.75, "matches": (3, 2)}, range(6)),
    "tico": (losses.tico, tico_by_hand, [(6, 4), (6, 4), (4, 4)], {"beta": 0.9, "rho": 8.0}, (0,)),
    "swav": (
        lambda a, b, c, q_a, q_b, **hyper: losses.swav([a, b, c], [q_a, q_b], **hyper),
        swav_by_hand,
        [(5, 4)] * 5,
        {"temperature": 0.4},
        (0, 1, 2),
    ),
    "dino": (
        lambda a, b, c, t_a, t_b, centre, **hyper: losses.dino([a, b, c], [t_a, t_b], centre, **hyper),
        dino_by_hand,
        [(5, 4)] * 5 + [(4,)],
        {"temperature": 0.5, "teacher_temperature": 0.3},
        (0, 1, 2),
    ),
    "negative_cosine_with_gradient": (
        lambda p, z: losses.negative_cosine(p, z, stop_gradient=False),
        lambda p, z: -sum(float(unit(a) @ unit(b)) for a, b in zip(p, z)) / len(p),
        [(6, 3), (6, 3)],
        {},
        (0, 1),
    ),
}


@functools.cache
def value_and_gradients(name):
    loss, _, _, hyper, positions = CASES[name]
    return jax.jit(jax.value_and_grad(lambda *x: loss(*x, **hyper), argnums=tuple(positions)))


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
    hyper = {**hyper, "fixed": inputs[0]} if name == "tico" else hyper
    for position, gradient in zip(positions, gradients):
        numeric = numeric_gradient(lambda *x: by_hand(*x, **hyper), inputs, position)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_zero_inputs_are_finite(name):
    made = value_and_gradients(name)(*(np.zeros(shape, np.float32) for shape in CASES[name][2]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(made))


def test_limits():
    one, identity = np.ones((4, 6), np.float32), np.eye(6, dtype=np.float32)
    barlow, vicreg = jax.jit(losses.barlow_twins), jax.jit(functools.partial(losses.vicreg, **WEIGHTS))
    # Collapsed: nothing correlates, so the diagonal misses 1 in each dimension.
    assert barlow(one, one, off_diagonal=5e-3) == pytest.approx(6, rel=1e-6)
    # White and equal: only the 1e-5 in the normalisation is left.
    signs = np.float32([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    assert barlow(signs, signs, off_diagonal=1.0) == pytest.approx(0, abs=1e-8)
    assert vicreg(one, one) == pytest.approx(25 * 0.99, rel=1e-6)
    assert vicreg(signs, signs) == 0
    aligned = jax.jit(losses.tico)(identity, identity, np.zeros_like(identity), beta=0.9, rho=0.0)
    assert aligned == pytest.approx(0, abs=1e-6)
    assert jax.jit(losses.swapped)([one] * 3, [one / 6] * 2) == pytest.approx(math.log(6), rel=1e-6)


def test_targets_get_no_gradient():
    z = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
    q = np.array([softmax(row) for row in 7 * z], np.float32)
    zero = {
        "swav": jax.jit(jax.grad(lambda q: losses.swav([z, z + 1], [q, q], temperature=0.1)))(q),
        "dino": jax.jit(
            jax.grad(lambda t: losses.dino([z, z], [t, t], z[0], temperature=0.1, teacher_temperature=0.1))
        )(q),
        "tico": jax.jit(jax.grad(lambda t: losses.tico(z, t, jnp.eye(4), beta=0.9, rho=8.0)))(q),
    }
    for name, gradient in zero.items():
        assert not np.any(gradient), name


@pytest.mark.parametrize("iterations", [0, 1, 3, 20])
def test_sinkhorn_equals_the_matrix_iteration(iterations):
    scores = np.random.default_rng(iterations).uniform(-1, 1, (7, 5))
    with jax.enable_x64(True):
        q = losses.sinkhorn(jnp.asarray(scores), epsilon=0.05, iterations=iterations)
        np.testing.assert_allclose(q, sinkhorn_by_hand(scores, 0.05, iterations), rtol=1e-10, atol=1e-14)


def test_sinkhorn_is_balanced_and_does_not_overflow():
    """Rows sum to 1 and columns to B / K; exp(1000 / 0.05) is far outside float32."""
    scores = np.float32(np.random.default_rng(0).uniform(-1, 1, (12, 4)))
    q = np.asarray(losses.sinkhorn(scores, epsilon=0.5, iterations=200))
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(q.sum(axis=0), 3, rtol=1e-4)
    q = np.asarray(losses.sinkhorn(1000 * scores, epsilon=0.05, iterations=3))
    assert np.all(np.isfinite(q))
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_gives_identical_images_a_uniform_assignment():
    """The collapse that SwAV's balance cannot prevent: its sign is an entropy of ln K for each image."""
    q = losses.sinkhorn(jnp.tile(jnp.linspace(-1, 1, 5), (8, 1)), epsilon=0.05, iterations=3)
    np.testing.assert_allclose(q, 0.2, rtol=1e-5)


def test_vicreg_with_places_is_the_mean_over_places():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3, 4))
    with jax.enable_x64(True):
        whole = jax.jit(functools.partial(losses.vicreg, **WEIGHTS))(a, b)
        np.testing.assert_allclose(whole, np.mean([vicreg_by_hand(a[:, p], b[:, p], **WEIGHTS) for p in range(3)]))


def test_tico_covariance_is_the_moving_average():
    z, old = np.random.default_rng(0).normal(size=(6, 4)), np.eye(4)
    with jax.enable_x64(True):
        new = jax.jit(losses.tico_covariance)(z, old, beta=0.7)
        np.testing.assert_allclose(new, 0.7 * old + 0.3 * np.mean([np.outer(unit(x), unit(x)) for x in z], axis=0))
