"""Launch scripts: what they would do, and that they end as they should. Tried under SLURM: benchmarks/scale.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
TPU = {"TPU_ZONE": "us-central1-a", "TPU_TYPE": "v5litepod-64", "TPU_VERSION": "v2-alpha-tpuv5-lite"}


def launch(script, *args, **environment):
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_a_dry_run_prints_every_command_of_a_tpu_slice():
    given = ("pretrain", "--config=imagenet:simclr", "--config.train.duration=10 epochs")
    done = launch("tpu_pod.sh", "--dry-run", "resume", *given, **TPU, TPU_SPOT="1", TPU_PROJECT="mine")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[4] for line in lines] == ["delete", "create", "scp", "ssh", "ssh"]
    assert all(line[0] == "gcloud" and "--zone=us-central1-a" in line and "--project=mine" in line for line in lines)
    assert {"--spot", "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(lines[1])
    remote = lines[-1][-1].removeprefix("--command=")
    assert "--worker=all" in lines[-1] and remote.startswith("nohup venv/bin/ssl-jax pretrain --cluster")
    assert shlex.split(remote)[4:6] == ["--config=imagenet:simclr", "--config.train.duration=10 epochs"]


def test_mistakes_are_one_line_or_the_usage():
    assert "TPU_ZONE: is not set" in launch("tpu_pod.sh", "create", TPU_ZONE="").stderr
    assert "TPU_TYPE: is not set" in launch("tpu_pod.sh", "create", **{**TPU, "TPU_TYPE": ""}).stderr
    unknown = launch("tpu_pod.sh", "begin", **TPU)
    assert unknown.returncode == 2 and "begin: unknown; allowed: create, install" in unknown.stderr
    assert launch("tpu_pod.sh", "start", **TPU).returncode == 2
    for script in ("tpu_pod.sh", "multi_gpu.sh", "slurm.sbatch"):
        usage = launch(script)
        text = usage.stdout + usage.stderr
        assert usage.returncode == 2 and f"launch/{script}" in text
        assert "SBATCH" not in text and "pipefail" not in text  # the comment at the top and no more


def test_the_commands_of_the_page_work(tmp_path):
    """docs/scale.md: tpu_pod.sh runs dry, the other scripts start a program that notes its arguments."""
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nprintf "%s|" "$@" > "{tmp_path}/given"\n')
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    for file in (program, tmp_path / "srun"):
        file.chmod(0o755)
    text = (ROOT / "docs" / "scale.md").read_text().replace("\\\n", "")
    commands = re.findall(
        r"^.*launch/.*\.(?:sh|sbatch) .*$", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)), re.M
    )
    assert len(commands) == 8
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        script, after = re.fullmatch(r".*launch/(\w+\.\w+) ([^#]*?)(?: *#.*)?", command).groups()
        args = shlex.split(after)
        if script == "tpu_pod.sh":
            done = launch(script, "--dry-run", *args, **TPU)
            assert done.stdout.count("gcloud compute tpus") >= 1
        else:
            done = launch(script, *args, SSL_JAX=str(program), HOSTS="localhost", SLURM_ARRAY_TASK_ID="3", PATH=path)
            given = (tmp_path / "given").read_text().split("|")[:-1]
            assert given == [arg.replace("%a", "3") for arg in args] and given[0] in ("pretrain", "study")
        assert done.returncode == 0, done.stderr


def test_hosts_get_numbers_and_the_worst_code_is_returned(tmp_path):
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "mine = os.environ['JAX_PROCESS_ID']\n"
        f"open(r'{tmp_path}/' + mine, 'w').write(os.environ['JAX_COORDINATOR_ADDRESS'] + ' ' + "
        "os.environ['JAX_NUM_PROCESSES'] + ' ' + '|'.join(sys.argv[1:]))\n"
        "sys.exit(75 if mine == '1' else 0)\n"
    )
    program.chmod(0o755)
    given = {"HOSTS": "localhost localhost", "PORT": "9999", "SSL_JAX": str(program)}
    done = launch("multi_gpu.sh", "pretrain", "--config.train.duration=10 epochs", **given)
    assert done.returncode == 75, done.stderr
    for number in "01":
        assert (tmp_path / number).read_text() == "localhost:9999 2 pretrain|--config.train.duration=10 epochs"
