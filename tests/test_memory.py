"""train.micro_batch=auto: what is free, what a step needs, and that a run keeps what it began with."""

import json

import jax
import jax.numpy as jnp
import pytest

from ssl_jax import parallel, train
from ssl_jax.errors import UserError
from ssl_jax.testing.tiny import Images, tiny_config, tiny_encoder
from ssl_jax.train import hooks, memory, start
from ssl_jax.train.step import make_step, set_up


def config(method="simclr", **changes):
    return tiny_config(method, **{"train__batch": 64, "train__duration": "4 steps", **changes})


def source():
    return Images(n=96, size=16)


def with_free(monkeypatch, free):
    monkeypatch.setattr(memory, "free_memory", lambda: float(free))


def test_what_surely_fits_is_not_compiled_twice(monkeypatch):
    with_free(monkeypatch, 1e12)
    monkeypatch.setattr(memory, "temporaries", lambda *args: pytest.fail("compiled"))
    fit = memory.fit_to_memory(config(), source(), tiny_encoder())
    assert fit.micro_batch == 0 and memory.describe(fit, config()) == ""


def test_the_largest_part_that_fits(monkeypatch):
    """With 1 MB of temporaries per image and a state of some kB."""
    monkeypatch.setattr(memory, "temporaries", lambda config, *args: config.train.part * 1e6)
    monkeypatch.setattr(memory, "stored_values", lambda setup: 1e9)
    found = {}
    for megabytes in (90, 60, 30, 5, 0.1):
        with_free(monkeypatch, megabytes * 1e6)
        found[megabytes] = memory.fit_to_memory(config(), source(), tiny_encoder()).micro_batch
    assert found == {90: 0, 60: 32, 30: 16, 5: 2, 0.1: 2}  # one image has no BatchNorm
    with_free(monkeypatch, 60e6)
    fit = memory.fit_to_memory(config(train__bn_group=16), source(), tiny_encoder())
    assert fit.micro_batch == 32
    line = memory.describe(fit, config(train__bn_group=16))
    assert line.startswith("batch 64 in 2 parts of 32: about 0.0 GB of 0.1 GB free") and "of 16 images" in line
    with_free(monkeypatch, 1e6)
    fit = memory.fit_to_memory(config(train__bn_group=16), source(), tiny_encoder())
    assert fit.micro_batch == 16 and "too much" in memory.describe(fit, config(train__bn_group=16))


def test_devices_share_the_parts(monkeypatch):
    monkeypatch.setattr(memory, "temporaries", lambda config, *args: config.train.part * 1e6)
    monkeypatch.setattr(memory, "stored_values", lambda setup: 1e9)
    with_free(monkeypatch, 15e6)
    sizes = [memory.fit_to_memory(config(train__devices=n), source(), tiny_encoder()).micro_batch for n in (1, 4)]
    assert sizes == [8, 32]


@pytest.mark.slow
def test_the_estimate_is_near_what_the_compiler_counts(monkeypatch):
    """Of the part that it chose, from a program with smaller parts."""
    with_free(monkeypatch, 30e6)
    monkeypatch.setattr(memory, "stored_values", lambda setup: 1e9)
    options = config(train__micro_batch="auto", model__width=0.5)
    fit = memory.fit_to_memory(options, source())
    assert fit.micro_batch in (16, 32)
    chosen = config(train__micro_batch=fit.micro_batch, model__width=0.5)
    mesh, setup = parallel.make_mesh(1, 64), set_up(chosen, source())
    args = memory.abstract_arguments(setup, chosen, source(), mesh)
    counted = memory.needed(jax.jit(make_step(setup, chosen, mesh), donate_argnums=0).lower(*args).compile())
    assert 0.8 * counted < fit.needed < 2 * counted


def test_a_run_keeps_what_it_began_with(monkeypatch, tmp_path, capsys):
    options = {"train__micro_batch": "auto", "train__batch": 16}
    monkeypatch.setattr(memory, "temporaries", lambda config, *args: config.train.part * 1e6)
    monkeypatch.setattr(memory, "stored_values", lambda setup: 1e9)
    with_free(monkeypatch, 15e6)
    train.fit(config(**options), tmp_path, source(), tiny_encoder())
    assert "batch 16 in 2 parts of 8: about" in capsys.readouterr().out
    assert json.loads((tmp_path / "environment.json").read_text())["micro_batch"] == 8
    with_free(monkeypatch, 1e12)
    (tmp_path / "encoder" / "encoder.json").unlink()  # as if it had ended before
    train.fit(config(**options), tmp_path, source(), tiny_encoder())
    assert json.loads((tmp_path / "environment.json").read_text())["micro_batch"] == 8
    assert "parts" not in capsys.readouterr().out
    (tmp_path / "encoder" / "encoder.json").unlink()
    with pytest.raises(UserError, match="128 images, but the run began with 96; allowed: the same images"):
        train.fit(config(**options), tmp_path, Images(n=128, size=16), tiny_encoder())


@pytest.mark.parametrize(("side", "said"), [(64, ""), (224, "images of 224 px are slow without a GPU: ")])
def test_large_images_without_a_gpu_are_said_to_be_slow(side, said, capsys):
    images = Images(n=2, size=side)
    decided = memory.decisions(config(model__name=""), images)
    assert decided["model"]() == {"name": "resnet18", "stem": "imagenet"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ([f"{said}config.data.size=64 is about 12 times as fast"] if said else [])


def test_a_step_that_does_not_fit_is_compiled_in_smaller_parts(monkeypatch, tmp_path, capsys):
    """Where this start has chosen the micro-batch. The run is then the one that this micro-batch gives.

    One that was given stays, and a line warns. If any process has no room, all of them decide alike.
    """
    compiled, needs, original = [], iter((50e9, 20e9, 5e9, 5e9)), start.compile_step

    def compile_step(setup, config, *args):
        compiled.append(config.train.part)
        return original(setup, config, *args) if config.train.part == 4 else None

    monkeypatch.setattr(hooks, "write_views", lambda *_: None)
    monkeypatch.setattr(start, "compile_step", compile_step)
    monkeypatch.setattr(memory, "beside_arguments", lambda *_: next(needs))
    with_free(monkeypatch, 10e9)
    options = {"train__batch": 16, "eval__every": "0 steps"}
    train.fit(config(**options, train__micro_batch="auto"), tmp_path / "auto", source(), tiny_encoder())
    assert compiled == [0, 8, 4]
    said = [line for line in capsys.readouterr().err.splitlines() if "GB" in line]
    told = "GB more on each device, and 10.0 GB are free"
    assert said == [
        f"a step needs {need} {told}: the batch is embedded in parts of {part} instead; "
        f"BatchNorm's statistics are those of {part} images"
        for need, part in ((50.0, 8), (20.0, 4))
    ]
    assert json.loads((tmp_path / "auto" / "environment.json").read_text())["micro_batch"] == 4

    monkeypatch.setattr(parallel, "any_process", lambda flag: True)  # another process has less
    train.fit(config(**options, train__micro_batch=4), tmp_path / "four", source(), tiny_encoder())
    assert compiled[3:] == [4]
    warning = f"warning: a step needs 5.0 {told}; if it fails, start a new run with config.train.micro_batch=2"
    assert warning in capsys.readouterr().err
    runs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("auto", "four")]
    assert runs[0] == runs[1]


def test_what_a_compiled_step_takes_beside_its_arguments():
    """A matrix of 4 MB between arguments and results that are small, and the copy that a checkpoint writes."""
    state = jnp.ones(1000)
    program = jax.jit(lambda x: jnp.sort(x[:, None] + jnp.arange(1000.0), axis=None)[:1000]).lower(state).compile()
    taken = memory.beside_arguments(program, {"x": state})
    assert 4e6 <= taken <= 2.5e7 and taken == memory.beside_arguments(program, {}) + 4000 / jax.local_device_count()


def test_free_memory_heeds_the_limits_of_the_job(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 20000000 kB\nMemAvailable:   10000000 kB\n")
    assert memory.free_on_host(tmp_path) == 10_240_000_000
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    assert memory.free_on_host(tmp_path) == 10_240_000_000
    job = tmp_path / "sys/fs/cgroup/slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    for folder, limit in ((job, "4000000000"), (job / "step_0", "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("1500000000\n")
        (folder / "memory.stat").write_text("anon 1000000000\ninactive_file 500000000\n")
    assert memory.free_on_host(tmp_path) == 3_000_000_000
