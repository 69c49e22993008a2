"""Where a run and a study keep their files, and files that survive a kill."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from ssl_jax.errors import BusyError, UserError
from ssl_jax.files import read_json, read_lines, write_bytes, write_json, write_weights
from ssl_jax.run_folder import RunFolder, StudyFolder
from ssl_jax.testing.tiny import tiny_config
from ssl_jax.train.writers import JsonLines


def test_a_run_is_finished_when_its_encoder_is_there(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.finished() and not run.finished(10)
    write_json(run.encoder / "encoder.json", {"step": 10})
    assert not run.finished()
    write_weights(run.encoder / "encoder.safetensors", {"w": np.ones(3, np.float32)})
    assert run.finished() and run.finished(10) and not run.finished(20)


def test_a_run_follows_files_that_were_moved(tmp_path, capsys):
    run, old, new = RunFolder(tmp_path / "run"), tmp_path / "old", tmp_path / "new"
    config = tiny_config("simclr")

    def start(path, name="folder"):
        run.start(dataclasses.replace(config, data=dataclasses.replace(config.data, name=name, path=str(path))))

    old.mkdir()
    start(old)
    run.metrics.write_text('{"step": 1}\n')
    new.mkdir()
    with pytest.raises(UserError, match=r"holds a run of another config \(config\.data\.path: "):
        start(new)  # the old one is still there
    old.rmdir()
    with pytest.raises(UserError, match="another config"):
        start(tmp_path / "nowhere")
    with pytest.raises(UserError, match="another config"):
        start(new, "chexpert")  # more than the path differs
    assert not capsys.readouterr().out
    start(new)
    assert capsys.readouterr().out == f"config.data.path: {old} is gone; reading {new} instead\n"
    assert run.read_config()["data"]["path"] == str(new)
    start(new)
    assert not capsys.readouterr().out


def test_how_it_reads_and_where_it_computes_may_change(tmp_path):
    run, config = RunFolder(tmp_path / "run"), tiny_config("simclr")
    run.start(config)
    run.metrics.write_text('{"step": 1}\n')
    for key, value in (("workers", 9), ("retries", 0), ("timeout", 1.0)):
        run.start(dataclasses.replace(config, data=dataclasses.replace(config.data, **{key: value})))
    for key, value in (("devices", 2), ("shard", 2)):
        run.start(dataclasses.replace(config, train=dataclasses.replace(config.train, **{key: value})))
    with pytest.raises(UserError, match=r"another config \(config\.data\.shuffle_buffer: "):
        run.start(dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_buffer=5)))


def test_a_path_that_is_a_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    config, run = tiny_config("simclr"), RunFolder(tmp_path / "run")
    run.start(dataclasses.replace(config, data=dataclasses.replace(config.data, name="tfds", path="cifar10")))
    run.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="another config"):
        run.start(dataclasses.replace(config, data=dataclasses.replace(config.data, name="tfds", path="mnist")))


def test_what_never_began_is_decided_anew(tmp_path):
    config, run, values = tiny_config("simclr"), RunFolder(tmp_path / "run"), iter((1, 2))

    def enter():
        with contextlib.ExitStack() as stack:
            return run.enter(config, 20, stack, micro_batch=lambda: next(values))

    assert enter() == {"micro_batch": 1, "decided": ["micro_batch"], "finished": False}
    assert enter() == {"micro_batch": 2, "decided": ["micro_batch"], "finished": False}
    run.metrics.write_text('{"step": 1}\n')
    assert enter() == {"micro_batch": 2, "decided": [], "finished": False}


def test_a_folder_without_config_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json; allowed: a folder made by `ssl-jax pretrain`"):
        RunFolder(tmp_path).read_config()


def test_a_study_holds_cells_and_pretrainings(tmp_path):
    study = StudyFolder(tmp_path)
    assert study.cell("moco", 250, 3) == tmp_path / "cells" / "moco" / "250" / "3.json"
    names = [study.pretraining("moco", number).path.name for number in range(3)]
    assert names == ["moco", "moco-2", "moco-3"]
    assert not study.exists() and study.pretrainings() == []
    for number in (1, 0):
        write_json(study.pretraining("moco", number).config, {})
    assert study.exists() and [run.path.name for run in study.pretrainings()] == ["moco", "moco-2"]


def test_a_lock_keeps_others_out_unless_all_share(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock(), pytest.raises(BusyError, match="another process"), folder.lock(shared=True):
        pass
    with folder.lock(shared=True), folder.lock(shared=True), pytest.raises(BusyError), folder.lock():
        pass


def test_lines_after_the_step_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    JsonLines(tmp_path, 2).scalars(5, {})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 5]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not written"):
        write_bytes(tmp_path / "folder", b"x")
    assert read_json(tmp_path / "a.json") == {"a": 1} and read_json(tmp_path / "missing.json") == {}
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "folder"}
