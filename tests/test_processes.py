"""Two processes of one job, as on two hosts: the same losses as one process, one end, one set of checkpoints."""

import os
import re
import shutil
import socket
import time

import forked
import numpy as np
import pytest

from ssl_jax import cli, parallel
from ssl_jax.checkpoint import steps
from ssl_jax.files import read_lines
from ssl_jax.train import REQUEUE, hooks

# One process and two have other threads, so other rounding. At a larger rate it decides, once in a while, on which side
# of 0 an input of a ReLU falls: seen at 0.003 as a jump from 1e-6 to 2e-4 within one step. At this rate the second loss
# still differs by 0.2 from that at 0.001, so a gradient that is wrong by a factor would show.
SMALL = {
    "data.name": "synthetic", "data.limit": 48, "data.size": 16, "model.name": "ssl_jax.testing.model",
    "method.hidden": 16, "method.out": 8, "train.batch": 16, "train.duration": "12 steps",
    "train.save_every": "4 steps", "train.log_every": "1 steps", "optim.name": "sgd", "optim.lr": 0.0003,
    "optim.lr_batch": 0, "eval.every": "6 steps",
}  # fmt: skip


def arguments(workdir, method="simclr", **changes):
    flags = [f"--config.{key}={value}" for key, value in {**SMALL, **changes}.items()]
    return ["pretrain", f"--config=pretrain:{method}", f"--workdir={workdir}", *flags]


def start(workdir, count, devices, method="simclr", timeout=parallel.TIMEOUT, sheet=False, **changes):
    """`count` processes of one job; each has a share of `devices` simulated devices.

    sheet: whether they draw views.png, which takes half of the time of so short a run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from ssl_jax import cli, parallel; from ssl_jax.train import hooks\n"
    code += f"parallel.TIMEOUT = {timeout}\n" + ("" if sheet else "hooks.write_views = lambda *_: None\n")
    code += "sys.exit(cli.main(sys.argv[1:]))"
    made = []
    for number in range(count):
        flags = re.sub(r"(device_count)=\d+", rf"\1={devices // count}", os.environ["XLA_FLAGS"])
        env = {**os.environ, "XLA_FLAGS": flags}
        if count > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
            env["JAX_PROCESS_ID"] = str(number)
        made.append(forked.Python(code, *arguments(workdir, method, **changes), env=env))
    return made


def finish(processes):
    """[(exit code, stdout, stderr)] of each."""
    told = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, told, strict=True)]


def losses(workdir):
    return [line["loss"] for line in read_lines(workdir / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(arguments(workdir, **{"train.devices": 2})) == 0
    return workdir


def test_two_processes_train_as_one(alone, tmp_path):
    both = finish(start(tmp_path / "run", 2, 2, sheet=True))
    assert [code for code, *_ in both] == [0, 0], both
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=0, atol=1e-5)
    assert "encoder:" in both[0][1] and "encoder:" not in both[1][1]  # one speaks
    names = {p.name for p in alone.iterdir()}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names


@pytest.mark.slow
def test_two_processes_train_a_resnet_as_one(tmp_path):
    resnet = {"model.name": "resnet_thin", "model.width": 0.25}
    assert cli.main(arguments(tmp_path / "one", **resnet, **{"train.devices": 2})) == 0
    both = finish(start(tmp_path / "two", 2, 2, **resnet))
    assert [code for code, *_ in both] == [0, 0], both
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)


def test_a_signal_to_one_ends_both_and_one_process_goes_on(alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hooks, "write_views", lambda *_: None)
    workdir = tmp_path / "run"
    processes = start(workdir, 2, 2, **{"data.engine": "disk"})
    end = time.monotonic() + 200
    while time.monotonic() < end and len(losses(workdir)) < 5 and processes[0].poll() is None:
        time.sleep(0.02)
    processes[1].terminate()
    both = finish(processes)
    assert [code for code, *_ in both] == [REQUEUE, REQUEUE], both
    saved = steps(workdir / "checkpoints")[-1]
    assert 5 <= saved < 12 and f"saved step {saved}" in both[0][2]
    assert cli.main(arguments(workdir, **{"data.engine": "disk", "train.devices": 1})) == 0
    assert f"from step {saved}" in capsys.readouterr().err
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_share_the_parameters(tmp_path):
    """Half of each large matrix lies in each process; one device that has them whole goes on from what both saved.

    DINO on a ViT: neither BatchNorm nor ReLU, at which rounding could decide.
    """
    vit = {"model.name": "vit_tiny", "model.depth": 1, "model.width": 1.0, "method.hidden": 512, "optim.lr": 0.01}
    shared, whole = tmp_path / "shared", tmp_path / "whole"
    [(code, _, err)] = finish(start(whole, 1, 1, "dino", **vit))
    assert code == 0, err
    both = finish(start(shared, 2, 2, "dino", **vit, **{"train.shard": 2}))
    assert [code for code, *_ in both] == [0, 0], both
    np.testing.assert_allclose(losses(shared), losses(whole), rtol=0, atol=1e-5)
    for last in (max((shared / "checkpoints").iterdir()), shared / "encoder"):  # as if it had stopped at step 8
        shutil.rmtree(last)
    [(code, _, err)] = finish(start(shared, 1, 1, "dino", **vit))
    assert code == 0 and "from step 8" in err, err
    np.testing.assert_allclose(losses(shared), losses(whole), rtol=0, atol=1e-5)


def test_a_dead_process_ends_the_job(tmp_path):
    processes = start(tmp_path / "run", 2, 2, timeout=10, **{"train.duration": "1000000 steps"})
    end = time.monotonic() + 200
    while time.monotonic() < end and len(losses(tmp_path / "run")) < 3 and processes[0].poll() is None:
        time.sleep(0.02)
    assert processes[0].poll() is None, finish(processes)
    processes[1].kill()
    began = time.monotonic()
    (code, _, err), _ = finish(processes)
    assert code not in (0, REQUEUE) and time.monotonic() - began < 60
    assert err.strip()


def test_a_mistake_is_told_once(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    both = finish(start(tmp_path / "full", 2, 2))
    assert [code for code, *_ in both] == [2, 2], both
    assert "not empty and not a run folder" in both[0][2] and "not empty" not in both[1][2]


def test_half_of_what_names_a_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    assert cli.main(arguments(tmp_path / "run")) == 2
    assert "JAX_NUM_PROCESSES" in capsys.readouterr().err
