"""Tars in WebDataset's layout and Parquet files, on this disk: what is read, in which order, and what is wrong."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
import shards_made as made
from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data import batches, open_source, order
from ssl_jax.data.blocks import Blocks, Store
from ssl_jax.errors import NoPartError, UserError
from ssl_jax.settings import data_of

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """No index of another test, or of the user."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def opened(path, name="webdataset", split=None, **options):
    return open_source(Data(name=name, path=str(path), **{"size": 8, **options}), split)


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# What is read.


def test_tar_parquet_and_folder_hold_the_same(tmp_path):
    images = made.images(50)
    made.folder(tmp_path / "folder", images)
    made.tars(tmp_path / "tars", images, each=20)
    made.parquets(tmp_path / "parquet", images, each=30, rows=7)
    folder = opened(tmp_path / "folder", "folder")
    tars, parquet = opened(tmp_path / "tars"), opened(tmp_path / "parquet", "parquet")
    np.testing.assert_array_equal(tars.arrays(), folder.arrays())
    np.testing.assert_array_equal(parquet.arrays(), folder.arrays())
    assert folder.labels.tolist() == tars.labels.tolist() == parquet.labels.tolist()
    assert folder.classes == tars.classes == parquet.classes == ["cat", "dog"]
    assert [name.partition("/")[2] for name in tars.names] == folder.names
    assert tars.names[20] == f"train-000001.tar/{folder.names[20]}" and len(tars.names) == 50
    assert parquet.names[29:31] == ["train-0.parquet/29", "train-1.parquet/0"]
    with pytest.raises(IndexError):
        tars.names[50]
    assert np.array(tars.names).tolist() == list(tars.names) == tars.names[:] and "x" not in tars.names


def test_what_belongs_to_a_sample(tmp_path):
    png, jpg = made.encoded(1), made.encoded(2, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "x/1.cls", b"3\n")
        add(tar, "x/1.seg.png", made.encoded(9))  # another file of the sample, not its image
        add(tar, "x/1.PNG", png)
        add(tar, "y/1.jpg", jpg)  # the same name in another folder
        add(tar, "y/1.json", json.dumps({"label": 2, "caption": "a, b"}).encode())
        add(tar, "._y.png", b"what a Mac leaves")
        add(tar, "n" * 150 + ".png", png)  # no label, and too long for the header of a tar
        add(tar, "2.png", png)
        add(tar, "2.json", b"[1]")
    source = opened(tmp_path / "a.tar")
    names = ["x/1.PNG", "y/1.jpg", "n" * 150 + ".png", "2.png"]
    assert source.names == [f"a.tar/{name}" for name in names]
    assert source.labels.tolist() == [3, 2, -1, -1] and source.classes == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(source.load(0), source.load(2))
    with Image.open(io.BytesIO(png)) as image:
        np.testing.assert_array_equal(opened(tmp_path / "a.tar", size=16).load(0), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(tmp_path, form):
    names = ["./é/1.png", "long/" * 30 + "2.png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name in names:
            add(tar, name, made.encoded(7))
    assert opened(tmp_path / "a.tar").names == ["a.tar/é/1.png", f"a.tar/{names[1]}"]


def test_labels_as_text_and_names_of_classes(tmp_path):
    made.tars(tmp_path, made.images(6), each=3, labels=["b", "a", "", "b", "c", "a"])
    source = opened(tmp_path)
    assert source.classes == ["a", "b", "c"] and source.labels.tolist() == [1, 0, -1, 1, 2, 0]
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    source = opened(tmp_path)
    assert source.classes == ["c", "b", "a"] and source.labels.tolist() == [1, 2, -1, 1, 0, 2]
    (tmp_path / "classes.txt").write_text("c\nb\n")
    with pytest.raises(UserError, match="label 'a' is not among"):
        opened(tmp_path)


def test_numbers_that_name_no_class(tmp_path):
    made.tars(tmp_path, made.images(2), each=2, labels=["0", "7"])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"label 7; allowed: 0 to 1, or -1"):
        opened(tmp_path)


def test_parts_by_name(tmp_path):
    for part, first in (("train", 0), ("val", 4)):
        made.tars(tmp_path, made.images(4, first), each=2, part=part)
    assert len(opened(tmp_path)) == len(opened(tmp_path, split="val")) == len(opened(tmp_path, split="test")) == 4
    assert len(opened(tmp_path, split="all")) == 8
    assert len(opened(tmp_path / "val-{000000..000001}.tar")) == 4  # nothing but this is named
    with pytest.raises(NoPartError, match="files with test or val in their names"):
        opened(tmp_path / "train-*.tar", split="test")


def test_patterns(tmp_path):
    made.tars(tmp_path, made.images(6), each=2)
    assert opened(tmp_path / "train-{000000..000002}.tar").names == opened(tmp_path / "train-*.tar").names
    assert len(opened(tmp_path / "train-00000{0,2}.tar")) == 4
    assert len(opened(tmp_path / "train-000001.tar")) == 2 and len(opened(tmp_path, limit=3)) == 3
    assert opened(tmp_path, limit=3).labels.tolist() == opened(tmp_path).labels[:3].tolist()
    for text, kind in (("train-{000000..000002}.tar", "webdataset"), ("", "webdataset"), ("x-*.parquet", "parquet")):
        assert data_of(str(tmp_path / text), "--data", Data()).name == kind
    assert data_of("s3://bucket/photos", "--data", Data()).name == "folder"
    assert data_of("https://host/a-{0..3}.tar", "--data", Data()).name == "webdataset"
    assert data_of("webdataset:gs://bucket/a", "--data", Data()).path == "gs://bucket/a"


def test_columns_of_other_names(tmp_path):
    images = [made.encoded(i) for i in range(4)]
    table = pa.table({"img": images, "fine": ["x", "y", None, "x"], "n": [1.5] * 4})
    pq.write_table(table, tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet", "parquet", labels=("fine",))
    assert source.labels.tolist() == [0, 1, -1, 0] and source.classes == ["x", "y"]
    assert opened(tmp_path / "a.parquet", "parquet").labels is None
    for options, message in (
        ({"image_column": "pic"}, "config.data.image_column='pic': unknown"),
        ({"labels": ("coarse",)}, "config.data.labels='coarse': unknown"),
        ({"labels": ("n",)}, "n is double; allowed: integers or text"),
        ({"labels": ("n", "fine")}, "one column"),
    ):
        with pytest.raises(UserError, match=message):
            opened(tmp_path / "a.parquet", "parquet", **options)


def test_a_row_without_bytes_is_a_damaged_image(tmp_path):
    images = [{"bytes": made.encoded(i) if i != 2 else None, "path": "2.png"} for i in range(5)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=2)
    source = opened(tmp_path, "parquet", max_bad_share=0.5)
    np.testing.assert_array_equal(source.load(2), source.load(3))
    assert source.skipped == ["'a.parquet/2': no bytes in its row"] and source.replaced == {2: 3}


# The index.


def test_a_tar_is_indexed_once(tmp_path, home, monkeypatch):
    made.tars(tmp_path, made.images(6), each=2)
    first = opened(tmp_path).names[:]
    assert len(list((home / "ssl_jax/shards").glob("*.npz"))) == 3

    def refuse(*_, **__):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", refuse)
        assert opened(tmp_path).names == first
    made.tars(tmp_path, made.images(2, 90), each=2)  # the first tar changes
    assert opened(tmp_path).names[0] != first[0] and opened(tmp_path).names[2:] == first[2:]


def test_a_damaged_index_is_made_again(tmp_path, home):
    made.tars(tmp_path, made.images(4), each=2)
    names = opened(tmp_path).names[:]
    for path in (home / "ssl_jax/shards").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    assert opened(tmp_path).names == names
    assert opened(tmp_path, cache=str(tmp_path / "own")).names == names
    assert len(list((tmp_path / "own/shards").iterdir())) == 2


# The order.


def test_blocks_are_a_permutation_and_near_each_other():
    blocks = Blocks([100] * 50 + [30], 500)
    indices = blocks.permutation(3, 7)
    assert sorted(indices.tolist()) == list(range(5030)) and not (indices == blocks.permutation(3, 8)).all()
    np.testing.assert_array_equal(indices, Blocks([100] * 50 + [30], 500).permutation(3, 7))
    block = np.minimum(indices // 100, 50)
    for number in range(51):
        places = np.flatnonzero(block == number)
        assert places[-1] - places[0] < 500 + 100
    # Mixed: in the middle, a batch has images of most blocks that are open, and consecutive images seldom share one.
    assert len(set(block[2000:2064].tolist())) >= 5
    assert np.mean(block[1:] == block[:-1]) < 0.35


def test_reading_in_order_reads_each_block_once():
    sizes, read = [64] * 40, []
    blocks, store = Blocks(sizes, 640), Store(lambda block: read.append(block) or block, sizes, 640 * 1.5 + 128)
    for index in blocks.permutation(0, 0):
        assert store[index // 64] == index // 64
    assert sorted(read) == list(range(40))


def test_the_steps_of_an_epoch(tmp_path):
    made.parquets(tmp_path, made.images(40), each=40, rows=4)
    source = opened(tmp_path, "parquet", shuffle_buffer=12)
    whole = list(batches(source, batch=8, seed=1, start=0, stop=10, workers=2))
    assert sorted(np.concatenate([b["index"] for b in whole[:5]]).tolist()) == list(range(40))
    for step in (3, 7):
        np.testing.assert_array_equal(whole[step]["index"], order(1, 40, 8, step, source.blocks))
        [alone] = batches(opened(tmp_path, "parquet", shuffle_buffer=12), batch=8, seed=1, start=step, stop=step + 1)
        np.testing.assert_array_equal(alone["image"], whole[step]["image"])
    memory = list(batches(source, batch=8, seed=1, start=0, stop=10, decode=False))
    assert all((a["index"] == b["index"]).all() for a, b in zip(whole, memory, strict=True))
    parts = [
        batches(source, batch=8, seed=1, start=0, stop=10, rows=rows) for rows in (np.arange(4), np.arange(4, 8))
    ]  # two processes
    for batch, *both in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([each["image"] for each in both]))
        np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])


def test_a_part_keeps_blocks(tmp_path):
    made.parquets(tmp_path, made.images(40), each=40, rows=4)
    source = opened(tmp_path, "parquet")
    kept = [0, 1, 3, 4, 20, 21, 39]
    part = source.take(kept)
    assert part.blocks.sizes.tolist() == [3, 1, 2, 1] and part.names == [source.names[i] for i in kept]
    np.testing.assert_array_equal(part.load_many(range(7)), source.arrays()[kept])
    assert len(part.take([]).names) == 0


def test_a_buffer_that_does_not_fit(tmp_path):
    made.parquets(tmp_path, made.images(40), each=40, rows=4)
    with pytest.raises(UserError, match=r"config.data.shuffle_buffer=10000: .* config.data.memory_gb=1e-06"):
        opened(tmp_path, "parquet", memory_gb=1e-6)


# What is wrong.


@pytest.mark.parametrize("member", [20, 21])
def test_a_truncated_tar(tmp_path, caplog, member):
    """In an image, and in the label behind it."""
    made.tars(tmp_path, made.images(40), each=20)
    path = tmp_path / "train-000001.tar"
    with tarfile.open(path) as tar:
        at, name = tar.getmembers()[member].offset_data, tar.getmembers()[20].name
    os.truncate(path, at + 2)
    with pytest.raises(UserError, match=f"1 of 31 files unreadable .*'train-000001.tar/{name}': cut off: the tar ends"):
        opened(tmp_path)
    source = opened(tmp_path, max_bad_share=0.1)
    assert len(source) == 30 and len(source.skipped) == 1
    assert [line for line in caplog.messages if f"{name}': cut off" in line and line.endswith("skipped")]
    assert [line for line in caplog.messages if path.name in line and "does not end like a tar" in line]
    for batch in batches(source, batch=8, seed=0, start=0, stop=9):
        assert batch["image"].shape == (8, 8, 8, 3)


def test_a_tar_that_is_damaged_in_the_middle(tmp_path, caplog):
    """Tarfile ends there without a word."""
    made.tars(tmp_path, made.images(20), each=20)
    [path] = tmp_path.glob("*.tar")
    with tarfile.open(path) as tar:
        at = tar.getmembers()[20].offset
    content = bytearray(path.read_bytes())
    content[at : at + 512] = b"\xff" * 512
    path.write_bytes(content)
    assert len(opened(tmp_path)) == 10
    assert "does not end like a tar" in caplog.text


def test_a_shard_that_changes_is_noticed(tmp_path):
    made.tars(tmp_path / "a", made.images(20), each=20)
    made.parquets(tmp_path / "b", made.images(20), each=20, rows=5)
    tars, parquet = opened(tmp_path / "a"), opened(tmp_path / "b", "parquet", channels=3)
    made.tars(tmp_path / "a", made.images(20, 50), each=20)
    made.parquets(tmp_path / "b", made.images(19, 50), each=20, rows=5)
    for source, name in ((tars, "train-000000.tar"), (parquet, "train-0.parquet")):
        with pytest.raises(UserError, match=f"{name}': changed since the data were opened") as told:
            list(batches(source, batch=4, seed=0, start=0, stop=3, workers=2))
        assert "\n" not in str(told.value)


def test_a_shard_that_vanishes(tmp_path):
    made.tars(tmp_path / "a", made.images(20), each=20)
    made.parquets(tmp_path / "b", made.images(20), each=20, rows=5)
    for source in (opened(tmp_path / "a"), opened(tmp_path / "b", "parquet", channels=3)):
        for path in (*tmp_path.glob("*/*.tar"), *tmp_path.glob("*/*.parquet")):
            path.unlink(missing_ok=True)
        with pytest.raises(UserError, match="No such file"):
            list(batches(source, batch=4, seed=0, start=0, stop=1))
        made.parquets(tmp_path / "b", made.images(20), each=20, rows=5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", b"", "a.tar': empty"),
        ("a.tar", b"no tar at all" * 100, "a.tar': not a tar"),
        ("a.tar.gz", gzip.compress(bytes(10240)), "compressed (gzip), which has no random access; unpack it first"),
        ("a.tgz", gzip.compress(bytes(10240)), "compressed (gzip)"),
        ("a.tar", bytes(10240), "no images"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet': not Parquet, or cut short"),
        ("a.parquet", b"", "a.parquet': not Parquet, or cut short"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as told:
        opened(tmp_path / name, "parquet" if "parquet" in name else "webdataset")
    assert message in str(told.value) and name in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "config.data.path='': missing"),
        ({"path": "{root}"}, "no .tar file"),
        ({"path": "{root}/gone.tar"}, "gone.tar': No such file"),
        ({"path": "{root}/a-{{3..1}}.tar"}, "counts down"),
        ({"path": "{root}/*.tar"}, "no .tar file"),
        ({"path": "{root}", "bands": ("_a", "_b")}, "config.data.bands=('_a', '_b'): allowed with folder and csv"),
    ],
)
def test_mistakes(tmp_path, options, message):
    options = options | {"path": options["path"].format(root=tmp_path)}
    with pytest.raises(UserError) as told:
        opened(**options)
    assert message in str(told.value)


def test_a_truncated_parquet_names_the_file(tmp_path):
    made.parquets(tmp_path, made.images(20), each=10, rows=5)
    path = tmp_path / "train-1.parquet"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"train-1.parquet': not Parquet, or cut short"):
        opened(tmp_path, "parquet")


def test_images_that_cannot_be_decoded_are_replaced(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(6):
            add(tar, f"{i}.png", made.encoded(i) if i != 2 else b"no image")
        add(tar, "7.txt", b"no image among its files")
    source = opened(tmp_path, max_bad_share=0.5)
    np.testing.assert_array_equal(source.load(2), source.load(3))
    assert source.skipped[0] == "'a.tar/7.txt': no image among its files" and "a.tar/2.png" in source.skipped[1]
