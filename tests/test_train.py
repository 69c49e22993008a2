"""Whole runs: real processes, real kills, real files."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import cli, load, parallel, train
from ssl_jax.checkpoint import read_metadata, steps
from ssl_jax.config import resolve
from ssl_jax.config_file import load_config
from ssl_jax.data import open_source
from ssl_jax.errors import UserError
from ssl_jax.files import read_lines
from ssl_jax.parallel import make_mesh
from ssl_jax.report import html
from ssl_jax.run_folder import RunFolder
from ssl_jax.testing.tiny import Images, tiny_config, tiny_encoder
from ssl_jax.train import hooks, loop
from ssl_jax.train.start import last_state
from ssl_jax.train.step import device_store
from ssl_jax.transforms import target_of

TINY = {
    "data.name": "synthetic", "data.limit": 96, "data.size": 16, "data.channels": 1, "augment.preset": "grayscale",
    "model.name": "ssl_jax.testing.model", "method.queue": 50, "method.hidden": 16, "method.out": 8,
    "method.bn_groups": 2, "train.batch": 16, "train.log_every": "1 steps", "train.save_every": "5 steps",
    "eval.every": "10 steps", "train.devices": 1,
}  # fmt: skip
RESNET = ("--config.model.name=resnet_thin", "--config.model.width=0.25")


def arguments(workdir, *more, duration="40 steps"):
    config = {**TINY, "train.duration": duration}
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    return ["pretrain", "--config=pretrain:moco", f"--workdir={workdir}", *flags, *more]


def start(*args, env=None, **kwargs):
    """A process that can be sent signals on its way."""
    return forked.Python(forked.SLOWLY, *arguments(*args, **kwargs), env=env)


def finish(*args, env=None, **kwargs):
    """A process that has ended."""
    command = [sys.executable, "-m", "ssl_jax.cli", *arguments(*args, **kwargs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def run_here(*args, **kwargs):
    """The exit code of the same command in this process."""
    return cli.main(arguments(*args, **kwargs))


@pytest.fixture(autouse=True)
def no_sheet(monkeypatch):
    """Nor do other runs draw views.png."""
    monkeypatch.setattr(hooks, "write_views", lambda *_: None)


def wait_for(process, workdir, count, what="metrics"):
    """Until the run has written `count` lines, or saved a checkpoint of at least that step."""
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        lines = len(read_lines(Path(workdir) / "metrics.jsonl"))
        if (lines if what == "metrics" else max([0, *steps(Path(workdir) / "checkpoints")])) >= count:
            return
        time.sleep(0.005)
    if process.poll() is not None and process.returncode:
        pytest.fail(f"ended with {process.returncode}: {process.communicate()}")


def final_arrays(workdir):
    """Shape and fingerprint of every array of the newest checkpoint."""
    return arrays_at(workdir, steps(Path(workdir) / "checkpoints")[-1])


def arrays_at(workdir, step):
    return read_metadata(Path(workdir).absolute() / "checkpoints" / f"{step:09d}")["arrays"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(workdir) == 0
    return workdir


def test_run_folder_holds_everything(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    files = {"config.json", "environment.json", "metrics.jsonl", "timing.jsonl", "checkpoints", "encoder", "views.png"}
    assert files | {"report.html"} <= names
    lines = read_lines(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if {"knn_accuracy", "rank_me"} <= set(line)] == [10, 20, 30, 40]
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["conv"] in ("native", "patches")
    assert environment["data"] == {"images": 96, "shape": [16, 16, 1], "classes": 4}


def test_the_last_checkpoint_holds_the_exported_encoder(uninterrupted):
    made, exported = load._from_checkpoint(RunFolder(uninterrupted), 40), load.load_encoder(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, (made.params, made.stats), (exported.params, exported.stats))
    assert json.loads(json.dumps(made.about)) == exported.about


def test_killed_at_any_moment_it_ends_bit_identical(uninterrupted, tmp_path):
    """SIGKILL at three random moments: about the first saves, right when a checkpoint appears, and later on."""
    workdir = tmp_path / "run"
    # The save at step 20 waits for that of step 15, so the second process does not come as far as the third.
    moments = [("metrics", random.randint(0, 12)), ("checkpoint", 15), ("metrics", random.randint(29, 38))]
    for what, count in moments:
        process = start(workdir)
        wait_for(process, workdir, count, what)
        time.sleep(random.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert run_here(workdir) == 0
    assert final_arrays(workdir) == final_arrays(uninterrupted), moments
    same = (workdir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert same, moments
    weights = "encoder/encoder.safetensors"
    assert (workdir / weights).read_bytes() == (uninterrupted / weights).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_and_ask_for_requeue(uninterrupted, tmp_path, capsys, number):
    """And while a process is at work, no other one may be in its folder."""
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(process, workdir, 7)
    process.send_signal(signal.SIGSTOP)  # it stands still in the middle of its steps
    assert run_here(workdir) == 2 and "another process is working in this folder" in capsys.readouterr().err
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == train.REQUEUE, err
    saved = steps(workdir / "checkpoints")[-1]
    assert 7 <= saved < 40 and f"saved step {saved}" in err
    assert run_here(workdir) == 0
    assert f"from step {saved}" in capsys.readouterr().err
    assert final_arrays(workdir) == final_arrays(uninterrupted)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices(tmp_path):
    """4 devices, then 2, then 1: parameters and queue are restored, and the losses are those of 1 throughout."""

    def on(devices):
        flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}")
        return {"env": {**os.environ, "XLA_FLAGS": flags}, "duration": "20 steps"}

    # Gradients jump where a ReLU's input rounds to either side of 0: at the recipe's rate that came to 1e-4 of the loss
    # on one processor (and to 2e-7 on another).
    flags = (*RESNET, "--config.train.devices=0", "--config.eval.every=0 steps", "--config.optim.lr=0.001")
    workdir = tmp_path / "run"
    for devices, until in ((4, 4), (2, 11)):
        process = start(workdir, *flags, **on(devices))
        wait_for(process, workdir, until)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        assert process.returncode == train.REQUEUE, err
    saved = steps(workdir / "checkpoints")[-1]
    assert 11 <= saved < 20
    done = finish(workdir, *flags, **on(1))
    assert done.returncode == 0 and f"from step {saved}" in done.stderr, done.stderr
    assert finish(tmp_path / "one", *flags, **on(1)).returncode == 0
    found, wanted = (
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("run", "one")
    )
    assert len(found) == 20
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_second_run_of_a_finished_one_changes_nothing(uninterrupted):
    """And many may read it at once: tasks of a study start together, and each loads the same encoders."""
    before = {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*") if p.is_file()}
    metrics = (uninterrupted / "metrics.jsonl").read_bytes()
    with RunFolder(uninterrupted).lock(shared=True):
        assert run_here(uninterrupted) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*") if p.is_file()}
    assert (uninterrupted / "metrics.jsonl").read_bytes() == metrics


def test_another_config_in_the_same_folder_is_refused(uninterrupted, capsys):
    assert run_here(uninterrupted, "--config.optim.lr=0.5", "--config.train.seed=3") == 2
    told = capsys.readouterr().err
    assert "config.optim.lr: 0.03 -> 0.5" in told and "config.train.seed: 0 -> 3" in told
    assert len(told.strip().splitlines()) == 1


def test_a_run_that_never_began_may_be_corrected(tmp_path):
    """A mistake found before the first step (a warm-up too long, say) does not bind the folder to its config."""
    RunFolder(tmp_path / "run").start(tiny_config("simclr"))
    right = dataclasses.replace(tiny_config("simclr"), train=dataclasses.replace(tiny_config("simclr").train, batch=8))
    RunFolder(tmp_path / "run").start(right)
    assert RunFolder(tmp_path / "run").read_config()["train"]["batch"] == 8
    (tmp_path / "run" / "metrics.jsonl").touch()
    RunFolder(tmp_path / "run").start(tiny_config("simclr"))
    RunFolder(tmp_path / "run").start(right)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="train.batch: 8 -> "):
        RunFolder(tmp_path / "run").start(tiny_config("simclr"))


@pytest.mark.slow
def test_full_disk_while_training_is_one_line_and_can_be_resumed(tmp_path):
    """No file may grow beyond 3 kB after the first save: metrics or a checkpoint hit it."""
    script = (
        "import resource, signal, sys; from ssl_jax import cli; from ssl_jax.checkpoint import Checkpoints\n"
        "save = Checkpoints.save\n"
        "def first(self, step, state):\n"
        "    save(self, step, state); self.wait(); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "Checkpoints.save = first; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *arguments(tmp_path / "run", duration="30 steps")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("ssl-jax: ") and "not written" in done.stderr
    assert steps(tmp_path / "run" / "checkpoints") == [5]
    assert finish(tmp_path / "run", duration="30 steps").returncode == 0


def folder_of_images(folder, n=40):
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(n):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 24, 3)).astype(np.uint8)).save(place / f"{i}.png")
    return folder


def test_memory_and_disk_engines_train_the_same(tmp_path):
    """The same images in the same order with the same augmentation, wherever the bytes come from."""
    data = folder_of_images(tmp_path / "data")
    lines = {}
    for engine in ("memory", "disk"):
        config = tiny_config("simclr", train__duration="2.5 epochs", eval__every="0 steps")
        source = dataclasses.replace(config.data, name="folder", path=str(data), size=16, engine=engine)
        train.fit(dataclasses.replace(config, data=source), tmp_path / engine, encoder=tiny_encoder())
        lines[engine] = (tmp_path / engine / "metrics.jsonl").read_text()
    assert lines["memory"] == lines["disk"] and len(lines["memory"].splitlines()) == 5


def test_loss_not_finite_stops_with_step_cause_and_checkpoint(tmp_path):
    source = Images()
    config = tiny_config("supervised", train__duration="40 steps", train__save_every="2 steps", optim__lr=1e38)
    with pytest.raises(
        UserError, match=r"step \d+: loss is (nan|inf).*likely cause: a learning rate too high.*checkpoint"
    ):
        train.fit(config, tmp_path / "run", source, tiny_encoder())
    assert all(line["loss"] is not None for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_non_finite_steps_are_left_out_with_everything_they_touched():
    """A batch with a NaN: parameters, queue, statistics and target stay bit-equal; the step counts."""
    config = tiny_config("moco", optim__skip_nonfinite=True)
    setup = train.set_up(config, Images(), tiny_encoder())
    bad = setup.method._replace(loss=lambda outputs, state, batch, ctx: (outputs["query"].sum() * jnp.nan, {}))
    mesh = parallel.make_mesh(1, 16)
    state = train.init_state(setup, 0)
    step = jax.jit(train.make_step(setup._replace(method=bad), config, mesh))
    after, metrics = step(state, {"image": jnp.zeros((16, 8, 8, 1), jnp.uint8), "label": jnp.zeros(16, jnp.int32)})
    assert int(metrics["skipped"]) == 1 and int(after.step) == 1
    for a, b in zip(jax.tree.leaves(after._replace(step=0)), jax.tree.leaves(state._replace(step=0)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_everything_follows_one_counter_also_after_a_skipped_step():
    """The gradient is 1 everywhere, so parameters move by the learning rate: the logged one, of this very step."""
    config = tiny_config("byol", optim__skip_nonfinite=True, optim__momentum=0.0, optim__weight_decay=0.0)
    setup = train.set_up(config, Images(), tiny_encoder())

    def loss(outputs, state, batch, ctx):
        value = sum(x.sum() for x in jax.tree.leaves(ctx.params))
        return jnp.where(ctx.step == 1, jnp.nan, value), {}

    step_fn = jax.jit(
        train.make_step(setup._replace(method=setup.method._replace(loss=loss)), config, make_mesh(1, 16))
    )
    state = jax.device_get(train.init_state(setup, 0))
    for step in range(4):
        given = {"image": Images().images[:16], "label": np.zeros(16, int)}
        before, (state, metrics) = state, jax.device_get(step_fn(state, given))
        lr = float(setup.schedule(step))
        assert float(metrics["lr"]) == pytest.approx(lr) and int(metrics["skipped"]) == (step == 1)
        moved = [b - a for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True)]
        for x in moved:
            np.testing.assert_allclose(x, 0 if step == 1 else lr, rtol=1e-4, atol=1e-6)
        if step != 1:
            tau = 1 - (1 - config.method.momentum) * (np.cos(np.pi * step / 20) + 1) / 2
            old, new = target_of(before.opt_state), target_of(state.opt_state)
            want = jax.tree.map(lambda t, p, tau=tau: tau * t + (1 - tau) * p, old, {k: state.params[k] for k in old})
            for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_metrics_read_late_change_nothing(tmp_path, monkeypatch):
    """The devices may be any number of steps ahead of the host: metrics, state and collapse are the same."""
    config = tiny_config("simclr", train__duration="12 steps", train__save_every="5 steps", eval__every="4 steps")
    for ahead in (0, 7):
        monkeypatch.setattr(loop, "AHEAD", ahead)
        train.fit(config, tmp_path / str(ahead), Images(), tiny_encoder())
    runs = [tmp_path / name for name in ("0", "7")]
    assert len({(run / "metrics.jsonl").read_bytes() for run in runs}) == 1
    assert len({str(final_arrays(run)) for run in runs}) == 1
    assert [steps(run / "checkpoints") for run in runs] == [[10, 12]] * 2


def test_profile_traces_the_steps_that_are_asked_for(tmp_path, capsys):
    config = tiny_config("simclr", train__duration="8 steps", train__profile="2 steps", eval__every="0 steps")
    train.fit(config, tmp_path / "run", Images(), tiny_encoder())
    assert "profile: " in capsys.readouterr().err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_collapse_is_told_in_words(tmp_path, capsys, monkeypatch):
    """Black images all look the same: the embedding cannot spread."""
    monkeypatch.setattr(hooks, "COLLAPSE_PATIENCE", 15)
    source = Images(n=64, labels=False)
    source.images[:] = 0
    config = tiny_config("simclr", train__duration="20 steps", eval__every="10 steps")
    train.fit(config, tmp_path / "run", source, tiny_encoder())
    assert "collapsed: embedding std" in capsys.readouterr().err
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["rank_me"] for line in lines if "rank_me" in line] == pytest.approx([1, 1], abs=1e-3)
    assert "all images get almost the same embedding" in [line for line in lines if "loss" in line][-1]["collapsed"]
    assert "The run shows a collapse: embedding std" in html.write_report(tmp_path / "run").read_text()
    config = dataclasses.replace(config, on_collapse="stop")
    with pytest.raises(UserError, match=r"collapsed: embedding std .* stopped by config.on_collapse=stop"):
        train.fit(config, tmp_path / "stopped", source, tiny_encoder())


def test_several_labels_an_image_are_watched(tmp_path):
    """The online probe tells its masked cross-entropy, kNN the mean AUC over classes."""
    source = Images(n=96)
    source.labels = (source.labels[:, None] == np.arange(3)).astype(np.float32)
    source.labels[5, 1] = source.labels[7] = np.nan
    config = tiny_config("simclr", train__duration="20 steps", eval__every="20 steps", data__engine="disk")
    train.fit(config, tmp_path / "run", source, tiny_encoder())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    probe = [line["probe_loss"] for line in lines if "loss" in line]
    assert probe[0] == pytest.approx(np.log(2)) and np.log(2) > probe[10] > probe[-1]  # it starts at zero: p is 1/2
    assert [line["step"] for line in lines if line.get("knn_auc", 0) > 0.9] == [20]
    assert "Online probe, loss" in html.write_report(tmp_path / "run").read_text()
    gather = device_store(source, parallel.make_mesh(1, 96))
    np.testing.assert_array_equal(gather({"index": np.arange(96)})["label"], source.labels)  # float, NaN and all


def longer_config(init, *more):
    options = {**TINY, "train.init": init, "train.duration": "9 steps", "train.save_every": "20 steps"}
    options |= {"optim.warmup": "4 steps", "eval.every": "0 steps"}
    return resolve(load_config("pretrain:moco", [*(f"--config.{k}={v}" for k, v in options.items()), *more]))


def test_a_longer_run_goes_on_from_the_whole_state_of_another(uninterrupted, tmp_path, monkeypatch):
    """Bit by bit, but for the step, with a warm-up of its own; and once it has begun, it does not need the other."""
    shutil.copytree(uninterrupted, tmp_path / "short")
    monkeypatch.chdir(tmp_path)
    config = longer_config("short")

    def killed(*args, batches=loop.batches):
        yield from itertools.islice(batches(*args), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "batches", killed)
        train.fit(config, tmp_path / "killed")
    train.fit(config, tmp_path / "whole")
    last, first = arrays_at("short", 40), arrays_at("whole", 0)
    assert last.pop(".step") != first.pop(".step") and first == last
    assert any("target" in name for name in first) and any("queue" in name for name in first)
    lines = [line for line in read_lines(tmp_path / "whole" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 10))
    peak = config.optim.lr * config.train.batch / config.optim.lr_batch
    np.testing.assert_allclose([line["lr"] for line in lines[:5]], peak * np.arange(5) / 4, rtol=1e-6)
    (tmp_path / "short").rename(tmp_path / "gone")
    train.fit(config, tmp_path / "killed")
    assert final_arrays("killed") == final_arrays("whole")
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_run_that_another_cannot_go_on_from_is_one_line(uninterrupted, tmp_path):
    RunFolder(tmp_path / "begun").start(tiny_config("moco"))
    lock, config = RunFolder(uninterrupted).lock, longer_config(str(uninterrupted))
    for changed, held, message in [
        (longer_config(str(tmp_path / "no")), False, "no checkpoint; allowed: the folder of a run that has saved one"),
        (longer_config(str(tmp_path / "begun")), False, "no checkpoint"),
        (dataclasses.replace(config, method_name="simclr"), False, "a run of the method 'moco'; allowed: one of 'simc"),
        (longer_config(str(uninterrupted), "--config.method.out=4"), False, "this run needs .*method.out: 8 -> 4"),
        (longer_config(str(uninterrupted), "--config.optim.name=adamw"), False, "another architecture: .*'adamw'"),
        (config, True, "another process is working in this folder"),
    ]:
        setup = train.set_up(dataclasses.replace(changed, method_name="moco"), open_source(changed.data))
        like = jax.eval_shape(functools.partial(train.init_state, setup, 0))
        with lock() if held else contextlib.nullcontext(), pytest.raises(UserError, match=message) as caught:
            last_state(changed, like, print)
        told = str(caught.value)
        assert told.startswith(f"config.train.init={changed.train.init}: ") and "\n" not in told
    assert not (tmp_path / "no").exists()


def test_workdir_that_is_something_else(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for name, message in (("file", "cannot be created|is a file"), ("full", "not empty and not a run folder")):
        with pytest.raises(UserError, match=message):
            train.fit(tiny_config("simclr"), tmp_path / name, Images(), tiny_encoder())
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
    assert {p.name for p in (tmp_path / "full").iterdir()} <= {".lock", "thesis.tex"}
