"""`ssl-jax plan`: what is counted, against hand counts; the TPU compiler itself where libtpu is installed."""

import csv
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import cli, parallel, plan
from ssl_jax.config import Model
from ssl_jax.models import build_encoder

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
SMALL = {
    "data.name": "synthetic", "data.size": 16, "data.limit": 64, "model.name": "resnet_thin", "model.width": 0.25,
    "method.hidden": 16, "method.out": 8, "train.batch": 16, "train.duration": "40 steps",
}  # fmt: skip
FLAGS = ["--config=pretrain:simclr", *(f"--config.{key}={value}" for key, value in SMALL.items())]


def test_flops_of_resnet50_are_those_counted_by_hand():
    """4.089 billion multiplications an image of 224 px forward, of which the stem's 118 million have no input gradient.

    Source of the number: torchvision's table of weights, ResNet50_Weights, GFLOPS 4.09.
    """
    encoder = build_encoder(Model(name="resnet50", conv="lax"), 3)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    params, stats = jax.eval_shape(encoder.init, jax.random.key(0), images)

    def forward(params, stats, images):
        return encoder.apply(params, stats, images, train=True)[0].sum()

    by_hand = 2 * 4.089e9 * 2
    assert plan.count_flops(jax.make_jaxpr(forward)(params, stats, images).jaxpr) == pytest.approx(by_hand, rel=0.01)
    both = plan.count_flops(jax.make_jaxpr(jax.grad(forward))(params, stats, images).jaxpr)
    assert both == pytest.approx(3 * by_hand - 2 * 2 * 0.118e9, rel=0.05)


def test_flops_agree_with_the_compiler():
    """Which leaves out products with padding: little at 224 px, a seventh of ResNet-18 at 32 px."""
    encoder = build_encoder(Model(name="resnet50", conv="lax"), 3)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    params, stats = jax.eval_shape(encoder.init, jax.random.key(0), images)
    traced = jax.jit(lambda p, s, x: encoder.apply(p, s, x, train=False)[0]).trace(params, stats, images)
    compiler = traced.lower().cost_analysis()["flops"]
    assert plan.count_flops(traced.jaxpr.jaxpr) == pytest.approx(compiler, rel=0.05)


def test_loops_count_as_often_as_they_run():
    def chain(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=7)[0]

    assert plan.count_flops(jax.make_jaxpr(chain)(jnp.ones((4, 4))).jaxpr) == 7 * 2 * 4**3


def test_collectives_of_a_real_program_with_a_loop():
    """Four devices: a sum in each of five rounds, and one gather after it."""
    mesh = parallel.make_mesh(4, 4)

    def step(x):
        def one(total, _):
            return total + jnp.sum(x * total), None

        return jax.lax.scan(one, jnp.float32(1), None, length=5)[0] + x

    jitted = jax.jit(step, in_shardings=parallel.batch_sharding(mesh), out_shardings=parallel.replicated(mesh))
    text = jitted.lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text()
    found = sorted(plan.collectives(text))
    assert found == [("all-gather", 1, 32.0), ("all-reduce", 5, 4.0)]


# As the TPU compiler writes a gather that two fusions hide.
SPREAD = """
%async_collective_fusion.1 (param_0: f32[16,8], param_1: f32[64,8]) -> f32[64,8] {
  %all-gather.18 = f32[64,8]{1,0} all-gather(%param_0), channel_id=4, dimensions={0}
}
%async_collective_fusion.2 (param_0: f32[16,8], param_1: f32[64,8]) -> f32[64,8] {
  %all-gather.20 = f32[64,8]{1,0} all-gather(%param_0), channel_id=4, dimensions={0}
}
ENTRY %main (x: f32[16,8]) -> f32[64,8] {
  %fusion.1 = f32[64,8]{1,0} fusion(%x, %buffer), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = f32[64,8]{1,0} fusion(%x, %fusion.1), kind=kCustom, calls=%async_collective_fusion.2
  %all-gather.21 = f32[64,8]{1,0} all-gather(%x), channel_id=5, dimensions={0}
}
"""


def test_a_collective_spread_over_fusions_is_one():
    assert list(plan.collectives(SPREAD)) == [("all-gather", 1, 2048.0)] * 2


def test_seconds_of_an_all_reduce_by_hand():
    """64 chips, 8 x 8, no ring on a v5e: half of its links carry; each chip sends 2 x 63/64 of the bytes."""
    found = plan.seconds_of("all-reduce", 100e6, plan.CHIPS["v5e"], (8, 8))
    assert found == pytest.approx(2 * 100e6 * 63 / 64 / 100e9 + 2 * 14e-6)
    assert plan.seconds_of("all-reduce", 100e6, plan.CHIPS["v5e"], (1, 1)) == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--topology=v9:2x2", "--topology='v9': unknown"),
        ("--topology=v5e:2by2", "--topology=v5e:2by2: allowed: VERSION:SIDExSIDE"),
        ("--out=here", "--topology: missing"),
    ],
)
def test_mistakes_are_one_line(flag, message, capsys):
    assert cli.main(["plan", *FLAGS, flag]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_memory_is_read_from_what_the_compiler_says():
    """Two messages of libtpu 0.0.42: the whole program, and what it makes on the way without its arguments."""
    start = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
    whole = start + "in memory space hbm. Used 27.50G of 15.75G hbm. Exceeded hbm capacity by 11.75G."
    assert plan.out_of_memory(whole, 2**30) == 27.5 * 2**30
    start = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    inner = start + "for HLO temporaries (16.03G) exceeds available HBM (15.75G)."
    assert plan.out_of_memory(inner, 2**30) == pytest.approx(17.03 * 2**30)
    assert plan.out_of_memory("INTERNAL: Used 1.0G of", 2**30) == 0


@pytest.mark.skipif(HAS_COMPILER, reason="libtpu is installed")
def test_without_the_compiler_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert cli.main(["plan", *FLAGS, "--topology=v5e:2x2"]) == 2
    assert capsys.readouterr().err == "ssl-jax: plan: needs the TPU compiler (libtpu); pip install 'ssl_jax[plan]'\n"


@pytest.mark.skipif(not HAS_COMPILER, reason="the TPU compiler (libtpu, extra `plan`) is not installed")
def test_a_small_sweep(tmp_path, capsys):
    assert cli.main(["plan", *FLAGS, "--sweep=v5e:2x2,v5e:2x4", f"--out={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert told.count("prediction, nothing was run") == 2 and "limited by" in told
    rows = list(csv.DictReader((tmp_path / "plan.csv").open()))
    assert [row["chips"] for row in rows] == ["4", "8"]
    assert np.isclose(float(rows[0]["flops"]), 2 * float(rows[1]["flops"]))
    assert (tmp_path / "plan.png").stat().st_size > 1000
