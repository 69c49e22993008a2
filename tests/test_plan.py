"""`ssl-jax plan`: its counts against counts by hand; the TPU compiler itself where libtpu is installed."""

import csv
import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from ssl_jax import cli, plan
from ssl_jax.config import Model, resolve
from ssl_jax.config_file import load_config
from ssl_jax.errors import UserError
from ssl_jax.hlo import Collective
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


def test_seconds_of_an_all_reduce_by_hand():
    """64 chips, 8 x 8, no ring on a v5e: half of its links carry; each chip sends 2 x 63/64 of the bytes."""
    seconds = plan.collective_seconds("all-reduce", 100e6, plan.parse_topology("v5e:8x8"))
    assert seconds == pytest.approx(2 * 100e6 * 63 / 64 / 100e9 + 2 * 14e-6)
    assert plan.collective_seconds("all-reduce", 100e6, plan.parse_topology("v5e:1x1")) == 0


def test_collectives_are_added_up_by_kind():
    many = [Collective("all-reduce", 5, 4.0), Collective("all-gather", 1, 32.0), Collective("all-reduce", 1, 100.0)]
    assert plan.totals(many) == {"all-gather": (1, 32.0), "all-reduce": (6, 120.0)}


def test_a_topology_is_read_without_the_compiler():
    tpu = plan.parse_topology("v4:2x2x4")
    assert (tpu.version, tpu.sides, tpu.chips, str(tpu)) == ("v4", (2, 2, 4), 16, "v4:2x2x4")
    assert tpu.chip is plan.CHIPS["v4"]
    for name in ("v5e", "v5e:", "v5e:4x", "v5e:4x8x"):
        with pytest.raises(UserError, match=f"^--topology={name}: allowed: VERSION:SIDExSIDE"):
            plan.parse_topology(name)


def process_settings():
    return dict(os.environ), jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir


def test_the_compilers_settings_end_with_it(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "set by the user")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    before = process_settings()
    for fails in (False, True):
        try:
            with plan.tpu_compiler(), plan.tpu_compiler():
                assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
                assert os.environ["TPU_WORKER_HOSTNAMES"] == "set by the user"
                assert not jax.config.jax_enable_compilation_cache
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert process_settings() == before


def test_the_compilation_cache_is_used_again_afterwards(tmp_path):
    """JAX decides once per process whether it uses the cache: that decision must not outlive the TPU compiler."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def files_after_compiling(factor):
        jax.jit(lambda x: x * factor).lower(jnp.ones(3)).compile()
        return len(list(tmp_path.iterdir()))

    try:
        with plan.tpu_compiler():
            assert files_after_compiling(3.25) == 0
        assert files_after_compiling(4.25) > 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        reset_cache()


def test_a_data_set_that_is_elsewhere_has_its_sizes():
    config = resolve(load_config("imagenet:simclr", []))
    imagenet = plan.open_or_describe(config.data)
    assert len(imagenet) == 1_281_167 and imagenet.labels.shape == (1_281_167,) and len(imagenet.classes) == 1000
    assert imagenet.shape == (224, 224, 3) and imagenet.objects is None
    radiographs = plan.open_or_describe(dataclasses.replace(config.data, size=128, channels=1), images=500)
    assert len(radiographs) == 500 and radiographs.shape == (128, 128, 1) and radiographs.labels is None
    with pytest.raises(RuntimeError, match="image 3: only the sizes of this data set are known"):
        radiographs.load(3)


def test_hosts_need_cores_to_cut_crops():
    known = {"topology": "v5e:2x2", "chips": 4, "batch": 1000, "micro_batch": 0, "fits": True, "memory": 1e9}
    fed = plan.Plan(**known, compute_s=0.5, core_rate=300.0)
    assert fed.cores == 7 and "7 cores in all to feed it, if one decodes 300 images/s" in plan.summary(fed)
    assert plan.table_row(fed)["cores"] == 7
    held = plan.Plan(**known, compute_s=0.5)
    assert held.cores == 0 and "hosts" not in plan.summary(held)


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
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_memory_is_read_from_what_the_compiler_says():
    """Two messages of libtpu 0.0.42: one counts the whole program, the other its temporary arrays alone."""
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
    before = process_settings()
    assert cli.main(["plan", *FLAGS, "--sweep=v5e:2x2,v5e:2x4", f"--out={tmp_path}"]) == 0
    assert process_settings() == before
    printed = capsys.readouterr().out
    assert printed.count("prediction, nothing was run") == 2 and "limited by" in printed
    assert printed.splitlines()[-2].startswith("v5e:2x4 ")
    rows = list(csv.DictReader((tmp_path / "plan.csv").open()))
    assert [row["chips"] for row in rows] == ["4", "8"]
    assert np.isclose(float(rows[0]["flops"]), 2 * float(rows[1]["flops"]))
    assert (tmp_path / "plan.png").stat().st_size > 1000
