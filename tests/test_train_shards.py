"""Whole runs on shards and servers: the same as on files, also after a kill or while the server was away."""

import signal
import time

import forked
import pytest
import shards_made as made
from remote_server import Server

from ssl_jax import cli
from ssl_jax.checkpoint import read_metadata, steps
from ssl_jax.data import remote
from ssl_jax.files import read_lines
from ssl_jax.train import hooks

pytest.importorskip("aiohttp")

TINY = {
    "data.size": 16, "data.engine": "disk", "data.shuffle_buffer": 24, "data.retries": 1,
    "model.name": "ssl_jax.testing.model", "method.hidden": 16, "method.out": 8, "augment.preset": "small",
    "train.batch": 16, "train.duration": "20 steps", "train.log_every": "1 steps", "train.save_every": "5 steps",
    "train.devices": 1, "eval.every": "0 steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, images = tmp_path_factory.mktemp("server"), made.images(72)
    made.folder(root / "folder", images)
    made.tars(root / "tars", images, each=20)
    made.parquets(root / "parquet", images, each=40, rows=6)
    return root


@pytest.fixture(scope="module")
def server(root):
    with Server(root) as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(hooks, "write_views", lambda *_: None)


def arguments(workdir, data, **changes):
    flags = [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]
    return ["pretrain", "simclr", str(data), f"--workdir={workdir}", *flags]


def result(workdir):
    """Fingerprints of all arrays of the last checkpoint, and the metrics."""
    saved = workdir / "checkpoints" / f"{steps(workdir / 'checkpoints')[-1]:09d}"
    return read_metadata(saved.absolute())["arrays"], (workdir / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """Uninterrupted runs on this disk: of the files, and of Parquet."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(hooks, "write_views", lambda *_: None)
        for name in ("folder", "parquet"):
            workdir = tmp_path_factory.mktemp(name) / "run"
            assert cli.main(arguments(workdir, root / name)) == 0
            made[name] = result(workdir)
    return made


@pytest.mark.parametrize("data", ["{root}/tars", pytest.param("{url}/folder", marks=pytest.mark.slow)])
def test_tars_and_servers_train_as_files_do(whole, root, server, tmp_path, data):
    """Tars on a server, too: see those that are killed."""
    assert cli.main(arguments(tmp_path / "run", data.format(root=root, url=server.url))) == 0
    assert result(tmp_path / "run") == whole["folder"]


def test_parquet_in_memory(whole, server, tmp_path):
    """The order is another one than that of files, as row groups are read whole, but the same with both engines."""
    assert whole["parquet"] != whole["folder"]
    data = f"{server.url}/parquet/train-*.parquet"
    assert cli.main(arguments(tmp_path / "run", data, **{"data.engine": "memory"})) == 0
    assert result(tmp_path / "run") == whole["parquet"]


@pytest.mark.parametrize(("name", "data"), [("folder", "tars"), ("parquet", "parquet")])
def test_killed_it_ends_bit_identical(whole, server, tmp_path, name, data):
    data = f"{'parquet' if name == 'parquet' else 'webdataset'}:{server.url}/{data}"
    process = forked.Python(forked.SLOWLY, *arguments(tmp_path / "run", data))
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if len(read_lines(tmp_path / "run/metrics.jsonl")) >= 8 and steps(tmp_path / "run/checkpoints"):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < steps(tmp_path / "run/checkpoints")[-1] < 20
    assert cli.main(arguments(tmp_path / "run", data)) == 0
    assert result(tmp_path / "run") == whole[name]


def test_a_server_that_goes_away_and_a_file_that_vanishes(whole, root, tmp_path, capfd):
    """Each time the run ends with one line; the same command goes on from the last checkpoint."""
    saved = 0
    with Server(root) as server:
        data = f"webdataset:{server.url}/tars"
        for kind, told, after in ((503, "status 503 (2 tries)", 200), (404, "no such file", 40)):
            server.fail(kind, where="train-00000.*tar$", method="GET", after=after)
            assert cli.main(arguments(tmp_path / "run", data)) == 2
            [line] = [line for line in capfd.readouterr().err.splitlines() if "tars/train-00000" in line]
            assert told in line
            assert saved <= (saved := steps(tmp_path / "run/checkpoints")[-1]) < 20 and saved
            server.heal()
        server.fail("cut", times=1, method="GET", after=5)  # and now and then it stumbles
        assert cli.main(arguments(tmp_path / "run", data)) == 0
    assert result(tmp_path / "run") == whole["folder"]
