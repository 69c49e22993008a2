"""Files that a command leaves behind, with a bit flipped, cut short, emptied: one line, or made anew, never wrong."""

import contextlib
import dataclasses
import json
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_report import add_evaluation, make_run
from toy_study import toy_config, toy_run, toy_tables

from ssl_jax import checkpoint, classifier, cli, files, study, train
from ssl_jax.config import Data, Model
from ssl_jax.data.cache import Store, cached
from ssl_jax.encoder import export, load_encoder, random_encoder
from ssl_jax.errors import DamagedError, UserError
from ssl_jax.evaluate.finetuning import Classifier
from ssl_jax.parallel import make_mesh
from ssl_jax.report.html import read_run, write_report
from ssl_jax.run_folder import RunFolder
from ssl_jax.testing.tiny import Images, tiny_config
from ssl_jax.train.step import encoder_of

WEIGHTS = {"conv1.weight": np.arange(12, dtype=np.float32).reshape(3, 4) + 1, "bn1.bias": np.float32([0.5, -2])}
ABOUT = {"size": 28, "mean": [0.25, 1e-5], "method": "simclr", "chosen": {"lr": None, "head": True}, "labels": {7: "a"}}
METRICS = "metrics.jsonl"
VIT = {"name": "vit_tiny", "width": 1 / 16, "depth": 1, "patch": 4}


@pytest.fixture(autouse=True)
def warnings_where_caplog_sees_them(monkeypatch):
    """The command line, in other tests, sends them elsewhere."""
    monkeypatch.setattr(logging.getLogger("ssl_jax"), "propagate", True)


def damages(path, count=None):
    """Puts each kind of damage on a file in turn, and yields its name: a flipped bit in every byte, or in `count`."""
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    places = range(len(sound)) if count is None else generator.choice(len(sound), count, replace=False)
    for place in places:
        content = bytearray(sound)
        content[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
        yield f"{path.name}: byte {place}"
    for length in sorted({0, 1, len(sound) // 3, len(sound) // 2, len(sound) - 2}):
        path.write_bytes(sound[:length])
        yield f"{path.name}: cut to {length} bytes"
    path.write_bytes(sound)


def is_told(error, path):
    text = str(error)
    return text.startswith(f"{path}: damaged (") and "; " in text and "\n" not in text


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# The files themselves.


def equal_json(a, b):
    """Whether b is a, but for the name of the digest, which a flipped bit may have made a key of its own."""
    return a.items() <= b.items() and len(b) <= len(a) + 1


READERS = {
    "a.json": (lambda path: files.write_json(path, ABOUT), files.read_json, equal_json),
    "a.npz": (lambda path: files.write_npz(path, **WEIGHTS), lambda path: files.read_npz(path, WEIGHTS), same),
    "a.safetensors": (lambda path: files.write_weights(path, WEIGHTS), files.read_weights, same),
}


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_anywhere_is_told_or_changes_nothing(tmp_path, name):
    write, read, equal = READERS[name]
    path = tmp_path / name
    write(path)
    sound, told = read(path), 0
    for what in damages(path, 150):
        try:
            assert equal(sound, read(path)), what
        except DamagedError as error:
            assert is_told(error, path), (what, error)
            told += 1
    assert told > 80  # the rest is in blanks, in dates, in what a .zip says twice
    assert equal(sound, read(path))
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"damaged \(empty\); restore it from a copy"):
        read(path)


def test_tables_and_texts_that_cannot_be_read_are_told(tmp_path):
    table, text = tmp_path / "a.csv", tmp_path / "a.md"
    files.write_csv(table, ["arm", "top1"], [["näme, odd", 0.25], ["b", 1]])
    assert files.read_csv(table) == [["arm", "top1"], ["näme, odd", "0.25"], ["b", "1"]]
    for what in damages(table):
        try:
            assert {len(row) for row in files.read_csv(table)} <= {1, 2, 3}, what
        except DamagedError as error:
            assert is_told(error, table), what
    for content in (b"", b"\n", b"a,b\n1\n", b"a\0b\n", b"\xff\xfe", b'"a\n'):
        table.write_bytes(content)
        with pytest.raises(DamagedError):
            files.read_csv(table)
    text.write_bytes(b"caf\xe9")
    with pytest.raises(DamagedError, match="not text"):
        files.read_text(text)


def test_files_without_a_digest_are_read_as_they_are(tmp_path, caplog):
    """Other programs write none, and whoever edits a JSON file removes it."""
    path = tmp_path / "torch.safetensors"
    safetensors.numpy.save_file(WEIGHTS, path)
    for _ in range(2):
        assert same(files.read_weights(path), WEIGHTS)
    assert caplog.messages == [f"{path}: has no digest, so damage to it would go unnoticed"]
    (tmp_path / "a.json").write_text('{"size": 32}')
    assert files.read_json(tmp_path / "a.json") == {"size": 32}


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path):
    path = tmp_path / "a.safetensors"
    for value in (np.nan, np.inf):
        broken = {**WEIGHTS, "fc.bias": np.float32([0, value])}
        with pytest.raises(UserError, match=r"a\.safetensors: not written \(fc\.bias is NaN or infinite\)"):
            files.write_weights(path, broken)
        assert not path.exists()
        safetensors.numpy.save_file(broken, path)
        with pytest.raises(DamagedError, match="fc.bias is NaN or infinite"):
            files.read_weights(path)
        path.unlink()


def test_a_write_reaches_the_disk_with_its_name(tmp_path, monkeypatch):
    """Before the file has its name, its bytes are there; then the names of the file and of its new folders are."""
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append((Path(f"/proc/self/fd/{handle}").readlink(), path.exists()))
        real(handle)

    path = tmp_path / "new" / "folder" / "a.json"
    monkeypatch.setattr(os, "fsync", fsync)
    files.write_json(path, ABOUT)
    temporary = path.with_name(f".a.json.{platform.node()}.{os.getpid()}")
    below = [(tmp_path, False), (tmp_path / "new", False)]
    assert synced == [*below, (temporary, False), (path.parent, True)]
    files.write_bytes(path, b"x", durable=False)
    assert len(synced) == 4 and path.read_bytes() == b"x"


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here, elsewhere = platform.node(), "other-host.example"
    old = {f".a.json.{here}.{dead.pid}", f".a.json.{here}.{os.getpid()}", f".b.npz.{elsewhere}.77"}
    kept = {f".a.json.{here}.1", f".c.npz.{elsewhere}.77", ".lock", ".hidden", "a.json.1.2", f".a.json.{here}"}
    for name in old | kept:
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / f".b.npz.{elsewhere}.77", (1, 1))
    files.remove_leftovers(tmp_path, tmp_path / "missing")
    assert {path.name for path in tmp_path.iterdir()} == kept


# An encoder, a classifier, a run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, config) of a run as `fit` leaves it, with the first parameters for the last, as training takes long."""
    folder = RunFolder(tmp_path_factory.mktemp("finished") / "run")
    config = tiny_config("simclr", **{f"model__{key}": value for key, value in VIT.items()}, train__duration="2 steps")
    setup = train.set_up(config, Images())
    state = train.init_state(setup, 0, make_mesh(1, 16))._replace(step=jax.numpy.int32(2))
    with contextlib.ExitStack() as stack:
        folder.enter(config, 2, stack, conv=lambda: "native")
    checkpoint.save(folder.checkpoints, 2, state, keep=1)
    as_run = dataclasses.replace(config, model=dataclasses.replace(config.model, conv="native"))
    export(folder.encoder, encoder_of(setup, as_run, state))
    return folder.path, config


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished[0], tmp_path / "run")
    return RunFolder(tmp_path / "run"), finished[1]


def test_a_damaged_encoder_never_embeds(run):
    folder, _ = run
    images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
    sound = load_encoder(folder.path).embed(images)
    for path in (folder.encoder / "encoder.safetensors", folder.encoder / "encoder.json"):
        told = 0
        for what in damages(path, 40):
            try:
                np.testing.assert_array_equal(load_encoder(folder.path).embed(images), sound, err_msg=what)
            except UserError as error:
                assert is_told(error, path) and "`ssl-jax pretrain` command again" in str(error), what
                told += 1
        assert told > 30


def test_pretraining_again_makes_a_damaged_export_anew(run, caplog):
    folder, config = run
    weights, about = folder.encoder / "encoder.safetensors", folder.encoder / "encoder.json"
    sound = {path: path.read_bytes() for path in (weights, about)}
    flipped = bytearray(sound[weights])
    flipped[-9] ^= 4
    (folder.encoder / f".encoder.json.{platform.node()}.{os.getpid()}").write_text("{")
    for path, content, said in [(weights, flipped, "differs from its digest"), (about, b"", "empty")]:
        path.write_bytes(content)
        assert not folder.finished()
        train.fit(config, folder.path, Images())
        assert caplog.messages == [f"{path}: damaged ({said}); made anew from a checkpoint"]
        caplog.clear()
        assert {p: p.read_bytes() for p in folder.encoder.iterdir()} == sound
    weights.unlink()
    train.fit(config, folder.path, Images())
    assert {p: p.read_bytes() for p in folder.encoder.iterdir()} == sound and "missing" in caplog.text
    caplog.clear()
    train.fit(config, folder.path, Images())
    assert not caplog.messages


def test_a_damaged_config_is_written_anew_for_the_same_config_only(run, caplog):
    folder, config = run
    sound = folder.config.read_bytes()
    other = tiny_config(
        "simclr", **{f"model__{k}": v for k, v in VIT.items()}, train__duration="2 steps", optim__lr=0.1
    )
    for what in damages(folder.config, 6):
        with pytest.raises(
            DamagedError, match=r"config\.json: damaged .*; restore it from a copy, or remove the folder"
        ):
            folder.start(other)
        with pytest.raises(DamagedError, match="run its `ssl-jax pretrain` command again, which makes it anew"):
            folder.read_config()
        folder.start(config)
        assert folder.config.read_bytes() == sound, what
        assert caplog.messages[-1].endswith("; written anew")
    folder.config.unlink()
    with pytest.raises(UserError, match="not empty and not a run folder"):
        folder.start(other)
    folder.start(config)
    assert folder.config.read_bytes() == sound
    files.write_json(folder.environment, {})  # nothing says any more what the run began with
    folder.config.write_bytes(sound[:100])
    with pytest.raises(DamagedError):
        folder.start(config)


def test_a_damaged_environment_is_begun_anew(run, caplog):
    folder, _ = run
    for what in damages(folder.environment, 5):
        caplog.clear()
        folder.record_environment(conv="native")
        assert len(folder.read_environment()["commands"]) == 1, what
        assert len(caplog.messages) == 1 and "begun anew" in caplog.text, what


def test_a_damaged_classifier_never_predicts(tmp_path):
    encoder = random_encoder(Model(**VIT), 8, 1, 0)
    head = {"w": np.ones((12, 3), np.float32), "b": np.zeros(3, np.float32)}
    made = Classifier(encoder, {"encoder": encoder.params, "head": head}, encoder.stats, {"lr": 0.1})
    with pytest.raises(UserError, match=r"no classifier\.json; allowed: a folder made by `ssl-jax finetune`"):
        classifier.load_classifier(tmp_path)
    classifier.save_weights(tmp_path, made)
    with pytest.raises(UserError, match=r"no classifier\.json; its `ssl-jax finetune` command has not ended"):
        classifier.load_classifier(tmp_path)
    about = {**encoder.about, "classes": ["a", "b", "c"], "chosen": {"lr": 0.1}}
    about = json.loads(json.dumps(about))
    classifier.save_about(tmp_path, about)
    for name in ("classifier.safetensors", "classifier.json"):
        path, told = tmp_path / name, 0
        for what in damages(path, 20):
            try:
                again = classifier.load_classifier(tmp_path)
                assert equal_json(about, again.about), what
                assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(made.params))), what
            except UserError as error:
                assert is_told(error, path) and "remove the folder and run its `ssl-jax finetune`" in str(error), what
                told += 1
        assert told > 15
    broken = made._replace(params={"encoder": encoder.params, "head": {**head, "b": np.float32([0, np.nan, 0])}})
    with pytest.raises(UserError, match=r"fc\.bias is NaN"):
        classifier.save_weights(tmp_path / "broken", broken)


def test_what_a_killed_finetune_left_is_no_obstacle(tmp_path):
    out = tmp_path / "out"
    classifier.begin_classifier(out, "--out")  # there is none yet
    out.mkdir()
    for name in (*classifier.PARTS, f".classifier.safetensors.{platform.node()}.{os.getpid()}"):
        (out / name).write_text("cut sh")
    classifier.begin_classifier(out, "--out")
    assert not list(out.iterdir())
    for name in ("test.csv", "classifier.json", "notes.txt", f".test.csv.{platform.node()}.1"):  # not ours, or complete
        (out / name).write_text("x")
        with pytest.raises(UserError, match=f"--out={out}: exists already; allowed: a new folder"):
            classifier.begin_classifier(out, "--out")
        assert [path.name for path in out.iterdir()] == [name]
        (out / name).unlink()


# The report, the study, the cache, the checkpoints.


def test_the_report_leaves_out_what_is_damaged(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    add_evaluation(folder)
    add_evaluation(folder, "knn-30")
    evaluation, environment, metrics = (folder / n for n in ("evaluation/linear-30.json", "environment.json", METRICS))
    for what in damages(evaluation, 5):
        caplog.clear()
        assert [made["protocol"] for made in read_run(RunFolder(folder)).evaluations] == ["knn"], what
        assert len(caplog.messages) == 1 and is_told(caplog.messages[0], evaluation) and "evaluate" in caplog.text
    lines = metrics.read_bytes().splitlines(keepends=True)
    for name, damaged in [
        ("no object", b"7\n"),
        ("no step", lines[-2].replace(b'"step"', b'"stfp"')),
        ("step 0", lines[0].replace(b'"step": 10', b'"step": 0')),
        ("torn", lines[-2][:20] + b"\n"),
        ("not text", lines[-2].replace(b"step", b"\xf3tep")),
    ]:
        caplog.clear()
        metrics.write_bytes(b"".join([*lines[:-2], damaged]))
        assert read_run(RunFolder(folder)).steps[-1]["step"] == 390, name
        assert caplog.messages == [f"{metrics}: 1 of {len(lines) - 1} lines are damaged and left out"], name
    evaluation.write_bytes(b"")
    environment.write_bytes(b"{")
    metrics.write_bytes(b"".join(lines).replace(b"embedding_std", b"embedding_rtd"))
    caplog.clear()
    assert "No step has been logged yet" in write_report(folder).read_text()
    assert [is_told(said, path) for said, path in zip(caplog.messages, (evaluation, environment), strict=True)]


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    for what in damages(folder / "config.json", 3):
        assert cli.main(["report", f"--workdir={folder}"]) == 2, what
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "config.json: damaged (" in said[0] and "again, which makes it anew" in said[0]


@pytest.fixture
def tables_only(monkeypatch):
    """Figures take long."""
    monkeypatch.setattr(study, "write_all", study.write_tables)


def test_a_damaged_cell_is_run_again_and_said(tmp_path, tables_only):
    config = toy_config(protocol="linear_quick", labels=(6,))
    toy_run(config, tmp_path)
    tables = toy_tables(tmp_path)
    arm = tmp_path / "cells" / "good" / "6"
    key = files.read_json(arm / "0.json")["key"]
    sound = study._load(arm / "0.json", key, pytest.fail)
    for path in (arm / "0.json", arm / "0.npz"):
        for what in damages(path, 40):
            said = []
            found = study._load(arm / "0.json", key, said.append)
            if found is None:
                assert len(said) == 1 and said[0].startswith(f"{path}: damaged (") and said[0].endswith(" again"), what
            else:
                assert equal_json(sound, found) and not said, what
    (arm / "1.json").write_bytes(b"")
    for name, other in (("0", "1"), ("1", "0")):  # sound files that do not belong together
        (tmp_path / "cells" / "scratch" / "6" / f"{name}.npz").rename(tmp_path / f"{other}.npz")
    for name in ("0", "1"):
        (tmp_path / f"{name}.npz").rename(tmp_path / "cells" / "scratch" / "6" / f"{name}.npz")
    _, lines, _ = toy_run(config, tmp_path)
    assert sum("(reused)" in line for line in lines) == 1 and toy_tables(tmp_path) == tables
    assert sum(line.endswith("damaged (is not of this cell); running the cell again") for line in lines) == 2
    assert f"{arm / '1.json'}: damaged (empty); running the cell again" in lines


def test_a_study_makes_its_own_files_anew(tmp_path, tables_only):
    config = toy_config(protocol="linear_quick", labels=(6,), seeds=1)
    toy_run(config, tmp_path)
    names = ("study.json", "config.json", "summary.md", "summary.csv", "test.npz")
    sound = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names[:-1]:
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DamagedError, match=f"{name}: damaged .empty.; run its `ssl-jax study` command again"):
            write_report(tmp_path)
        (tmp_path / name).write_bytes(sound[name])
    for name in names:
        (tmp_path / name).write_bytes(b"")
    toy_run(config, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == sound


def test_a_damaged_index_of_the_cache_costs_only_time(tmp_path, caplog):
    paths = [tmp_path / f"{i:02}.bin" for i in range(6)]
    for path in paths:
        path.write_bytes(b"same size")
        os.utime(path, (1, 1))  # and the same time: only the names tell them apart
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    decoded = []

    def decode(index):
        decoded.append(index)
        return images[index]

    data = Data(cache=str(tmp_path / "cache"), workers=1)

    def read():
        decoded.clear()
        caplog.clear()
        load = cached([(path,) for path in paths], decode, (4, 4, 1), data)
        np.testing.assert_array_equal([load(i) for i in range(6)], images)
        return len(decoded), len(caplog.messages)

    assert read() == (6, 0) and read() == (0, 0)
    store = next((tmp_path / "cache").iterdir())
    index = store / "index.jsonl"
    for what in damages(index, 60):
        again, said = read()
        assert 1 <= again <= 6, what
        assert said == 1 or "cut" in what or b"\n" not in index.read_bytes()[-1:], (what, caplog.text)
        assert read() == (0, 0), what
    (store / f".index.jsonl.{platform.node()}.{os.getpid()}").write_text("x")
    index.write_bytes(b"")
    assert read() == (6, 1) and "empty or missing; all images are decoded again" in caplog.text
    assert {path.name for path in store.iterdir()} == {"images.u8", "index.jsonl", ".lock"}
    assert len(Store(store, (4, 4, 1)).index) == 6


def test_a_step_can_be_removed_a_second_time(tmp_path, monkeypatch):
    """The first removal of step 1 was cut short, and what it left cannot be removed at once either."""
    state = {"w": jax.numpy.ones(3)}
    half = tmp_path / "000000001.removed" / "d"
    half.mkdir(parents=True)
    (half / "array").write_text("x")
    with monkeypatch.context() as failing:
        failing.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        for step in (1, 2):
            checkpoint.save(tmp_path, step, state, keep=1)
        checkpoint.save(tmp_path, 1, state, keep=2)
        checkpoint.save(tmp_path, 3, state, keep=1)
        assert checkpoint.steps(tmp_path) == [3] and len(list(tmp_path.glob("*.removed*"))) >= 3
    (tmp_path / "000000009.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.restore_latest(tmp_path, state, pytest.fail) is not None  # the next start
    assert [path.name for path in tmp_path.iterdir()] == ["000000003"]
