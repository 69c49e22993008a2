"""Every deterministic op against torchvision: golden file made by benchmarks/torchvision_reference.py."""

import json
from functools import cache
from inspect import signature
from pathlib import Path

import jax
import numpy as np
import pytest

from ssl_jax.augment import ops

GOLDEN = np.load(Path(__file__).parent / "reference" / "torchvision_ops.npz")
CASES = sorted(name.removesuffix(".call") for name in GOLDEN.files if name.endswith(".call"))
STATIC = ("size", "kernel_size")


@cache
def jitted(op):
    function = getattr(ops, op)
    return jax.jit(function, static_argnames=[name for name in STATIC if name in signature(function).parameters])


@pytest.mark.parametrize("case", CASES)
def test_op_agrees_with_torchvision(case):
    op, given = json.loads(str(GOLDEN[f"{case}.call"]))
    image = np.float32(GOLDEN[f"{case.split('-')[0]}.image"] / 255)
    static = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in STATIC}
    traced = {k: np.asarray(v, np.float32) for k, v in given.items() if k not in STATIC}
    made = jitted(op)(image, **static, **traced)
    np.testing.assert_allclose(made, GOLDEN[f"{case}.result"], atol=1e-5, rtol=0)
