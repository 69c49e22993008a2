"""Input as nobody should have it: pipes among images, files that promise too much, rows that contradict each other."""

import dataclasses
import io
import json
import logging
import os
import socket
import struct
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssl_jax import files
from ssl_jax.audit.command import _print_lesions
from ssl_jax.audit.masks import find_lesions, open_masks
from ssl_jax.augment import draw, ops, render
from ssl_jax.config import Data, View, default, from_json, resolve, to_json
from ssl_jax.data import decoding as image_files
from ssl_jax.data import open_source
from ssl_jax.data.labelled import labelled_part
from ssl_jax.data.source import MAX_BYTES
from ssl_jax.errors import UnreadableError, UserError
from ssl_jax.run_folder import RunFolder


def fails(data: Data, *words: str) -> None:
    with pytest.raises(UserError) as error:
        open_source(data).arrays()
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    for word in words:
        assert word in line, f"{word!r} not in: {line}"


def put(path, value=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), value).save(path)
    return path


def folder(path, **changes) -> Data:
    return Data(name="folder", path=str(path), **{"size": 8, **changes})


@pytest.fixture
def said(caplog):
    """The warnings so far, each of one line."""

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        assert all(message.isprintable() for message in messages)
        return messages

    caplog.set_level(logging.WARNING, "ssl_jax")
    return lines


# What is no file


@pytest.mark.parametrize("headers", [10_000, 2])
def test_pipes_and_sockets_among_images_are_never_opened(tmp_path, monkeypatch, said, headers):
    monkeypatch.setattr("ssl_jax.data.folder.MAX_HEADERS", headers)
    for i in range(4):
        put(tmp_path / f"{i}.png", i)
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
        source = open_source(folder(tmp_path, max_bad_share=0.5))
        assert source.names == ["0.png", "1.png", "2.png", "3.png"] and len(source.arrays()) == 4
        assert said() == [f"{name!r}: not a file; skipped" for name in ("pipe.png", "socket.png")]
        fails(folder(tmp_path), "2 of 6 files unreadable", "'pipe.png': not a file")


@pytest.mark.parametrize("name,file", [("csv", "a.csv"), ("npz", "a.npz")])
def test_a_pipe_as_the_data(tmp_path, name, file):
    os.mkfifo(tmp_path / file)
    fails(Data(name=name, path=str(tmp_path / file)), file, "not a file")


def test_a_pipe_among_masks(tmp_path):
    source = open_source(folder(put(tmp_path / "images" / "a.png").parent))
    (tmp_path / "masks" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "masks" / "a" / "Nodule.png")
    with pytest.raises(UserError, match="Nodule.png': cannot be read as a mask .not a file"):
        find_lesions(source, open_masks(str(tmp_path / "masks"), source, folder(tmp_path / "images")), 1, 0)


def test_a_damaged_image_with_a_mask_is_passed_over(tmp_path):
    Image.effect_noise((64, 64), 60).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1500])
    put(tmp_path / "sound.png")
    put(tmp_path / "masks" / "cut.png", 255), put(tmp_path / "masks" / "sound.png", 255)
    table = tmp_path / "table.csv"
    table.write_text("path\ncut.jpg\nsound.png\n")
    data = Data(name="csv", path=str(table), size=8, max_bad_share=0.5)
    source = open_source(data)
    found, _ = find_lesions(source, open_masks(str(tmp_path / "masks"), source, data), 2, 0)
    assert [lesion.image for lesion in found] == [1] and "cut.jpg" in source.skipped[0]


# Memory


def png(width: int, height: int, depth: int, colour: int) -> bytes:
    """The header of a PNG, and one row of it at most."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(16))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")  # pytest undoes the reader's own filter
@pytest.mark.parametrize(
    "side,depth,colour,needed",
    [(13_300, 16, 0, "4.2 GB"), (11_000, 8, 6, "2.4 GB"), (13_000, 8, 2, ""), (14_000, 8, 2, "limit")],
)
def test_an_image_that_takes_too_much_memory_is_known_from_its_header(tmp_path, side, depth, colour, needed):
    (tmp_path / "large.png").write_bytes(png(side, side, depth, colour))
    if not needed:
        assert image_files.check(tmp_path / "large.png", 224, 3) == (side, side)
        return
    expected = f"{side} x {side} px, which take {needed}" if needed != "limit" else "exceeds limit"
    for read in (
        lambda: image_files.check(tmp_path / "large.png", 224, 3),
        lambda: image_files.decode((tmp_path / "large.png").read_bytes(), 224, 3),
    ):
        with pytest.raises(UnreadableError, match=expected):
            read()


def test_a_jpeg_counts_at_the_size_that_it_is_decoded_at(tmp_path, monkeypatch):
    Image.new("L", (2000, 2000)).save(tmp_path / "a.jpg")
    monkeypatch.setattr("ssl_jax.data.source.MAX_BYTES", 10**6)
    assert image_files.decode((tmp_path / "a.jpg").read_bytes(), 224, 1).shape == (224, 224, 1)
    with pytest.raises(UnreadableError, match="2000 x 2000 px, which take 0.0 GB"):
        image_files.decode((tmp_path / "a.jpg").read_bytes(), 0, 1)
    fails(folder(tmp_path, size=2000), "1 of 1 files unreadable", "2000 x 2000 px")


def test_dicom_that_takes_too_much_memory_or_an_unknown_encoding(tmp_path, monkeypatch, said):
    pytest.importorskip("pydicom")
    from pydicom.uid import UID
    from test_data_dicom import RAMP, made

    sound = made(RAMP)
    (tmp_path / "a.dcm").write_bytes(sound)
    rows = struct.pack("<HHHHH", 0x28, 0x10, 0x5355, 2, 8)
    assert sound.count(rows[:4]) == 1
    place = sound.index(rows[:4]) + 8
    (tmp_path / "b.dcm").write_bytes(sound[:place] + struct.pack("<H", 60_000) + sound[place + 2 :])
    columns = (tmp_path / "b.dcm").read_bytes().index(struct.pack("<HH", 0x28, 0x11)) + 8
    content = bytearray((tmp_path / "b.dcm").read_bytes())
    content[columns : columns + 2] = struct.pack("<H", 60_000)
    (tmp_path / "b.dcm").write_bytes(content)
    unknown = sound.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.7\0")
    assert not UID("1.2.840.10008.1.2.7").is_transfer_syntax and unknown != sound
    (tmp_path / "c.dcm").write_bytes(unknown)
    for headers in (10_000, 1):  # found at the first look, or when it is decoded
        monkeypatch.setattr("ssl_jax.data.folder.MAX_HEADERS", headers)
        source = open_source(folder(tmp_path, max_bad_share=0.9))
        source.arrays()
        assert [line.partition(";")[0] for line in source.skipped] == [
            "'b.dcm': 60000 x 60000 px, which take 144.0 GB to decode",
            "'c.dcm': DICOM with an unknown transfer syntax",
        ]
    assert len(said()) == 4


@pytest.mark.parametrize("limit,readable", [(10**5, True), (10**4, False)])
def test_a_deflated_dicom_counts_at_its_full_length(tmp_path, monkeypatch, limit, readable):
    pydicom = pytest.importorskip("pydicom")
    from test_data_dicom import made

    data = pydicom.dcmread(io.BytesIO(made(np.zeros((200, 200), np.uint8))))
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "a.dcm", data, enforce_file_format=True)
    assert (tmp_path / "a.dcm").stat().st_size < 2000
    monkeypatch.setattr("ssl_jax.data.dicom.MAX_BYTES", limit)
    if readable:
        assert open_source(folder(tmp_path)).load(0).shape == (8, 8, 3)
    else:
        fails(folder(tmp_path), "'a.dcm': deflated DICOM of more than")


def test_a_file_larger_than_the_bound_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole, which takes no space
    fails(folder(tmp_path), "'a.png': 2.0 GB; allowed: 2 GB")


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    source = open_source(folder(put(tmp_path / "a.png").parent))

    def decode(*args):
        raise MemoryError

    monkeypatch.setattr(image_files, "decode", decode)
    with pytest.raises(UserError, match="a.png': not enough memory to decode it"):
        source.load(0)


# Arrays


def npy(shape: str, content: bytes = bytes(4), dtype: str = "|u1") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (53 - len(header) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    "shape", ["(-1, 2, 2)", "(4611686018427387904, 4, 4)", "(1000000000, 64, 64)", "(2, 1, 1)", "(1, -2, -2)"]
)
def test_shapes_that_cannot_be(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", npy(shape))
    fails(Data(name="npz", path=str(tmp_path / "a.npz")), "images is uint8 [", "but the file holds 4 bytes of it")


@pytest.mark.parametrize("place,value,words", [(6, 1, "is encrypted"), (8, 97, "compression method is not supported")])
def test_encrypted_or_unknown_compression(tmp_path, place, value, words):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):  # the entry and its line in the directory
        at = content.index(mark) + shift + place
        content[at : at + 2] = struct.pack("<H", value)
    (tmp_path / "a.npz").write_bytes(content)
    fails(Data(name="npz", path=str(tmp_path / "a.npz")), words, "allowed: a .npz file as numpy writes it")


@pytest.mark.parametrize("label", [10**8, 2**63, 2**64 - 1])
def test_labels_that_are_no_numbers_of_classes(tmp_path, label):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, label], np.uint64))
    fails(Data(name="npz", path=str(tmp_path / "a.npz")), f"labels: {label}; allowed", "0 to 99999")


# Tables


@pytest.fixture
def table(tmp_path):
    for i in range(4):
        put(tmp_path / f"{i}.png", i)

    def write(text: str, **changes) -> Data:
        (tmp_path / "table.csv").write_text(text)
        return Data(name="csv", path=str(tmp_path / "table.csv"), **{"size": 8, **changes})

    return write


@pytest.mark.parametrize(
    "text,words",
    [
        ("path,label\n0.png," + "x" * 140_000, ["(line 2): a cell of more than 131072 characters"]),
        ('path,"label' + "x" * 140_000, ["(line 1): a cell of more than 131072 characters", "quotation mark"]),
        ("path,label\n0.png,1\n1.png," + "9" * 5000, ["(line 3): label='99999999999999999999'...: 5000 characters"]),
        ("path,label\nNaN,1\n", ["(line 2): path is 'NaN'; expected the path"]),
        ("photo,label\n0.png,1\n", ["no column of paths", "config.data.image_column"]),
    ],
)
def test_a_table_that_cannot_be_read(table, text, words):
    fails(table(text), *words)


def test_long_numbers_of_classes_are_sorted(table):
    source = open_source(table(f"path,label\n0.png,{'9' * 200}\n1.png,{'1' + '0' * 200}\n"))
    assert source.classes == ["9" * 200, "1" + "0" * 200]


def test_a_patient_number_of_5000_digits(tmp_path):
    (tmp_path / "train.csv").write_text(f"Path,Edema\ntrain/patient{'1' * 5000}/a.jpg,1\n")
    with pytest.raises(UserError, match="names no patient"):
        open_source(Data(name="chexpert", path=str(tmp_path)))


def test_nan_as_text_is_no_class(table, said):
    source = open_source(
        table("path,label,twin\n0.png,cat,a\n1.png,NaN,nan\n2.png,dog,a\n3.png,nan,nan\n", pairs="twin")
    )
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, -1, 1, -1]
    assert len(set(source.objects.tolist())) == 3  # no pair of those whose object is not known
    assert [line.partition("table.csv': ")[2] for line in said()] == [
        "label='NaN' in 2 rows, first (line 3): counts as an empty cell",
        "twin='nan' in 2 rows, first (line 3): counts as an empty cell",
    ]
    fails(table("path,who\n0.png,a\n1.png,NaN\n", group="who"), "(line 3): who is 'NaN'")


def test_nan_among_several_labels_is_said(table, said):
    source = open_source(table("path,A,B\n0.png,1,nan\n1.png,,0\n", labels=("A", "B")))
    assert np.isnan(source.labels).tolist() == [[False, True], [True, False]]
    assert len(said()) == 1 and "B='nan' in 1 row, first (line 2)" in said()[0]


def test_repeated_and_contradicting_rows(table, said):
    assert open_source(table("path,label\n0.png,cat\n1.png,dog\n")).classes == ["cat", "dog"] and not said()
    source = open_source(table("path,label\n0.png,cat\n1.png,dog\n./0.png,cat\n1.png,cat\n1.png,dog\n"))
    assert len(source) == 5
    assert [line.partition("table.csv': ")[2] for line in said()] == [
        "3 rows with an image that is listed already, such as './0.png' in lines 2 and 4; "
        "1 with another 'label', such as '1.png' in lines 3 and 5"
    ]


def test_the_image_column(table):
    source = open_source(table("Photo,path,label\n0.png,nothing,a\n1.png,nothing,b\n", image_column="photo"))
    assert source.names == ["0.png", "1.png"]
    fails(table("photo\n0.png\n", image_column="foto"), "config.data.image_column='foto'", "did you mean 'photo'?")


# Folders, classes, colours


def test_a_stray_image_beside_class_folders_is_named(tmp_path, said):
    for name in ("cat/1.png", "dog/1.png", "overview.png"):
        put(tmp_path / name)
    source = open_source(folder(tmp_path))
    assert open_source(folder(tmp_path), "all").labels is None and len(said()) == 1  # once, however often it is opened
    assert "'overview.png' lies beside the folders 'cat', 'dog': so these are no classes" in said()[0]
    with pytest.raises(UserError, match="has no labels"):
        labelled_part(source, source, "--data=x")
    (tmp_path / "overview.png").rename(tmp_path / "dog" / "2.png")
    assert open_source(folder(tmp_path)).classes == ["cat", "dog"] and len(said()) == 1


def test_a_single_class_is_no_training_data(table):
    one, two = (
        open_source(table("path,label\n0.png,cat\n1.png,cat\n")),
        open_source(table("path,label\n0.png,a\n1.png,b\n")),
    )
    with pytest.raises(UserError, match="--data=x: all labelled images are 'cat'; allowed: two classes or more"):
        labelled_part(one, one, "--data=x")
    assert len(labelled_part(two, two, "--data=x").labels) == 2
    only_a = open_source(table("path,label\n0.png,a\n"))
    assert labelled_part(only_a, two, "--test=x").labels.tolist() == [0]  # test images may be of one class


@pytest.mark.parametrize("colour,expected", [("white", 255), ("black", 0), ("#808080", 128)])
def test_the_background_of_transparent_pictures(tmp_path, colour, expected):
    put(tmp_path / "a.png", (10, 20, 30, 0), "RGBA")
    for cache in ("", str(tmp_path / "cache")):  # in which images on other backgrounds may lie
        data = folder(tmp_path, background=colour, cache=cache)
        assert (open_source(dataclasses.replace(data, background="red")).load(0)[0, 0] == (255, 0, 0)).all()
        assert (open_source(data).load(0) == expected).all()
    fails(folder(tmp_path, background="whyte"), "config.data.background='whyte': not a colour; allowed: white")


# Paths that a run keeps


def test_relative_paths_of_data_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = default("simclr")
    config.data.update({"name": "folder", "path": "photos", "cache": "cache"})
    saved = json.loads(json.dumps(to_json(resolve(config))))
    assert saved["data"]["path"] == str(tmp_path / "photos") and saved["data"]["cache"] == str(tmp_path / "cache")
    monkeypatch.chdir("/")
    assert resolve(from_json(saved)).data.path == str(tmp_path / "photos")


@pytest.mark.parametrize(
    "name,path", [("tfds", "cifar10"), ("synthetic", "n=4"), ("folder", "~/photos"), ("folder", "")]
)
def test_what_is_no_relative_path_stays(name, path):
    config = default("simclr")
    config.data.update({"name": name, "path": path})
    assert resolve(config).data.path == path


# Names that others chose


HOSTILE = "\x1b[2J[red]=cmd\n\u202e"


def test_names_of_classes_and_errors_cannot_steer_a_terminal(tmp_path):
    for name in (HOSTILE, "a\u200cb \u3000"):
        put(tmp_path / name / "1.png")
    source = open_source(folder(tmp_path))
    assert source.classes == ["\\x1b[2J[red]=cmd\\n\\u202e", "a\u200cb \u3000"]
    assert source.names[0] == f"{HOSTILE}/1.png"  # a file is found by it
    assert str(UserError(HOSTILE)) == "\\x1b[2J[red]=cmd\\n\\u202e"


def test_a_class_in_brackets_is_shown_as_it_is(capsys):
    row = {"transform": "config", "strength": None, "configured": True, "measure": "area", "lesions": 9}
    row |= {"lost": 0.5, "disagree": 0.5, "kept": 0.5}
    _print_lesions([row | {"class": "all"}, row | {"class": "[bold]x"}])
    assert "[bold]x" in capsys.readouterr().out


def test_cells_that_a_spreadsheet_would_run(tmp_path):
    row = ["=1+1", "+a", "-b.png", "@c", "\td", "plain", "'e", -1.5, "-1.5", "+2e-3", "-inf", ""]
    files.write_csv(tmp_path / "a.csv", ["=SUM(A1)", *row[1:]], [row])
    head, line = (tmp_path / "a.csv").read_text().splitlines()
    assert line == "'=1+1,'+a,'-b.png,'@c,'\td,plain,'e,-1.5,-1.5,+2e-3,-inf,"
    assert head.startswith("'=SUM(A1),")


def test_a_lock_that_is_a_link_or_a_pipe(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("content")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=".lock is a link; remove it"), RunFolder(run).lock():
        pass
    (run / ".lock").unlink()
    os.link(victim, run / ".lock")
    with RunFolder(run).lock():
        assert victim.read_text() == "content"
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(UserError, match="cannot be created"), RunFolder(run).lock():
        pass


# Perspective


def test_no_perspective_makes_pixels_that_are_no_numbers():
    """Before, 15 of these 4,000 draws had three corners on a line."""
    view = View(size=16, perspective=0.8, perspective_prob=1.0)

    def one(key):
        parameters = draw(key, view, 16, 16)
        return parameters["corners"], jnp.isfinite(render(jnp.ones((16, 16, 1)), parameters, view)).all()

    corners, finite = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    assert finite.all()
    x, y = np.moveaxis(np.asarray(corners), -1, 0).astype(int)
    for a, b, c in ((0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1)):
        assert ((x[:, b] - x[:, a]) * (y[:, c] - y[:, b]) > (y[:, b] - y[:, a]) * (x[:, c] - x[:, b])).all()
    reach = np.minimum(x, 15 - x).max(), np.minimum(y, 15 - y).max()
    assert reach == (6, 6)  # draws that were sound still go as far


def test_the_horizon_of_a_perspective_is_no_place():
    matrix = jnp.array([[1.0, 0, -8.5], [0, 1, 0], [1, 0, -8.5]])  # 0 / 0 in the ninth column
    assert jnp.isfinite(jax.jit(ops.warp)(jnp.ones((16, 16, 1)), matrix)).all()


@pytest.mark.parametrize("shape", [(1, 8), (4, 4)])
def test_perspective_of_the_smallest_images(shape):
    view = View(size=4, perspective=1.0, perspective_prob=1.0)

    def one(key):
        return jnp.isfinite(render(jnp.ones((*shape, 1)), draw(key, view, *shape), view)).all()

    assert jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 200)).all()
