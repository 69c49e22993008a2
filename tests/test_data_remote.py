"""Images on a server, over HTTP and over S3's protocol: what is read, what is tried again, and what is told."""

import os
import time

import numpy as np
import pytest
import shards_made as made
from remote_server import Server

from ssl_jax.config import Data
from ssl_jax.data import batches, open_source, remote
from ssl_jax.errors import UserError

pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def quick(tmp_path_factory, monkeypatch):
    """No index of another test, no waits of seconds, and nobody's credentials."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A server's folder: the same images as a folder, as tars and as Parquet."""
    root, images = tmp_path_factory.mktemp("server"), made.images(60)
    made.folder(root / "photos" / "train", images)
    made.folder(root / "photos" / "test", made.images(4, 100))
    made.tars(root / "tars", images, each=20)
    made.parquets(root / "parquet", images, each=30, rows=6)
    return root


@pytest.fixture(scope="module")
def running(root):
    with Server(root) as server:
        yield server


@pytest.fixture
def server(running):
    running.heal()
    running.requests.clear()
    return running


def opened(path, name="webdataset", split=None, **options):
    return open_source(Data(name=name, path=str(path), **{"size": 8, **options}), split)


SOURCES = [("webdataset", "tars"), ("webdataset", "tars/train-{000000..000002}.tar"), ("parquet", "parquet")]
SOURCES += [("folder", "photos"), ("webdataset", "tars/train-*.tar")]


def local(root, name, path):
    return opened(root / path, name)


# What is read.


@pytest.mark.parametrize(("name", "path"), SOURCES)
def test_over_http_as_on_this_disk(server, root, name, path):
    there, here = opened(f"{server.url}/{path}", name), local(root, name, path)
    np.testing.assert_array_equal(there.arrays(), here.arrays())
    assert there.names == here.names and there.labels.tolist() == here.labels.tolist()
    assert there.classes == here.classes == ["cat", "dog"]
    for a, b in zip(*(batches(s, batch=16, seed=3, start=2, stop=5) for s in (there, here)), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    assert len(opened(f"{server.url}/{path}", name, limit=7)) == 7


@pytest.mark.parametrize(("name", "path"), SOURCES)
def test_over_s3_as_on_this_disk(server, root, name, path, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    there, here = opened(f"s3://{path}", name), local(root, name, path)
    np.testing.assert_array_equal(there.arrays(), here.arrays())
    assert there.names == here.names and there.labels.tolist() == here.labels.tolist()


def test_only_what_is_needed_is_read(server, root):
    source = opened(f"{server.url}/tars")
    server.requests.clear()
    source.load(5)
    assert server.requests == [("GET", "/tars/train-000000.tar")]
    server.requests.clear()
    opened(f"{server.url}/tars")  # the index is there: sizes and tags are compared, and the first images looked at
    assert {method for method, path in server.requests if path.endswith("2.tar")} == {"HEAD"}


def test_other_parts_of_a_folder(server):
    assert len(opened(f"{server.url}/photos", "folder")) == 60
    assert opened(f"{server.url}/photos", "folder", "test").names[0] == "test/cat/000100.png"
    assert opened(f"{server.url}/photos", "folder", pairs="folder").objects.tolist() == [0] * 30 + [1] * 30


# What is tried again.


FEW = SOURCES[1:4]


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [(kind, *FEW[0]) for kind in (503, 500, 429, "reset", "cut", "hang")]
    + [(k, *s) for k in (503, "cut") for s in FEW[1:]],
)
def test_a_server_that_fails_now_and_then(server, root, kind, name, path):
    """In each of the steps: listing, sizes, index and images."""
    here = list(batches(local(root, name, path), batch=10, seed=0, start=0, stop=3))
    server.fail(kind, times=2)
    there = opened(f"{server.url}/{path}", name, timeout=0.3)
    server.fail(kind, times=2, after=3)
    for a, b in zip(batches(there, batch=10, seed=0, start=0, stop=3, workers=3), here, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    assert not there.skipped and not there.replaced  # what a server fails to send is no damaged image


@pytest.mark.parametrize(("name", "path"), FEW)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (503, "the server answers with status 503 (3 tries)"),
        ("hang", "no answer within 0.1 s (3 tries)"),
        ("reset", "(3 tries)"),
        (404, "no such file"),
        (403, "no permission to read it (status 403)"),
    ],
)
def test_a_server_that_stays_away_is_told_in_one_line(server, name, path, kind, reason):
    source = opened(f"{server.url}/{path}", name, retries=2, timeout=0.1 if kind == "hang" else 30)
    server.fail(kind, where=r"(tar|parquet|png)$", after=2)
    with pytest.raises(UserError) as told:
        list(batches(source, batch=20, seed=0, start=0, stop=3, workers=2))
    assert reason in str(told.value) and f"{server.url}/" in str(told.value) and "\n" not in str(told.value)
    assert not source.skipped
    server.heal()
    again = opened(f"{server.url}/{path}", name)  # threads of before may still wait for their last try
    assert len(list(batches(again, batch=20, seed=0, start=0, stop=3))) == 3


@pytest.mark.parametrize("kind", [503, "reset", 403])
@pytest.mark.parametrize(("name", "path"), SOURCES)
def test_nor_is_a_part_of_the_data_lost_where_they_are_opened(server, name, path, kind):
    server.fail(kind, where="dog|train-000001|train-1", after=1 if name == "folder" else 0)
    with pytest.raises(UserError) as told:
        opened(f"{server.url}/{path}", name, retries=1).arrays()
    assert server.url in str(told.value) and "\n" not in str(told.value)


def test_s3_is_tried_again_in_one_place(server, root, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    source = opened("s3://tars/", retries=2)
    for kind in (503, 500, "reset", "cut"):
        server.fail(kind, times=2)
        np.testing.assert_array_equal(source.load(7), local(root, *SOURCES[0]).load(7))
        server.requests.clear()
        server.fail(kind)
        with pytest.raises(UserError, match=r"s3://tars/train-000000.tar': .*\(3 tries\)$") as told:
            source.load(7)
        # On a connection that was used before and ends, aiohttp asks once more by itself.
        assert len(server.requests) == (6 if kind == "reset" else 3) and "\n" not in str(told.value)
        server.heal()
    server.fail("hang")
    with pytest.raises(UserError, match=r"no answer within 0.2 s \(2 tries\)"):
        opened("s3://tars/train-000000.tar", retries=1, timeout=0.2)


def test_waits_grow(server, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.25)
    server.fail(503)
    with pytest.raises(UserError, match="6 tries"):
        opened(f"{server.url}/tars/train-000000.tar")
    assert len(waits) == 5 and all(0.7 < wait / 0.25 / 2**i < 1.3 for i, wait in enumerate(waits))
    assert [line for line in caplog.messages if "status 503; trying again in 4 s" in line]


def test_a_server_without_ranges(server):
    server.fail("whole")
    with pytest.raises(UserError, match="sends whole files instead of the bytes asked for"):
        opened(f"{server.url}/tars/train-000000.tar")


def test_a_shard_that_changes_on_the_server(tmp_path):
    made.tars(tmp_path, made.images(20), each=20)
    made.parquets(tmp_path, made.images(20), each=20, rows=5)
    with Server(tmp_path) as server:
        tars, parquet = opened(f"{server.url}/"), opened(f"{server.url}/", "parquet", channels=3)
        made.tars(tmp_path, made.images(20, 50), each=20)
        made.parquets(tmp_path, made.images(20, 50), each=20, rows=5)
        for source, name in ((tars, "train-000000.tar"), (parquet, "train-0.parquet")):
            with pytest.raises(UserError, match=f"{name}': changed since the data were opened"):
                source.load_many(range(20))
        (tmp_path / "train-000000.tar").unlink()
        with pytest.raises(UserError, match="train-000000.tar': no such file"):
            tars.load(0)


# Addresses and credentials.


def test_missing_credentials(server, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    with pytest.raises(UserError) as told:
        opened("s3://tars/")
    assert "no permission to read it" in str(told.value) and "AWS_ACCESS_KEY_ID" in str(told.value)
    assert "\n" not in str(told.value)
    monkeypatch.setenv("FSSPEC_S3_ANON", "1")  # a public bucket
    import fsspec

    fsspec.config.set_conf_env(fsspec.config.conf)  # as a new process does
    try:
        assert len(opened("s3://tars/")) == 60
    finally:
        fsspec.config.conf.clear()


def test_refused_credentials(server, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    server.fail(403)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"s3://tars/train-000000.tar': no permission to read it .*AWS_ACCESS_KEY_ID"):
        opened("s3://tars/train-000000.tar")
    assert len(server.requests) == 1 and time.monotonic() - started < 5  # not tried again


def test_addresses_in_messages_hide_secrets(server):
    url = server.url.replace("http://", "http://me:secret@")
    with pytest.raises(UserError) as told:
        opened(f"{url}/gone.tar?X-Amz-Signature=secret")
    assert "secret" not in str(told.value) and f"{server.url}/gone.tar" in str(told.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nonsense://a/b.tar", "Protocol not known: nonsense"),
        ("gs://bucket/a.tar", "pip install fsspec gcsfs"),
        ("{url}/gone.tar", "gone.tar': no such file"),
        ("{url}/gone/", "gone/': no such file"),
        ("{url}/photos", "no .tar file"),
        ("http://127.0.0.1:9/a.tar", "127.0.0.1:9"),
    ],
)
def test_mistakes(server, path, message):
    if path.startswith("gs:"):
        pytest.importorskip("fsspec")
        try:
            import gcsfs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("gcsfs is installed")
    with pytest.raises(UserError) as told:
        opened(path.format(url=server.url), retries=1)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_a_folder_of_shards(server):
    with pytest.raises(UserError, match=f"no images; say webdataset:{server.url}/tars"):
        opened(f"{server.url}/tars", "folder")


def test_options_for_local_folders(server):
    for options, key in (({"bands": ("_a", "_b")}, "bands"), ({"cache": "here"}, "cache")):
        with pytest.raises(UserError, match=f"config.data.{key}=.* allowed with local folders"):
            opened(f"{server.url}/photos", "folder", **options)
