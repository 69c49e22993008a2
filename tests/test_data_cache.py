"""The cache gives the same images as the files, survives kills and damage, and follows the files when they change."""

import json
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data import batches, cache, open_source
from ssl_jax.data import decoding as image_files
from ssl_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """30 JPEGs, in a folder beside the cache's."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(30):
        put(folder / f"{i:02}.jpg", i)
    return folder


def put(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    Image.fromarray(pixels).resize((20, 20)).save(path)


def opened(photos, **changes):
    return open_source(data(photos, **changes))


def data(photos, **changes):
    usual = {"cache": str(photos.parent / "cache"), "size": 8, "channels": 1}
    return Data(name="folder", path=str(photos), **{**usual, **changes})


@pytest.fixture
def decoded(monkeypatch):
    """How many images were decoded so far, as a list."""
    calls = []

    def counted(*args):
        calls.append(1)
        return real(*args)

    real = image_files.decode
    monkeypatch.setattr(image_files, "decode", counted)
    return calls


def store(photos):
    return next((photos.parent / "cache").iterdir())


def test_same_images_as_without_and_decoded_once(photos, decoded):
    plain = opened(photos, cache="").arrays()
    assert len(decoded) == 30
    first, second = opened(photos), opened(photos)
    assert len(decoded) == 60
    np.testing.assert_array_equal(first.arrays(), plain)
    np.testing.assert_array_equal(second.arrays(), plain)
    assert len(decoded) == 60
    assert (store(photos) / "images.u8").stat().st_size == 30 * 8 * 8


def test_both_engines_of_the_batches(photos, decoded):
    opened(photos)
    source = opened(photos)
    decoded_batches = list(batches(source, batch=7, seed=1, start=0, stop=4, workers=2))
    memory = source.arrays()
    for batch in decoded_batches:
        np.testing.assert_array_equal(batch["image"], memory[batch["index"]])
    assert len(decoded) == 30


def test_parts_and_limits_share_what_is_there(photos, decoded):
    opened(photos, limit=10)
    opened(photos, limit=25)
    assert len(decoded) == 25


def test_a_file_that_changes_is_decoded_again(photos, decoded):
    opened(photos)
    put(photos / "03.jpg", 99)
    put(photos / "30.jpg", 100)
    source = opened(photos)
    assert len(decoded) == 32
    np.testing.assert_array_equal(source.arrays(), opened(photos, cache="").arrays())
    assert (store(photos) / "images.u8").stat().st_size == 31 * 8 * 8  # the changed one kept its place


@pytest.mark.parametrize("changes", [{"size": 9}, {"channels": 3}, {"window": "percentile"}])
def test_other_settings_are_another_store(photos, changes):
    opened(photos)
    source = opened(photos, **changes)
    np.testing.assert_array_equal(source.arrays(), opened(photos, cache="", **changes).arrays())
    assert len(list((photos.parent / "cache").iterdir())) == 2


def test_damage_on_the_disk_is_noticed_and_repaired(photos, caplog):
    plain = opened(photos).arrays()
    images = store(photos) / "images.u8"
    content = bytearray(images.read_bytes())
    content[5 * 64 + 3] ^= 1
    images.write_bytes(content[: 29 * 64 + 10])  # one bit of image 5, and the end is missing
    np.testing.assert_array_equal(opened(photos).arrays(), plain)
    assert [m for m in caplog.messages if "05.jpg" in m and "damaged in the cache" in m]
    caplog.clear()
    np.testing.assert_array_equal(opened(photos).arrays(), plain)
    assert not caplog.messages


def test_damage_and_a_file_that_changed_since(photos, caplog):
    """The image comes from the file as it is now, and the next opening puts it into the cache."""
    source = opened(photos)
    images = store(photos) / "images.u8"
    images.write_bytes(images.read_bytes()[: 29 * 64])
    put(photos / "29.jpg", 99)
    fresh = opened(photos, cache="").load(29)
    np.testing.assert_array_equal(source.load(29), fresh)
    np.testing.assert_array_equal(opened(photos).load(29), fresh)
    assert len([m for m in caplog.messages if "damaged" in m]) == 1


def test_unreadable_files_are_told_as_without(photos, decoded):
    whole = (photos / "07.jpg").read_bytes()
    (photos / "07.jpg").write_bytes(whole[:-40])  # the header is sound
    with pytest.raises(UserError, match="'07.jpg': .*truncated"):
        opened(photos).arrays()
    plain, cached = (opened(photos, cache=c, max_bad_share=0.1) for c in ("", str(photos.parent / "cache")))
    count = len(decoded)
    np.testing.assert_array_equal(cached.arrays(), plain.arrays())
    assert cached.replaced == plain.replaced == {7: 8}
    assert len(decoded) == count + 31  # by the plain one: of the cache's file it is known already


def test_torn_index_loses_one_line(photos, decoded):
    opened(photos)
    index = store(photos) / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    plain = opened(photos).arrays()
    assert len(decoded) == 31
    np.testing.assert_array_equal(plain, opened(photos, cache="").arrays())
    assert [json.loads(line)[3] for line in index.read_text().splitlines()] == list(range(30))


def test_killed_while_filling(photos, decoded, monkeypatch):
    """SIGKILL after 8 of 30 images: those are not decoded again."""
    code = f"""
import os, signal
from ssl_jax.data import decoding as image_files
from ssl_jax.data import cache, open_source
from ssl_jax.config import Data
cache.GROUP, real = 4, image_files.decode
def decode(content, *rest, calls=[]):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(content, *rest)
image_files.decode = decode
open_source({data(photos, workers=1)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    source = opened(photos)
    assert len(decoded) == 22
    np.testing.assert_array_equal(source.arrays(), opened(photos, cache="").arrays())


def test_two_processes_fill_it_together(photos, decoded):
    """The second waits for the first, and finds its images."""
    with cache.Store(photos.parent / "cache" / "8x8x1-auto-v1", (8, 8, 1)).filling():
        code = f"""
from ssl_jax.data import open_source
from ssl_jax.config import Data
s = open_source({data(photos)!r})
print(int(s.arrays().sum()))
"""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        other = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        for line in other.stderr:
            if "waiting" in line:
                break
    said, _ = other.communicate()
    assert int(said) == opened(photos).arrays().sum() and not decoded


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_folder_that_cannot_be_made(photos, place):
    (photos.parent / "file").write_text("x")
    with pytest.raises(UserError, match="config.data.cache="):
        opened(photos, cache=str(photos.parent / place))


def test_too_small_a_disk_is_told_before(photos, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(UserError, match="30 images need .* GB"):
        opened(photos)
