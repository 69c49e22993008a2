"""Losses beside those of other libraries, in float64 on the same inputs: the same values and gradients.

What they computed is in reference/peer_losses.npz (benchmarks/losses_reference.py). Where a definition differs, the
case says by what, and why; benchmarks/README.md lists it under "Where peers differ".
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_encoder import NETWORK

from ssl_jax import losses, registry
from ssl_jax.methods.mae import normalized
from ssl_jax.models import patchify

STORED = dict(np.load(Path(__file__).parent / "reference" / "peer_losses.npz"))
X = {key.removeprefix("inputs/"): value for key, value in STORED.items() if key.startswith("inputs/")}
ABOUT = json.loads(str(STORED["about"]))
VICREG = {"invariance": 25.0, "variance": 10.0, "covariance": 1.0}
SHARP = {"temperature": 0.1, "teacher_temperature": 0.04}


def of_method(name, outputs, **options):
    """The loss that the method's own `loss` makes of outputs."""
    module = registry.find("method", name)
    made = module.make(module.Config(**options), NETWORK, SimpleNamespace(steps=10))
    return made.loss(outputs, None, None, None)[0]


def pairs(x):
    """Predictions a and b, each with the projection of the other view, d and c."""
    return {"embedding": x["a"], "pairs": ((x["a"], x["d"]), (x["b"], x["c"]))}


def scores(x, views):
    return [x[f"student{i}"] for i in range(views)]


def swav(x, views):
    assigned = [losses.sinkhorn(s, epsilon=0.05, iterations=3) for s in scores(x, 2)]
    return losses.swav(scores(x, views), assigned, temperature=0.1)


def dino(x):
    return losses.dino(scores(x, 4), [x["teacher0"], x["teacher1"]], x["centre"], **SHARP)


def ibot(x):
    rows = np.array([0, 2, 3, 5])  # three masked patches of the first image and one of the second
    student, teacher = (x[name][rows][:, None] for name in ("student0", "teacher0"))
    weights = jnp.array([1 / 6, 1 / 6, 1 / 6, 1 / 2])[:, None, None]
    options = {"temperature": 0.1, "teacher_temperature": 0.05}
    shift = -x["centre"] / 0.05
    return losses.prototype_cross_entropy(student, teacher, weights, jnp.eye(8), jnp.eye(8), shift, **options)


def msn(x, weight):
    table = losses.normalize(x["prototypes"])
    a, b, target = (losses.normalize(x[name]) @ table.T / 0.1 for name in "abc")
    balanced = losses.msn_targets(jax.lax.stop_gradient(target), sharpen=0.25, iterations=3)
    return losses.msn([a, b], balanced, weight=weight)[0]


def vicregl(x):
    maps, grids = ([x[f"{kind}{i}"] for i in range(3)] for kind in ("map", "grid"))
    return losses.vicregl([x[name] for name in "abc"], maps, grids, alpha=0.75, matches=(4, 4), **VICREG)


def mae(x, normalize):
    pixels = patchify(x["images"].transpose(0, 2, 3, 1), 4)
    return losses.masked_error(x["pixels"], normalized(pixels) if normalize else pixels, x["mask"], power=2)


def simmim(x):
    return losses.masked_error(x["pixels"], patchify(x["images"].transpose(0, 2, 3, 1), 4), x["mask"], power=1)


nt_xent = functools.partial(losses.nt_xent, temperature=0.3)
info_nce = functools.partial(losses.info_nce, temperature=0.2)
barlow_twins = functools.partial(losses.barlow_twins, off_diagonal=0.005)

CASES = {
    "lightly/nt_xent": lambda x: nt_xent(x["a"], x["b"]),
    "lightly/moco": lambda x: info_nce(x["a"], x["b"], x["queue"]),
    "lightly/negative_cosine": lambda x: losses.negative_cosine(x["a"], x["b"]),
    # The mean of two times -cos; ours is the sum of 2 - 2 cos over both directions, as the paper has it.
    "lightly/byol": lambda x: (of_method("byol", pairs(x)) - 4) / 4,
    "lightly/simsiam": lambda x: of_method("simsiam", pairs(x)),
    "lightly/barlow_twins": lambda x: barlow_twins(x["a"], x["b"]),
    "lightly/barlow_twins, wide": lambda x: losses.barlow_twins(x["wide_a"], x["wide_b"], off_diagonal=0.1),
    "lightly/vicreg": lambda x: losses.vicreg(x["a"], x["b"], **VICREG),
    "lightly/vicreg, wide": lambda x: losses.vicreg(x["wide_a"], x["wide_b"], **VICREG),
    # Places of maps: its mean over views of covariances is ours over both views, halved.
    "lightly/vicreg, maps": lambda x: losses.vicreg(x["map0"], x["map1"], **VICREG | {"covariance": 0.5}),
    "lightly/vicregl": vicregl,
    "lightly/swav": lambda x: swav(x, 2),
    "lightly/swav, multi-crop": lambda x: swav(x, 4),
    "lightly/dino": dino,
    "lightly/ibot": ibot,
    "lightly/msn": lambda x: msn(x, 1.0),
    "lightly/msn, without the mean": lambda x: msn(x, 0.0),
    "lightly/tico": lambda x: losses.tico(x["a"], x["b"], x["covariance"], beta=0.9, rho=8.0),
    "lightly/koleo": lambda x: losses.koleo(x["a"]),
    "lightly/lejepa": lambda x: losses.lejepa(jnp.stack([x["a"], x["b"]]), x["directions"], weight=0.05)[0],
    "solo-learn/nt_xent": lambda x: nt_xent(x["a"], x["b"]),
    "solo-learn/moco": lambda x: info_nce(x["a"], x["b"], x["queue"]),
    # Both multiply by 2 T; here the method does it, not the loss.
    "solo-learn/moco_v3": lambda x: 0.4 * losses.in_batch_info_nce(x["a"], x["b"], temperature=0.2),
    "solo-learn/nnclr": lambda x: losses.indexed_info_nce(x["c"], x["a"], temperature=0.1),
    "solo-learn/byol": lambda x: 2 + 2 * losses.negative_cosine(x["a"], x["b"]),  # of one direction
    "solo-learn/simsiam": lambda x: losses.negative_cosine(x["a"], x["b"]),
    # A factor of its own, as the authors' code had in a first version.
    "solo-learn/barlow_twins": lambda x: 0.025 * barlow_twins(x["a"], x["b"]),
    # It adds the variance terms of the views, where paper and official code take their mean.
    "solo-learn/vicreg": lambda x: losses.vicreg(x["a"], x["b"], **VICREG | {"variance": 20.0}),
    "solo-learn/swav": lambda x: swav(x, 2),
    "solo-learn/dino": dino,
    "solo-learn/mae": lambda x: mae(x, False),
    "solo-learn/mae, normalized": lambda x: mae(x, True),
    "transformers/simmim": simmim,
    "torch/triplet": lambda x: losses.triplet(x["a"], x["b"], x["c"], margin=1.0),
    "torch/smooth_l1": lambda x: losses.smooth_l1(2 * x["a"], x["b"], jnp.ones(6, bool)),
    "torch/cross_entropy": lambda x: losses.cross_entropy(x["a"], x["label"]),
    "stable-pretraining/simclr": lambda x: of_method("simclr", {"z": (x["a"], x["b"])}, temperature=0.3),
    # The mean of both directions; ours is their sum.
    "stable-pretraining/byol": lambda x: of_method("byol", pairs(x)) / 2,
    "stable-pretraining/simsiam": lambda x: of_method("simsiam", pairs(x)),
    "stable-pretraining/vicreg": lambda x: of_method("vicreg", {"z": (x["a"], x["b"])}, **VICREG),
    "stable-pretraining/info_nce": lambda x: losses.indexed_info_nce(x["a"], x["queue"], x["label"], temperature=0.2),
    "stable-pretraining/swav": lambda x: swav(x, 2),
}
APART = {"stable-pretraining/barlow_twins"}  # see below
# transformers adds 1e-5 to the number of hidden pixels, 64: 1.6e-7. lightly's frequencies are rounded to float32.
NEAR = {"transformers/simmim": 1e-6, "lightly/lejepa": 1e-7}


def gradients_of(case):
    return [key.rsplit("/", 1)[1] for key in STORED if key.startswith(f"{case}/grad/")]


@pytest.fixture(scope="module")
def ours():
    """Values and gradients of all cases, from one program."""

    def everything(x):
        return {
            case: jax.value_and_grad(lambda some, loss=loss: loss(x | some))({k: x[k] for k in gradients_of(case)})
            for case, loss in CASES.items()
        }

    with jax.enable_x64(True):
        return jax.device_get(jax.jit(everything, compiler_options={"xla_backend_optimization_level": 0})(X))


@pytest.mark.parametrize("case", CASES)
def test_same_inputs_same_loss(case, ours):
    value, gradients = ours[case]
    assert value.dtype == np.float64
    rtol = NEAR.get(case, 1e-9)
    np.testing.assert_allclose(value, STORED[f"{case}/value"], rtol=rtol)
    assert gradients
    for key, gradient in gradients.items():
        want = STORED[f"{case}/grad/{key}"]
        np.testing.assert_allclose(gradient, want, rtol=rtol, atol=rtol * np.abs(want).max())


def test_every_stored_loss_has_a_counterpart():
    """And each library has its version stored, so that a reader can have the same one."""
    stored = {key.removesuffix("/value") for key in STORED if key.endswith("/value")}
    assert stored == CASES.keys() | APART
    assert {case.split("/")[0] for case in stored} == ABOUT.keys()


def test_barlow_twins_of_stable_pretraining_has_smaller_correlations():
    """It divides by B products that it made with the deviations of B - 1: (B - 1) / B of ours, below 1 for equal views.

    Its inputs are so large that neither epsilon counts.
    """
    count = len(X["a"])

    def loss(some, factor):
        a, b = (z - z.mean(axis=0) for z in (some["a"], some["b"]))
        c = factor * (a / a.std(axis=0)).T @ (b / b.std(axis=0)) / count
        squares = jnp.square(c - jnp.eye(len(c)))
        return jnp.sum(squares * jnp.where(jnp.eye(len(c), dtype=bool), 1.0, 0.005))

    with jax.enable_x64(True):
        given = {key: 1e4 * X[key] for key in "ab"}
        value, gradient = jax.jit(jax.value_and_grad(loss))(given, (count - 1) / count)
        np.testing.assert_allclose(value, STORED["stable-pretraining/barlow_twins/value"], rtol=1e-8)
        for key in "ab":
            want = STORED[f"stable-pretraining/barlow_twins/grad/{key}"]
            np.testing.assert_allclose(1e4 * gradient[key], want, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(jax.jit(loss)(given, 1.0), jax.jit(barlow_twins)(given["a"], given["b"]), rtol=1e-8)


def test_what_lightly_tests_of_its_own():
    """KoLeo's value on six points and on one, which is its own neighbour; invariances of NT-Xent and Barlow Twins."""
    points = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [-1.0, -1.0]])

    def made(x, points):
        other = {"a": 3 * x["a"] + 2, "b": 0.5 * x["b"] - 1}
        return {
            "points": losses.koleo(points),
            "one point": losses.koleo(points[:1, 1:]),
            "exchanged": nt_xent(x["a"], x["b"]) - nt_xent(x["b"], x["a"]),
            "scaled": nt_xent(3 * x["a"], x["b"]) - nt_xent(x["a"], x["b"]),
            "affine": barlow_twins(other["a"], other["b"]) - barlow_twins(x["a"], x["b"]),
        }

    with jax.enable_x64(True):
        found = jax.device_get(jax.jit(made)(X, points))
    assert found["points"] == pytest.approx(0.2674, rel=1e-4)
    assert found["one point"] == pytest.approx(17.7275, rel=1e-4)
    assert abs(found["exchanged"]) < 1e-12
    assert abs(found["scaled"]) < 1e-12
    assert abs(found["affine"]) < 1e-3  # but for the epsilon
