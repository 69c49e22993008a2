"""Losses of DINOv2, iBOT, MSN, LeJEPA and I-JEPA in float64 against loops, gradients against central differences."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import numeric_gradient, unit

from ssl_jax import losses
from ssl_jax.losses import prototypes

WEIGHTS = np.array([[[0.0, 0.3, 0.2], [0.1, 0.0, 0.4]]] * 4) * np.arange(1, 5)[:, None, None]
TOKENS = np.array([[True, False, True], [True, True, False]])


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def logits(row, table, temperature):
    return [float(row @ p) / temperature for p in table]


def cross_entropy_by_hand(student, teacher, table, moved, shift):
    total = 0.0
    for r, t, v in np.ndindex(WEIGHTS.shape):
        q = softmax([x + float(s) for x, s in zip(logits(teacher[r, t], moved, 0.3), shift)])
        p = softmax(logits(student[r, v], table, 0.5))
        total -= WEIGHTS[r, t, v] * sum(a * math.log(b) for a, b in zip(q, p))
    return total


def koleo_by_hand(x):
    z, total = [unit(row) for row in x], 0.0
    for i, a in enumerate(z):
        nearest = max((j for j in range(len(z)) if j != i), key=lambda j: float(a @ z[j]))
        total -= math.log(math.sqrt(sum((float(d) + 1e-8) ** 2 for d in a - z[nearest])) + 1e-8)
    return total / len(z)


def sig_reg_by_hand(z, directions, knots=17):
    total = 0.0
    for direction in directions:
        for n in range(knots):
            t = 3 * n / (knots - 1)
            x = [t * float(row @ unit(direction)) for row in z]
            real, imaginary = sum(map(math.cos, x)) / len(x), sum(map(math.sin, x)) / len(x)
            normal = math.exp(-t * t / 2)
            width = 3 / (knots - 1) * (1 if n in (0, knots - 1) else 2)
            total += len(z) * width * normal * ((real - normal) ** 2 + imaginary**2)
    return total / len(directions)


def lejepa_by_hand(z, directions):
    centre = sum(z) / len(z)
    apart = sum(float(d) ** 2 for view in z for d in (view - centre).ravel()) / z.size
    return 0.9 * apart + 0.1 * sum(sig_reg_by_hand(view, directions) for view in z) / len(z)


def msn_by_hand(a, b, target):
    q, views = [softmax(row) for row in target], [[softmax(row) for row in s] for s in (a, b)]
    pairs = [(t, p) for view in views for t, p in zip(q, view)]
    error = -sum(x * math.log(y) for t, p in pairs for x, y in zip(t, p)) / len(pairs)
    mean = [sum(p[k] for _, p in pairs) / len(pairs) for k in range(len(q[0]))]
    return error + 0.7 * (math.log(len(mean)) + sum(m * math.log(m) for m in mean))


def smooth_by_hand(prediction, target):
    errors = []
    for place in zip(*np.nonzero(TOKENS)):
        d = [abs(float(x)) for x in prediction[place] - target[place]]
        errors.append(sum(x * x / 2 if x < 1 else x - 0.5 for x in d) / len(d))
    return sum(errors) / len(errors)


# loss, by hand, shapes, positions of arguments that get a gradient
CASES = {
    "prototype_cross_entropy": (
        lambda s, t, table, moved, shift: losses.prototype_cross_entropy(
            s, t, jnp.asarray(WEIGHTS, s.dtype), table, moved, shift, temperature=0.5, teacher_temperature=0.3
        ),
        cross_entropy_by_hand,
        [(4, 3, 5), (4, 2, 5), (6, 5), (6, 5), (6,)],
        (0, 2),
    ),
    "koleo": (losses.koleo, koleo_by_hand, [(6, 4)], (0,)),
    "sig_reg": (losses.sig_reg, sig_reg_by_hand, [(5, 3), (4, 3)], (0,)),
    "lejepa": (lambda z, d: losses.lejepa(z, d, weight=0.1)[0], lejepa_by_hand, [(2, 5, 3), (4, 3)], (0,)),
    "msn": (
        lambda a, b, t: losses.msn([a, b], jax.nn.softmax(t), weight=0.7)[0],
        msn_by_hand,
        [(5, 4), (5, 4), (5, 4)],
        (0, 1),
    ),
    "smooth_l1": (
        lambda p, t: losses.smooth_l1(p, t, jnp.asarray(TOKENS)),
        smooth_by_hand,
        [(2, 3, 4), (2, 3, 4)],
        (0,),
    ),
}
TARGETS = {"prototype_cross_entropy": (1, 3, 4), "msn": (2,), "smooth_l1": (1,)}  # get none


@functools.cache
def value_and_gradients(name):
    loss, _, shapes, _ = CASES[name]
    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(shapes)))))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_value_and_gradient_equal_loops(name, seed):
    _, by_hand, shapes, positions = CASES[name]
    generator = np.random.default_rng(seed)
    inputs = [generator.normal(size=shape) * 1.5 for shape in shapes]
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(name)(*inputs)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, by_hand(*inputs), rtol=1e-12)
    for position in positions:
        numeric = numeric_gradient(by_hand, inputs, position)
        np.testing.assert_allclose(gradients[position], numeric, rtol=1e-6, atol=1e-8)
    for position in TARGETS.get(name, ()):
        assert not np.any(gradients[position])


@pytest.mark.parametrize("name", CASES)
def test_zero_inputs_are_finite(name):
    made = value_and_gradients(name)(*(np.zeros(shape, np.float32) for shape in CASES[name][2]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(made))


def drawn(rows):
    generator = np.random.default_rng(3)
    return generator.normal(size=(rows, 5)), generator.normal(size=(7, 5)), generator.uniform(size=rows) < 0.6


def test_the_shift_gives_what_sinkhorn_assigns_to_the_rows_that_count():
    x, table, where = drawn(12)
    with jax.enable_x64(True):
        shift = jax.jit(functools.partial(losses.sinkhorn_shift, temperature=0.4))(x, table, where)
        want = jax.jit(functools.partial(losses.sinkhorn, epsilon=0.4, iterations=3))(x[where] @ table.T)
        nothing = jax.jit(functools.partial(losses.sinkhorn_shift, temperature=0.4))(x, table, np.zeros(12, bool))
    got = [softmax([v + float(s) for v, s in zip(logits(row, table, 0.4), shift)]) for row in x[where]]
    np.testing.assert_allclose(got, want, rtol=1e-10)
    assert not np.any(nothing)


def test_chunks_of_rows_change_nothing(monkeypatch):
    x, table, where = drawn(11)
    weights = np.where(where, 0.2, 0.0)[:, None, None]

    def both(x, table):
        shift = losses.sinkhorn_shift(x, table, where, temperature=0.4)
        one = x[:, None]
        return losses.prototype_cross_entropy(
            one, one + 1, weights, table, table, shift, temperature=0.5, teacher_temperature=0.4
        )

    with jax.enable_x64(True):
        whole = jax.jit(jax.value_and_grad(both, argnums=(0, 1)))(x, table)
        monkeypatch.setattr(prototypes, "DENSE_UP_TO", 30)
        lowered = jax.jit(jax.value_and_grad(lambda *a: both(*a), argnums=(0, 1)))
        parts = lowered(x, table)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
