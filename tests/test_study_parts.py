"""The study in parts (SLURM arrays), with several pretrainings, and its configs."""

import collections
import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_study import toy_config, toy_run, toy_tables

from ssl_jax import cli, study
from ssl_jax.config import Data, Study, resolve
from ssl_jax.config_file import load_config
from ssl_jax.data import open_source, phantom
from ssl_jax.encoder import export, load_encoder, model_of, random_encoder
from ssl_jax.errors import UserError
from ssl_jax.run_folder import RunFolder, StudyFolder

SETTINGS = Study(arms={"a": {}, "b": {}, "c": {}}, labels=(10, 20, 50), seeds=4)


def test_parts_are_the_whole_and_share_the_long_cells():
    whole = study.list_cells(SETTINGS)
    assert whole[:4] == [("a", 10, 0), ("b", 10, 0), ("c", 10, 0), ("a", 20, 0)] and len(whole) == 36
    for n in (1, 2, 3, 5, 7, 9, 40):
        parts = [study.list_cells(SETTINGS, (k, n)) for k in range(1, n + 1)]
        assert sorted(p for part in parts for p in part) == sorted(whole)
        long = [sum(p.labels == 50 for p in part) for part in parts]
        assert max(long) - min(long) <= 1 and all(
            [p.seed for p in part] == sorted(p.seed for p in part) for part in parts
        )


def test_parts_together_write_the_tables_of_one_process(tmp_path):
    config = toy_config(labels=(6, 12), seeds=2, finetune={"lr": (1e-2,), "steps": 3})
    toy_run(config, tmp_path / "whole")
    for k in (2, 3, 1):
        asked, lines, rows = toy_run(config, tmp_path / "parts", part=(k, 3))
        assert len(lines) in (2, 3) and rows == [] and not (tmp_path / "parts" / "summary.csv").exists()
        assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}]")
    _, lines, _ = toy_run(config, tmp_path / "parts")
    assert len(lines) == 8 and all("(reused)" in line for line in lines)
    assert toy_tables(tmp_path / "parts") == toy_tables(tmp_path / "whole")


def test_seeds_take_turns_with_the_pretrainings(tmp_path):
    config = toy_config(labels=(6,), seeds=3, pretrainings=2, finetune={"lr": (1e-2,), "steps": 2})
    asked, _, _ = toy_run(config, tmp_path)
    assert asked == [("good", 0), ("good", 1), ("scratch", 0), ("scratch", 1), ("scratch", 2)]
    needed = study.pretrainings(config)
    assert {key: made.train.seed for key, made in needed.items()} == {("good", 0): 1, ("good", 1): 2}
    words = (tmp_path / "summary.md").read_text()
    assert "has 2 encoders" in words and "somewhat too narrow" in words
    more = dataclasses.replace(config, study=dataclasses.replace(config.study, pretrainings=9, seeds=1))
    assert list(study.pretrainings(more)) == [("good", 0)]  # no more than there are seeds


def test_the_test_data_are_another_split_of_the_same_data():
    config = toy_config()
    config = dataclasses.replace(config, data=Data(name="csv", path="x.csv", limit=7, pairs="person", size=32))
    made = study.data_of_test(config)
    assert made == Data(name="csv", path="x.csv", split="test", size=32)


def test_the_test_data_are_elsewhere():
    own = Data(name="csv", path="x.csv", labels=("a", "b"), group="who", limit=7, size=32, window="percentile")

    def made(**test):
        changed = dataclasses.replace(toy_config().study, test=Data(**{"name": "", "split": "test", **test}))
        return study.data_of_test(dataclasses.replace(toy_config(), data=own, study=changed))

    there = dataclasses.replace(own, path="y.csv", split="test", limit=0)
    assert made(path="y.csv") == made(path="y.csv", name="csv") == there
    assert made(path="y.csv", group="whose", split="val") == dataclasses.replace(there, group="whose", split="val")
    assert made(name="folder", path="z") == Data("folder", "z", split="test", size=32, window="percentile")


def test_all_images_of_test_data_without_parts(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for number in range(count):
            Image.new("L", (8, 8), number).save(tmp_path / f"{part}{number}.png")
        lines = [f"{part}{number}.png,{number % 2}" for number in range(count)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *lines]))
    data = Data(name="csv", path=str(tmp_path / "train.csv"), size=8)
    config = dataclasses.replace(toy_config(), data=data)
    with pytest.raises(UserError, match="no test part"):  # and not the training images
        study.open_test(config, 8, 1)
    elsewhere = dataclasses.replace(config.study.test, path=str(tmp_path / "test.csv"))
    config = dataclasses.replace(config, study=dataclasses.replace(config.study, test=elsewhere))
    assert study.open_test(config, 8, 1).names == ["test0.png", "test1.png"]


def test_figures_and_words_say_phantom(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "phantom.json").write_text('{"phantom": true, "seed": 3, "patients": 7}')
    config = toy_config(labels=(6,), seeds=1, finetune={"lr": (1e-2,), "steps": 2})
    for path in (tmp_path / "data", tmp_path / "data" / "train.csv", tmp_path / "else", ""):
        found = phantom(Data(name="chexpert", path=str(path)))
        assert (found is not None) == ("data" in str(path).split("/")[-2:])
    config = dataclasses.replace(config, data=Data(name="npz", path=str(tmp_path / "data" / "x.npz")))
    titles = collections.Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.set_title", lambda self, text, **_: titles.update([text.split()[0]]))
        patch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **_: titles.update([text.split()[0]]))
        toy_run(config, tmp_path / "study", pictures=True)
    assert titles["Phantoms:"] == 3  # two titles of the curve, one of the gains
    assert "they say nothing about patients" in (tmp_path / "study" / "summary.md").read_text()
    assert json.loads((tmp_path / "study" / "study.json").read_text())["phantom"]["seed"] == 3


STUDY = """
from ssl_jax.config import default
def get_config():
    config = default("simclr")
    config.data.update({"name": "synthetic", "size": 16, "channels": 1, "limit": 60})
    config.study.test.limit = 30
    config.augment.preset = "grayscale"
    config.model.name = "ssl_jax.testing.model"
    config.method.update({"hidden": 16, "out": 8})
    config.train.update({"batch": 16, "duration": "2 steps", "devices": 1})
    config.finetune.update({"steps": 2, "epochs": 20, "batch": 8, "lr": (1e-3,)})
    config.study.arms = {"scratch": {}, "simclr": {"train": {"seed": 1}}}
    config.study.update({"labels": (12,), "seeds": 2, "pretrainings": 2})
    return config
"""


def _untrained(config, workdir, source):
    """In place of train.fit: what it leaves behind, without the training."""
    with RunFolder(workdir).lock():
        RunFolder(workdir).start(config)
        size, channels = source.shape[0], source.shape[2]
        export(workdir / "encoder", random_encoder(config.model, size, channels, config.train.seed))
        return load_encoder(workdir)


def test_tasks_of_an_array_share_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ssl_jax.train.fit", _untrained)
    (tmp_path / "study.py").write_text(STUDY)
    folder = tmp_path / "out"
    args = ("study", f"--config={tmp_path / 'study.py'}", f"--workdir={folder}")
    for wrong in ("3/2", "1/0", "-1/2", "one"):
        assert cli.main([*args, f"--cells={wrong}"]) == 2
        assert "allowed: K/N with K from 1 to N" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, "--cells=1/2"])
    assert stopped.value.code == 75 and "first run the same command with --cells=0/2" in capsys.readouterr().out
    with StudyFolder(folder).pretraining("simclr").lock():  # a task pretrains this one; the other is left
        assert cli.main([*args, "--cells=0/2"]) == 0
    assert "simclr: another process is working on it; skipped" in capsys.readouterr().out
    assert {p.name for p in (folder / "pretrain").iterdir() if (p / "encoder").is_dir()} == {"simclr-2"}
    assert cli.main([*args, "--cells=0/2"]) == 0 and cli.main([*args, "--cells=1/2"]) == 0
    with StudyFolder(folder).lock(shared=True):  # another task at work: it may go on beside us, but not be summed up
        assert cli.main([*args, "--cells=2/2"]) == 0
        assert cli.main([*args]) == 2
    assert "another process is working in this folder" in capsys.readouterr().err
    assert cli.main([*args]) == 0
    told = capsys.readouterr().out
    assert told.count("(reused)") == 4 and "report.html" in told
    page = (folder / "report.html").read_text()
    assert "Label-efficiency study" in page and "Pretraining of simclr-2" in page


def test_an_arm_may_pretrain_on_other_data(tmp_path, monkeypatch):
    given = {}

    def fit(config, workdir, source):
        given[workdir.name] = (config.data.limit, len(source))
        return _untrained(config, workdir, source)

    monkeypatch.setattr("ssl_jax.train.fit", fit)
    (tmp_path / "study.py").write_text(
        STUDY.replace("    return config", '    config.study.arms["few"] = {"data": {"limit": 16}}\n    return config')
    )
    args = ("study", f"--config={tmp_path / 'study.py'}", f"--workdir={tmp_path / 'out'}")
    assert cli.main([*args, "--cells=0/1"]) == 0
    assert given["few"] == (16, 16) and given["simclr"][1] > 16


@pytest.mark.parametrize(
    ("spec", "arms"),
    [
        ("study_chexpert", ["moco", "triplet"]),
        ("study_chexpert:phantom", ["moco", "moco_crop", "moco_patient", "triplet"]),
        ("study_chexpert:phantom,byol", ["byol"]),
    ],
)
def test_the_config_for_chest_x_rays(spec, arms):
    made = resolve(load_config(spec, ["--config.data.path=DIR"]))
    assert [p.arm for p in study.list_cells(made.study)[: len(arms) + 1]] == ["supervised", *arms]
    assert study.data_of_test(made).path == str(Path("DIR").absolute())
    assert study.from_scratch(made.study.arms["supervised"]) and made.data.labels == ("study",)
    pretrained = study.pretrainings(made)
    assert [key for key in pretrained] == [(arm, 0) for arm in arms]
    for (arm, _), of in pretrained.items():
        assert of.method_name == arm.split("_")[0] and of.model.name == "resnet18" and of.augment.preset == "chest_xray"
        assert of.data.pairs == ("patient" if arm.endswith("patient") else "")
    assert made.study.labels[0] == 250 and made.study.seeds == 10


def test_phantoms_pass_through_the_readers_and_the_study(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ssl_jax.train.fit", _untrained)
    data, folder = tmp_path / "phantoms", tmp_path / "study"
    assert cli.main(["phantom", f"--out={data}", "--patients=12", "--size=32", "--test=16"]) == 0
    smaller = [
        "data.size=32",
        "model.name=ssl_jax.testing.model",
        "finetune.steps=2",
        "finetune.epochs=0",
        "study.labels=(10,)",
    ]
    flags = [f"--config.{change}" for change in [*smaller, f"data.path={data}", "study.seeds=1"]]
    assert cli.main(["study", "--config=study_chexpert:phantom", *flags, f"--workdir={folder}"]) == 0
    truth, about = np.load(folder / "test.npz"), json.loads((folder / "study.json").read_text())
    assert len(truth["names"]) == 16 and "patient9" in truth["names"][0] and truth["labels"].shape == (16, 10)
    assert truth["groups"][0] != truth["groups"][-1] and about["phantom"]["patients"] == 12
    assert (folder / "summary.md").read_text().startswith("# Label efficiency on phantom images")
    assert "Label-efficiency study on phantom images" in (folder / "report.html").read_text()


@pytest.fixture
def run_and_study(tmp_path):
    """A finished run, and a function that runs a study of these arms, flags beside it, and returns its exit code."""
    config = resolve(runpy.run_path(str(_write(tmp_path / "study.py", STUDY)))["get_config"]())
    model = dataclasses.replace(config.model, width=2.0)
    _untrained(dataclasses.replace(config, model=model), tmp_path / "run", open_source(config.data))

    def study_of(arms, *flags):
        text = STUDY.replace("    return config", f"    config.study.arms = {arms!r}\n    return config")
        spec = _write(tmp_path / "study.py", text)
        return cli.main(["study", f"--config={spec}", f"--workdir={tmp_path / 'out'}", *flags])

    return tmp_path / "run", study_of


def _write(path, text):
    path.write_text(text)
    return path


def test_an_arm_from_a_finished_run(run_and_study, tmp_path, monkeypatch, capsys):
    """Its encoder serves all seeds, is named in the summary, and is not pretrained again."""
    run, study_of = run_and_study
    monkeypatch.setattr("ssl_jax.train.fit", lambda *_: pytest.fail("pretrained"))
    monkeypatch.chdir(tmp_path)
    arms = {"scratch": {}, "mine": {"from": "run", "finetune": {"steps": 3}}}
    assert study_of(arms) == 0
    assert "[4/4]  mine, 12 labels, seed 1: top-1" in capsys.readouterr().out
    summary = StudyFolder("out").summary_md.read_text()
    assert f"each with one encoder for all seeds: mine from {run}." in summary
    assert "A pretrained arm uses one encoder for all seeds" in summary
    assert "random encoder of mine" in (tmp_path / "out" / "references.csv").read_text()  # another network: its own
    monkeypatch.chdir("/")
    assert study_of({**arms, "mine": {**arms["mine"], "from": str(run)}}) == 0
    assert capsys.readouterr().out.count("(reused)") == 4
    other = random_encoder(model_of(load_encoder(run).about), 16, 1, seed=9)
    export(run / "encoder", other)
    assert study_of({**arms, "mine": {**arms["mine"], "from": str(run)}}) == 0
    assert capsys.readouterr().out.count("(reused)") == 2  # those from scratch


def test_mistakes_in_an_arm_from_a_run(run_and_study, tmp_path, capsys):
    run, study_of = run_and_study
    (tmp_path / "begun" / "checkpoints" / "000000005").mkdir(parents=True)
    for changes, flags, message in [
        ({"from": f"{tmp_path}/no"}, (), f"mine: from={tmp_path}/no: no encoder.json; allowed: a folder made by"),
        ({"from": f"{tmp_path}/begun"}, (), f"mine: from={tmp_path}/begun: no encoder.json; the run has not ended"),
        (
            {"from": str(run)},
            ("--config.data.size=8",),
            "size=16, channels=1; allowed: those of config.data, size=8",
        ),
        ({"from": str(run), "optim": {"lr": 0.1}}, (), "arms: mine: optim.lr: not expected beside 'from'"),
        ({"from": 3}, (), "config.study.arms: mine: from=3: allowed: the path of a run folder"),
        (3, (), "config.study.arms: mine=3: allowed: a mapping"),
    ]:
        assert study_of({"scratch": {}, "mine": changes}, *flags) == 2
        told = capsys.readouterr().err.strip()
        assert message in told and "\n" not in told
    assert not (tmp_path / "out" / "cells").exists()
