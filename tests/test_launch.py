"""Launch scripts: what they would do, and that they end as they should. SLURM's: docs/scale.md."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
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
    there = lines[-1][-1].removeprefix("--command=")
    assert "--worker=all" in lines[-1] and there.startswith("nohup venv/bin/ssl-jax pretrain --cluster")
    assert shlex.split(there)[4:6] == ["--config=imagenet:simclr", "--config.train.duration=10 epochs"]


def test_mistakes_in_a_launch_are_told():
    assert "TPU_ZONE: is not set" in launch("tpu_pod.sh", "create", TPU_ZONE="").stderr
    assert "TPU_TYPE: is not set" in launch("tpu_pod.sh", "create", **{**TPU, "TPU_TYPE": ""}).stderr
    unknown = launch("tpu_pod.sh", "begin", **TPU)
    assert unknown.returncode == 2 and "begin: unknown; allowed: create, install" in unknown.stderr
    assert launch("tpu_pod.sh", "start", **TPU).returncode == 2
    for script in ("tpu_pod.sh", "multi_gpu.sh", "slurm.sbatch"):
        assert launch(script).returncode == 2


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
        told = (tmp_path / number).read_text()
        assert told == "localhost:9999 2 pretrain|--config.train.duration=10 epochs"
