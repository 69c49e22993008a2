"""Trackers without a network: what is written is read back with the tracker's own means, and nothing leaves."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_jax.errors import UserError
from ssl_jax.files import read_lines
from ssl_jax.train import writers
from ssl_jax.train.writers import Background, JsonLines, open_writers

CONFIG = {"method": {"name": "byol"}, "train": {"batch": 64, "shard": False}, "model": {"mean": [0.5]}, "data": {}}
PARAMS = {"method.name": "byol", "train.batch": 64, "train.shard": False, "model.mean": "[0.5]"}
FIRST = {1: 1.0, 2: 0.5, 3: 0.4, 4: 0.3}
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture(scope="module")
def network():
    """A stand-in for the outside world: every address that a proxy would reach leads here, and is noted."""
    asked = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                asked.append(connection.recv(200).split(b"\r\n")[0].decode())

    threading.Thread(target=listen, daemon=True).start()
    yield server.getsockname()[1], asked
    server.close()


@pytest.fixture(autouse=True)
def offline(monkeypatch, network, tmp_path_factory):
    """No connection of this process leaves the machine; attempts of its children, like W&B's core, are noted too."""
    connect, (port, asked) = socket.socket.connect, network

    def inside(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(str(address))
            raise OSError(f"no network in this test: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", inside)
    monkeypatch.setattr(socket.socket, "connect_ex", inside)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    asked.clear()
    yield
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()  # it keeps its first settings as long as the process lives
    expected = [line for line in asked if "expected.invalid" in line]
    assert asked == expected


def train(folder, names, start, values, close=True):
    """What a run does to its writers from step `start`."""
    opened = open_writers(names, folder, CONFIG, start)
    for writer in opened:
        if not start:
            writer.image(0, "views", PICTURE)
        for step, loss in values.items():
            writer.scalars(step, {"epoch": step / 2, "loss": loss, "knn_auc": None})
            writer.scalars(step, {"images_per_s": 100.0 * step}, "timing")
        writer.scalars(max(values), {"collapsed": "all alike"})
        if close:
            writer.close()
    return opened


def trained_twice(folder, names):
    """A run that is killed at step 4, after its checkpoint of step 2, and continued."""
    train(folder, names, 0, FIRST)
    train(folder, names, 2, {3: 0.4, 4: 0.3, 5: math.nan})
    assert [line["step"] for line in read_lines(folder / "timing.jsonl")] == [1, 2, 3, 4, 5]


def test_json_lines(tmp_path):
    trained_twice(tmp_path, "")
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines if "loss" in line] == [1.0, 0.5, 0.4, 0.3, None]
    assert lines[0] == {"step": 1, "epoch": 0.5, "loss": 1.0, "knn_auc": None}
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.splitlines()[0] == '{"step": 1, "epoch": 0.5, "loss": 1.0, "knn_auc": null}'
    assert text.splitlines()[-1] == '{"step": 5, "collapsed": "all alike"}'
    assert (tmp_path / "timing.jsonl").read_text().splitlines()[1] == '{"step": 2, "images_per_s": 200.0}'
    # A line that a kill has torn is forgotten; the folder holds nothing of trackers.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    JsonLines(tmp_path, 4).close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "timing.jsonl"}


def test_nothing_is_imported_unless_asked_for(tmp_path):
    code = "import sys; from pathlib import Path; from ssl_jax.train.writers import open_writers\n"
    code += "open_writers('', Path(sys.argv[1]), {}, 0)\n"
    code += "print([m for m in ('wandb', 'mlflow', 'tensorboardX', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", writers.TRACKERS)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "tensorboardX" if name == "tensorboard" else name, None)
    with pytest.raises(UserError) as error:
        open_writers(name, tmp_path, {}, 0)
    assert str(error.value) == f"config.log='{name}': needs {name}: pip install 'ssl_jax[{name}]'"


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"config.log='wandbb': unknown; did you mean 'wandb'\? available: mlflow, tens"
    ):
        open_writers("tensorboard, wandbb", tmp_path, {}, 0)
    assert not list(tmp_path.iterdir())


def test_wandb_without_a_login_is_a_mistake(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match=r"^config.log='wandb': .*login.* WANDB_MODE=offline keeps the run"):
        open_writers("wandb", tmp_path / "run", {}, 0)


class Broken:
    """A tracker that has lost its server, and answers late."""

    def __init__(self, *_):
        self.calls = 0

    def scalars(self, *_):
        time.sleep(0.1)
        self.calls += 1
        raise ConnectionError("the server is gone\nand more")

    image = scalars

    def close(self):
        self.calls += 1


def test_a_tracker_that_fails_warns_once_and_delays_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setitem(writers.TRACKERS, "broken", Broken)
    lines, tracker = open_writers("broken", tmp_path, {}, 0, said.append)
    began = time.monotonic()
    for step in range(5):
        tracker.scalars(step, {"loss": 1.0})
    tracker.image(5, "views", PICTURE)
    assert time.monotonic() - began < 0.1
    tracker.close()
    assert tracker.tracker.calls == 7
    assert said == ["warning: config.log='broken': the server is gone; training continues without it"]


def test_the_end_does_not_wait_for_ever(tmp_path, monkeypatch):
    said, go_on = [], threading.Event()

    class Stuck(Broken):
        def scalars(self, *_):
            go_on.wait()

    monkeypatch.setattr(writers, "CLOSE_SECONDS", -4.8)
    tracker = Background("stuck", Stuck(), said.append)
    tracker.scalars(1, {"loss": 1.0})
    tracker.close()
    go_on.set()
    assert len(said) == 1 and "not everything could be sent" in said[0]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    pytest.importorskip("tensorboard")
    trained_twice(tmp_path, "tensorboard")
    found = events(tmp_path)
    loss = found.Scalars("loss")
    assert [event.step for event in loss] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([event.value for event in loss], [1.0, 0.5, 0.4, 0.3, math.nan], rtol=1e-6)
    assert all(math.isnan(event.value) for event in found.Scalars("knn_auc"))
    assert [event.value for event in found.Scalars("timing/images_per_s")] == [100, 200, 300, 400, 500]
    assert [event.step for event in found.Images("views")] == [0]
    (picture,) = found.Images("views")
    (tmp_path / "back.png").write_bytes(picture.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back.png")), PICTURE)
    assert found.Tensors("collapsed/text_summary")[-1].tensor_proto.string_val[0] == b"all alike"
    info = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert all(key.encode() in info for key in PARAMS)
    # A run that starts anew, as before its first checkpoint, leaves nothing of what it did before.
    train(tmp_path, "tensorboard", 0, {1: 1.0})
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [1]
    assert [event.step for event in events(tmp_path).Images("views")] == [0]


def wandb_records(folder):
    """All records of a folder's offline runs, oldest first: LevelDB's log format around W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        data, at, message, block = path.read_bytes(), 7, b"", 32768
        while at + 7 <= len(data):
            if block - at % block < 7:
                at += block - at % block
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            message += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # a whole message, or the last part of one
                records.append(Record.FromString(message))
                message = b""
    return records


def wandb_history(folder, count):
    """All rows, when there are `count`, or after half a minute: W&B's own process may still be writing."""
    end = time.monotonic() + 30
    while len(rows := wandb_rows(folder)) < count and time.monotonic() < end:
        time.sleep(0.2)
    return rows


def wandb_rows(folder):
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num, items))
    return rows


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    trained_twice(tmp_path, "wandb")
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    rows = wandb_history(tmp_path, 6)
    assert [step for step, _ in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["loss"] for _, row in rows[1:-1]] == [1.0, 0.5, 0.4, 0.3]
    assert math.isnan(rows[-1][1]["loss"]) and math.isnan(rows[1][1]["knn_auc"])
    assert [row["timing/images_per_s"] for _, row in rows[1:]] == [100, 200, 300, 400, 500]
    assert rows[-1][1]["collapsed"] == rows[-2][1]["collapsed"] == "all alike"
    picture = next(tmp_path.glob("wandb/offline-run-*/files/" + rows[0][1]["views.path"]))
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), PICTURE)
    runs = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    assert {run.run_id for run in runs} == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
    assert len(runs) == 2 and runs[0].display_name == tmp_path.name and runs[0].project == "ssl_jax"
    config = {entry.key: json.loads(entry.value_json) for entry in runs[0].config.update}
    assert {key: config[key] for key in PARAMS} == PARAMS
    # A picture of the finished run comes as the next step: W&B takes no earlier one.
    for writer in open_writers("wandb", tmp_path, CONFIG, 5):
        writer.image(5, "neighbours", tmp_path / "picture.png")
        writer.close()
    step, row = wandb_history(tmp_path, 7)[-1]
    assert step == 6 and row["neighbours.width"] == 5


def test_wandb_survives_a_signal(tmp_path):
    """A scheduler signals the whole group of processes; the run then saves, closes its writers and ends."""
    pytest.importorskip("wandb")
    code = f"""
import signal, sys, time
from pathlib import Path
from ssl_jax.train.writers import open_writers
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
writers = open_writers("wandb", Path({str(tmp_path)!r}), {{"a": 1}}, 0)
for writer in writers:
    writer.scalars(1, {{"loss": 1.0}})
print("ready", flush=True)
while not stopped:
    time.sleep(0.05)
for writer in writers:
    writer.scalars(2, {{"loss": 0.5}})
    writer.close()
sys.exit(75)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    process.stdout.close()
    assert [(step, row["loss"]) for step, row in wandb_history(tmp_path, 2)] == [(1, 1.0), (2, 0.5)]


def test_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    folder.mkdir()
    trained_twice(folder, "mlflow")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ssl_jax").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {key: str(value) for key, value in PARAMS.items()}
    assert run.data.tags["collapsed"] == "all alike"
    history = client.get_metric_history(run.info.run_id, "loss")
    # Steps past the checkpoint are there twice, with the same values: MLflow forgets nothing.
    assert sorted((m.step, m.value) for m in history if m.step < 5) == sorted([*FIRST.items(), (3, 0.4), (4, 0.3)])
    assert [math.isnan(m.value) for m in history if m.step == 5] == [True]
    assert {m.value for m in client.get_metric_history(run.info.run_id, "timing/images_per_s")} >= {100.0, 500.0}
    pictures = [a.path for a in client.list_artifacts(run.info.run_id, "images") if a.path.endswith(".png")]
    assert len(pictures) == 1
    picture = Image.open(client.download_artifacts(run.info.run_id, pictures[0]))
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), PICTURE)
    assert list((folder / "mlflow").rglob("*.png"))
    assert list(Path.cwd().glob("mlruns")) == []

    # The server has lost the run: a new one.
    client.delete_run(run.info.run_id)
    (folder / "mlflow.json").write_text('{"id": "0123456789abcdef0123456789abcdef"}')
    train(folder, "mlflow", 2, {3: 0.4})
    runs = client.search_runs([client.get_experiment_by_name("ssl_jax").experiment_id])
    assert [r.info.run_id for r in runs] == [json.loads((folder / "mlflow.json").read_text())["id"]]


def test_a_server_out_of_reach_is_left_out(tmp_path, monkeypatch, network):
    pytest.importorskip("mlflow")
    said = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://expected.invalid")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (lines,) = open_writers("mlflow", tmp_path, CONFIG, 0, said.append)
    assert isinstance(lines, JsonLines)
    assert len(said) == 1 and said[0].startswith("warning: config.log='mlflow': API request to http://expected.invalid")
    assert network[1]  # so what goes out is seen here
