"""Folders and tables of image files as people have them: odd formats, odd names, damaged files."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data import batches, open_source
from ssl_jax.data.source import printable
from ssl_jax.errors import UserError


def folder(path, **changes) -> Data:
    return Data(name="folder", path=str(path), **{"size": 8, "split": "train", **changes})


def fails(data: Data, *words: str, split: str | None = None) -> None:
    with pytest.raises(UserError) as error:
        open_source(data, split).arrays()
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, f"{word!r} not in: {line}"


def put(path, value=0, size=(8, 8)):
    """A file of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def load(path, **changes) -> np.ndarray:
    return open_source(folder(path, **changes)).load(0)


# What a pixel becomes. Each file is 8 x 8 px of one colour unless said otherwise.


@pytest.mark.parametrize(
    "name,image,colour",
    [
        ("gray.png", Image.new("L", (8, 8), 77), (77, 77, 77)),
        ("bilevel.png", Image.new("1", (8, 8), 1), (255, 255, 255)),
        ("rgb.bmp", Image.new("RGB", (8, 8), (10, 20, 30)), (10, 20, 30)),
        (
            "palette.gif",
            Image.new("RGB", (8, 8), (0, 200, 0)).convert("P", palette=Image.Palette.ADAPTIVE),
            (0, 200, 0),
        ),
        ("clear.png", Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (255, 255, 255)),
        ("half.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127)),
        ("gray_alpha.png", Image.new("LA", (8, 8), (50, 255)), (50, 50, 50)),
        ("cmyk.tif", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
        ("lossless.webp", Image.new("RGB", (8, 8), (255, 0, 0)), (255, 0, 0)),
        ("gray16.png", Image.new("I;16", (8, 8), 40000), (0, 0, 0)),  # one value alone has no range
    ],
)
def test_modes(tmp_path, name, image, colour):
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    np.testing.assert_array_equal(load(tmp_path), np.broadcast_to(np.uint8(colour), (8, 8, 3)))


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (0, 0, 8, 4))
    image.save(tmp_path / "a.png", transparency=0)
    assert load(tmp_path)[[0, 7], 0].tolist() == [[0, 0, 200], [255, 255, 255]]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "A.TIFF"])
def test_16_bit_is_scaled_from_its_own_range(tmp_path, name):
    values = np.linspace(1000, 5095, 64).round().astype(np.uint16).reshape(8, 8)  # 12 bits, as detectors give
    Image.fromarray(values).save(tmp_path / name)
    expected = ((values - 1000) / 4095 * 255).round()
    np.testing.assert_array_equal(load(tmp_path, channels=1)[..., 0], expected)


def test_float_tiff(tmp_path):
    Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tif")
    image = load(tmp_path, channels=1)
    assert image.min() == 0 and image.max() == 255 and (np.diff(image.ravel().astype(int)) >= 4).all()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "a.tif")
    fails(folder(tmp_path), "a.tif", "not finite")


def test_16_bit_colour_png(tmp_path):
    row = b"\0" + struct.pack(">3H", 0x1234, 0x8000, 0xFFFF) * 8  # Pillow reads such files but does not write them

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")
    )
    assert load(tmp_path)[0, 0].tolist() == [0x12, 0x80, 0xFF]


@pytest.mark.parametrize("orientation,corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0)), (2, (0, -1))])
def test_exif_orientation(tmp_path, orientation, corner):
    """The stored top left corner is white; the orientation says where it belongs."""
    image = Image.new("L", (64, 64))
    image.paste(255, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    corners = load(tmp_path, size=8)[..., 0]
    assert corners[corner] > 200
    assert sum(int(corners[c] > 200) for c in [(0, 0), (0, -1), (-1, 0), (-1, -1)]) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_passed_over(tmp_path):
    Image.new("L", (8, 8), 90).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert abs(int(load(tmp_path)[0, 0, 0]) - 90) <= 2


# Size


def test_centre_square_is_kept(tmp_path):
    image = Image.new("L", (24, 8), 200)
    image.paste(50, (8, 0, 16, 8))
    image.save(tmp_path / "wide.png")
    assert (load(tmp_path, size=8) == 50).all()
    assert load(tmp_path, size=0).shape == (224, 224, 3)


def test_resize_is_pillows_bilinear_with_antialias(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(pixels).resize((12, 12), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(load(tmp_path, size=12), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_large_jpeg_is_shrunk_while_decoding_and_looks_the_same(tmp_path, channels):
    y, x = np.mgrid[:512, :600] / 512
    pixels = np.stack([x * 200, y * 255, 127 + 100 * np.sin(9 * x * y)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg").convert("L" if channels == 1 else "RGB")
    expected = np.asarray(whole.resize((60, 60), Image.Resampling.BILINEAR, box=(44, 0, 556, 512)))
    found = load(tmp_path, size=60, channels=channels)
    assert found.shape == (60, 60, channels)
    assert abs(found.astype(int) - expected.reshape(found.shape)).mean() < 1.5


# Folders


def test_names_of_every_kind(tmp_path):
    names = ["a b.png", "é 画像.png", "UPPER.PNG", "new\nline.png", "quote'\".png", "deep/er/still/x.png", "#%;.png"]
    for value, name in enumerate(sorted(names)):
        put(tmp_path / name, value)
    source = open_source(folder(tmp_path))
    assert source.names == sorted(names)
    assert source.arrays()[:, 0, 0, 0].tolist() == list(range(7))
    assert source.labels is None


def test_name_that_is_not_utf8_is_made_printable():
    assert printable(os.fsdecode(b"z\xff.png")) == "z\\xff.png"


def test_hidden_and_other_files_are_passed_over(tmp_path):
    for name in (".hidden.png", ".cache/x.png", "__MACOSX/._a.png"):
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "png").write_bytes(b"x")
    put(tmp_path / "a.png")
    (tmp_path / "looks_like.png").mkdir()
    assert open_source(folder(tmp_path)).names == ["a.png"]


def test_links(tmp_path):
    put(tmp_path / "elsewhere" / "x.png", 3)
    root = tmp_path / "root"
    put(root / "a" / "y.png", 4)
    (root / "a" / "loop").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(tmp_path / "elsewhere")  # a second way to the same folder
    source = open_source(folder(root))
    assert source.names == ["a/y.png", "b/x.png"]
    assert source.arrays()[:, 0, 0, 0].tolist() == [4, 3]


def test_labels_are_first_level_folders(tmp_path):
    for i, name in enumerate(["cat/1.png", "cat/more/2.png", "dog/1.png", "emu/1.png"]):
        put(tmp_path / name, i)
    source = open_source(folder(tmp_path))
    assert source.classes == ["cat", "dog", "emu"] and source.labels.tolist() == [0, 0, 1, 2]
    put(tmp_path / "stray.png")
    assert open_source(folder(tmp_path)).labels is None


def test_one_class_folder_is_no_label(tmp_path):
    put(tmp_path / "images" / "1.png")
    source = open_source(folder(tmp_path))
    assert source.labels is None and source.classes == []
    fails(folder(tmp_path), "no test part", "available: train, all", split="test")


@pytest.mark.parametrize("train,test", [("train", "test"), ("Training", "valid"), ("train", "val")])
def test_parts(tmp_path, train, test):
    for i, name in enumerate([f"{train}/cat/1.png", f"{train}/dog/1.png", f"{train}/dog/2.png", f"{test}/dog/1.png"]):
        put(tmp_path / name, i)
    put(tmp_path / "overview.png")
    source = open_source(folder(tmp_path))
    assert source.labels.tolist() == [0, 1, 1] and source.names[0] == f"{train}/cat/1.png"
    source = open_source(folder(tmp_path), "test")
    assert source.labels.tolist() == [1] and source.classes == ["cat", "dog"] and source.load(0)[0, 0, 0] == 3
    assert len(open_source(folder(tmp_path), "all")) == 4


def test_parts_without_classes(tmp_path):
    for name in ("train/1.png", "train/2.png", "test/1.png"):
        put(tmp_path / name)
    assert open_source(folder(tmp_path)).labels is None
    assert open_source(folder(tmp_path, split="test")).names == ["test/1.png"]


def test_a_part_is_no_class(tmp_path):
    for name in ("test/1.png", "cat/1.png"):
        put(tmp_path / name)
    assert open_source(folder(tmp_path)).labels is None


def test_limit(tmp_path):
    for i in range(5):
        put(tmp_path / f"{i}.png", i)
    assert open_source(folder(tmp_path, limit=2)).arrays()[:, 0, 0, 0].tolist() == [0, 1]


def test_folder_errors(tmp_path):
    fails(folder(""), "config.data.path=''")
    fails(folder(tmp_path / "none"), "config.data.path=", "none'", "no such folder")
    fails(folder(put(tmp_path / "sub" / "a.png")), "not a folder")
    (tmp_path / "empty").mkdir()
    fails(folder(tmp_path / "empty"), "empty'", "no images", "jpg, jpeg")


# Damaged files


@pytest.fixture
def damaged(tmp_path):
    """20 images of two classes, of which 3 are cut off and 3 are no images at all."""
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / ("even" if i % 2 == 0 else "odd") / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        if i in (3, 5, 18):
            path.write_bytes(path.read_bytes()[:3000])
    (tmp_path / "even" / "04.jpg").write_bytes(b"")
    (tmp_path / "even" / "06.jpg").write_text("a text")
    (tmp_path / "odd" / "19.jpg").write_bytes((tmp_path / "odd" / "01.jpg").read_bytes()[:100])
    return tmp_path


def test_damaged_files_are_replaced_alike_by_both_engines(damaged, caplog):
    data = folder(damaged, max_bad_share=0.3, size=64)
    source = open_source(data)
    assert len(source) == 17 and len(source.skipped) == 3
    assert "'even/04.jpg': not an image; skipped" in caplog.text
    images = source.arrays()
    names = source.names
    stands_in = {names[i]: names[j] for i, j in source.replaced.items()}
    assert stands_in == {"even/18.jpg": "even/00.jpg", "odd/03.jpg": "odd/07.jpg", "odd/05.jpg": "odd/07.jpg"}
    assert len(source.skipped) == 6 and any("'odd/03.jpg': image file is truncated" in s for s in source.skipped)
    for i, j in source.replaced.items():
        assert source.labels[i] == source.labels[j]
        np.testing.assert_array_equal(images[i], images[j])
    fresh = open_source(data)  # has found none of them yet
    seen = set()
    for batch in batches(fresh, batch=4, seed=1, start=2, stop=10, workers=3):
        np.testing.assert_array_equal(batch["image"], images[batch["index"]])
        seen.update(batch["index"].tolist())
    assert {i: j for i, j in source.replaced.items() if i in seen} == fresh.replaced


def test_too_many_damaged_headers(damaged):
    fails(folder(damaged), "3 of 20 files unreadable (15.0%)", "'even/04.jpg': not an image", "max_bad_share=0.01")


def test_too_many_damaged_files_found_later(damaged):
    words = "20 files unreadable", "config.data.max_bad_share=0.2", "and"
    fails(folder(damaged, max_bad_share=0.2), *words)
    with pytest.raises(UserError, match=r"[56] of 20 files unreadable.*allowed: .*=0.2$"):  # two threads read at a time
        list(batches(open_source(folder(damaged, max_bad_share=0.2)), batch=17, seed=0, start=0, stop=1, workers=2))


@pytest.mark.parametrize("cut", [0, 900])  # not an image at all; one that ends early
def test_no_file_readable_is_an_error_whatever_share_is_allowed(tmp_path, cut):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90), np.uint8))
    noise.save(tmp_path / "whole.jpg")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes((tmp_path / "whole.jpg").read_bytes()[:cut] or b"x")
    (tmp_path / "whole.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 2 files unreadable .*'a.jpg': .*; allowed: fewer than all"):
        open_source(folder(tmp_path, max_bad_share=1.0)).arrays()


def test_a_part_takes_stand_ins_from_itself(damaged):
    source = open_source(folder(damaged, max_bad_share=0.6))
    chosen = [source.names.index(name) for name in ("odd/01.jpg", "odd/03.jpg", "even/00.jpg")]
    part = source.take(chosen)
    part.arrays()
    assert part.replaced == {1: 0}
    with pytest.raises(UserError, match="'odd/03.jpg': unreadable, and no other image"):
        source = open_source(folder(damaged, max_bad_share=1.0))
        source.take(chosen[1:]).arrays()


def test_an_error_of_the_disk_is_no_damage(damaged):
    source = open_source(folder(damaged, max_bad_share=1.0))
    (damaged / "even" / "00.jpg").unlink()
    with pytest.raises(UserError, match="even/00.jpg': No such file or directory; it was readable at the start"):
        source.load(0)


# Tables


@pytest.fixture
def table(tmp_path):
    for i in range(4):
        put(tmp_path / "images" / f"{i} é.png", 10 * i)

    def write(text: str, **changes) -> Data:
        path = tmp_path / "table.csv"
        path.write_bytes(text.encode())
        return Data(name="csv", path=str(path), **{"size": 8, **changes})

    return write


def test_table(table, tmp_path):
    absolute = tmp_path / "images" / "0 é.png"
    source = open_source(table(f"id,Path,Label\n1,images/2 é.png,dog\n2,{absolute},cat\n\n3,images/3 é.png,dog\n"))
    assert source.names == ["images/2 é.png", str(absolute), "images/3 é.png"]
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [1, 0, 1]
    assert source.arrays()[:, 0, 0, 0].tolist() == [20, 0, 30]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_table_of_another_program(table, separator):
    lines = ["\ufefffilename,class", '"images/0 é.png",10', '"images/1 é.png",9', '"images/2 é.png",10']
    source = open_source(table("\r\n".join(lines).replace(",", separator) + "\r\n"))
    assert source.classes == ["9", "10"] and source.labels.tolist() == [1, 0, 1]


def test_table_with_parts(table):
    data = table(
        "image,split\nimages/0 é.png,train\nimages/1 é.png,Validation\nimages/2 é.png,test\nimages/3 é.png,train\n"
    )
    assert open_source(data).names == ["images/0 é.png", "images/3 é.png"] and open_source(data).labels is None
    assert open_source(data, "test").arrays()[0, 0, 0, 0] == 20
    assert open_source(data, "val").arrays()[0, 0, 0, 0] == 10
    assert len(open_source(data, "all")) == 4


def test_one_column_and_empty_labels(table):
    some = open_source(table("file,label\nimages/0 é.png,\nimages/1 é.png,cat\nimages/2 é.png,ant\n"))
    assert some.labels.tolist() == [-1, 1, 0] and some.classes == ["ant", "cat"]
    assert len(open_source(table("file\nimages/0 é.png\n"))) == 1
    assert open_source(table("file,label\nimages/0 é.png,\nimages/1 é.png,\n")).labels is None


@pytest.mark.parametrize(
    "text,words",
    [
        ("a,b\n1,2\n", ["the columns are a, b", "path, file, filename, image"]),
        ("", ["the columns are"]),
        ("path,label\nimages/0 é.png,cat\nimages/1 é.png\n", ["(line 3): 1 values", "2 columns"]),
        ("path,label\nimages/0 é.png,cat\n,dog\n", ["(line 3): path is empty"]),
        ("path,split\nimages/0 é.png,tran\n", ["(line 2): split='tran'", "train"]),
        ("path\nimages/0 é.png\nimages/none.png\n", ["1 of 2 files", "'images/none.png' (line 3): No such file"]),
        ("path\n", ["no images"]),
    ],
)
def test_table_errors(table, text, words):
    fails(table(text), "table.csv'", *words) if "files" not in words[0] else fails(table(text), *words)


def test_table_missing(tmp_path):
    fails(Data(name="csv"), "config.data.path=''")
    fails(Data(name="csv", path=str(tmp_path / "none.csv")), "none.csv'", "No such file")
    (tmp_path / "latin.csv").write_bytes("path\né.png\n".encode("latin-1"))
    fails(Data(name="csv", path=str(tmp_path / "latin.csv")), "latin.csv'", "byte 5 is not UTF-8")
