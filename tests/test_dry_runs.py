"""--dry-run: says what a command would do, and leaves nothing behind."""

import dataclasses

import pytest

from ssl_jax.cli import main
from ssl_jax.commands import study
from ssl_jax.encoder import export, random_encoder
from ssl_jax.run_folder import RunFolder
from ssl_jax.testing.tiny import tiny_config

TINY = [
    "--config.data.name=synthetic", "--config.data.limit=48", "--config.data.size=8", "--config.data.channels=1",
    "--config.model.name=ssl_jax.testing.model", "--config.train.batch=16", "--config.train.devices=1",
    "--config.method.hidden=16", "--config.method.out=8", "--config.augment.preset=grayscale",
]  # fmt: skip


def test_pretrain(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["pretrain", "simclr", "--dry-run", f"--workdir={run}", "--epochs=10", *TINY]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["data"].startswith("48 images of 8x8 px, 1 channel, 4 classes: disc 12, square")
    assert "simclr, ssl_jax.testing.model: " in lines["model"] and lines["length"].startswith("30 steps of 16 images")
    assert "as the compiler counts, of" in lines["memory"] and "per epoch" in lines["time"]
    assert lines["writes"].startswith(f"{run}, about") and not run.exists()


def test_finetune(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    config = tiny_config("simclr", model__name="ssl_jax.testing.model")
    RunFolder(run).start(config)
    export(run / "encoder", random_encoder(config.model, 8, 1, 0))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["finetune", f"--workdir={run}", "--data=synthetic", f"--out={out}", "--dry-run"]
    assert main([*arguments, "--config.finetune.batch=8", "--config.finetune.epochs=1"]) == 0
    printed = capsys.readouterr().out
    assert "4 trainings of 600 steps of 8 images" in printed and "time      about" in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_study(tmp_path, capsys):
    folder, config = tmp_path / "study", tiny_config("simclr", model__name="ssl_jax.testing.model")
    arms = {"a": {"optim": {"lr": 0.1}}, "scratch": {}}
    study(dataclasses.replace(config, study=dataclasses.replace(config.study, arms=arms)), str(folder), dry_run=True)
    printed = capsys.readouterr().out
    assert "2 arms: a, scratch; 1 pretrainings" in printed and "\na:\n" in printed and not folder.exists()
