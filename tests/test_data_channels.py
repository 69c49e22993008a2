"""Images of N channels from files: the pages of a TIFF, the samples of its pixels, and several files per image."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ssl_jax.cli import main
from ssl_jax.config import Data, Model
from ssl_jax.data import batches, open_source
from ssl_jax.data.decoding import decode
from ssl_jax.encoder import export, load_encoder, random_encoder
from ssl_jax.errors import UserError
from ssl_jax.models import to_torch
from ssl_jax.report.plots import thumbnail
from ssl_jax.to_label import _picture

SIDE = 24
BANDS = ("_B02", "_B03", "_B08")


def pixels(*shape, seed=0, kind=np.uint8):
    values = np.random.default_rng(seed).integers(0, np.iinfo(kind).max + 1, shape or (SIDE, SIDE, 5), dtype=kind)
    if kind == np.uint8:
        return values
    values.reshape(-1, shape[-1])[:2] = [[1000] * shape[-1], [1000 + 2550] * shape[-1]]  # of each page
    return np.clip(values, 1000, 1000 + 2550)


def put_pages(path, planes, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.fromarray(plane) for plane in planes]
    first.save(path, save_all=True, append_images=others, **options)


def tiff(path, array, **options):
    put_pages(path, np.moveaxis(array, -1, 0), **options)


def opened(path, **changes):
    return open_source(Data(**{"name": "folder", "path": str(path), "size": SIDE, "max_bad_share": 0.0, **changes}))


def fails(message, path, **changes):
    with pytest.raises(UserError) as caught:
        opened(path, **changes).arrays()
    text = str(caught.value)
    assert message in text and "\n" not in text, text


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}])
@pytest.mark.parametrize("channels", [0, 5])
def test_every_page_of_a_tiff_is_a_channel(tmp_path, channels, options):
    array = pixels()
    tiff(tmp_path / "Gewebe 1 ä.tif", array, **options)
    source = opened(tmp_path, channels=channels)
    assert source.shape == (SIDE, SIDE, 5) and source.names == ["Gewebe 1 ä.tif"]
    np.testing.assert_array_equal(source.load(0), array)


@pytest.mark.parametrize("window", ["auto", "percentile"])
def test_pages_of_16_bits_are_scaled_like_the_same_pages_in_files_of_their_own(tmp_path, window):
    array = pixels(SIDE, SIDE, 4, kind=np.uint16)
    tiff(tmp_path / "a.tif", array)
    found = opened(tmp_path, channels=4, window=window).load(0)
    for c in range(4):
        tiff(tmp_path / "alone" / f"{c}.tif", array[..., c : c + 1])
        alone = opened(tmp_path / "alone", channels=1, window=window)
        np.testing.assert_array_equal(found[..., c], alone.load(c)[..., 0])
    if window == "auto":  # 1000 is black, 3550 white
        np.testing.assert_array_equal(found, np.round((array - 1000.0) / 10).astype(np.uint8))


def test_pages_are_resized_like_single_images(tmp_path):
    array = pixels(31, 40, 4)
    tiff(tmp_path / "a.tif", array)
    found = opened(tmp_path, size=9).load(0)
    for c in range(4):
        Image.fromarray(array[..., c]).save(tmp_path / f"{c}.png")
        np.testing.assert_array_equal(found[..., c : c + 1], decode((tmp_path / f"{c}.png").read_bytes(), 9, 1))


def test_three_gray_pages_are_three_channels_and_one_channel_is_the_first_page(tmp_path):
    array = pixels(SIDE, SIDE, 3)
    tiff(tmp_path / "a.tif", array)
    for channels in (0, 3):
        np.testing.assert_array_equal(opened(tmp_path, channels=channels).load(0), array)
    np.testing.assert_array_equal(opened(tmp_path, channels=1).load(0), array[..., :1])


def test_smaller_copies_and_masks_are_no_channels(tmp_path):
    """As in cloud-optimized GeoTIFFs, and TIFFs with a thumbnail."""
    array, frames = pixels(SIDE, SIDE, 2), []
    for plane, kind in ((array[..., 0], 0), (array[::2, ::2, 0], 1), (array[..., 0], 4), (array[..., 1], 0)):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[254] = kind
        frames.append(Image.fromarray(plane))
        frames[-1].encoderinfo = {"tiffinfo": info}
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(opened(tmp_path).load(0), array)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_pages_are_turned_upright(tmp_path, orientation):
    array, info = pixels(SIDE, SIDE, 3), TiffImagePlugin.ImageFileDirectory_v2()
    info[274] = orientation
    tiff(tmp_path / "a.tif", array, tiffinfo=info)
    turned = np.rot90(array, {1: 0, 3: 2, 6: -1}[orientation])
    np.testing.assert_array_equal(opened(tmp_path).load(0), turned)


def test_transparency_is_a_fourth_channel_if_asked_for(tmp_path):
    array = pixels(SIDE, SIDE, 4)
    Image.fromarray(array).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(opened(tmp_path, channels=4).load(0), array)
    assert opened(tmp_path).shape[2] == 3


@pytest.mark.parametrize("channels", [0, 5])
def test_pages_of_two_sizes_are_one_line_that_names_the_file(tmp_path, channels):
    planes = [*np.moveaxis(pixels(SIDE, SIDE, 4), -1, 0), pixels(SIDE, SIDE + 1, seed=1)]
    put_pages(tmp_path / "b ä.tif", planes)
    fails("'b ä.tif': page 5 has 25 x 24 px; allowed: 24 x 24", tmp_path, channels=channels)


def test_other_numbers_of_channels_are_one_line_that_names_the_file(tmp_path):
    for name in "abc":
        tiff(tmp_path / f"{name}.tif", pixels())
    tiff(tmp_path / "d.tif", pixels(SIDE, SIDE, 4))
    fails("'d.tif': 4 channels (pages); allowed: 5 (config.data.channels)", tmp_path)
    fails("'a.tif': 5 channels (pages); allowed: 2", tmp_path, channels=2)
    fails("config.data.channels=5 reads every page, 1 the first", tmp_path, channels=3)
    Image.fromarray(pixels(SIDE, SIDE, 3)).save(tmp_path / "d.tif")
    fails("'d.tif': 3 channels; allowed: 5", tmp_path)
    Image.fromarray(pixels(SIDE, SIDE)).save(tmp_path / "d.tif")
    fails("'d.tif': 1 channel; allowed: 5", tmp_path)
    (tmp_path / "d.tif").unlink()
    Image.fromarray(pixels(SIDE, SIDE, 3)).save(tmp_path / "e.jpg")
    fails("'e.jpg': 3 channels; allowed: 5", tmp_path)
    assert len(opened(tmp_path, max_bad_share=0.5)) == 3
    put_pages(
        tmp_path / "e.jpg", [pixels(SIDE, SIDE, seed=i) for i in range(4)] + [pixels(SIDE, SIDE, 3)], format="TIFF"
    )
    fails("'e.jpg': page 5 is RGB; allowed: gray pages", tmp_path)


def test_samples_that_pillow_does_not_read_are_one_line(tmp_path):
    Image.fromarray(pixels(SIDE, SIDE, 4), "RGBX").save(tmp_path / "a.tif")
    line = "'a.tif': a TIFF of 4 samples per pixel, of which Pillow reads 3; save each channel as a page"
    fails(line, tmp_path)
    fails(line, tmp_path, channels=4)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[256], info[257], info[258], info[259], info[262] = 1, 1, (8,) * 7, 1, 1
    info[273], info[277], info[278], info[279] = 8, 7, 1, 7
    with (tmp_path / "a.tif").open("wb") as file:
        file.write(info._get_ifh() if hasattr(info, "_get_ifh") else b"II*\0\x08\0\0\0")
        info.save(file)
    fails("'a.tif': a TIFF of 7 samples of 8 bits, which Pillow cannot read", tmp_path)


# Several files per image.


def scenes(root, count=4, kind="tif", classes=("acker", "wald")):
    """Two classes of images with three bands, in files of their own, beside other files."""
    arrays = {}
    for i in range(count):
        name = f"{classes[i % 2]}/Ort {i} ö"
        arrays[name] = pixels(SIDE, SIDE, 3, seed=i)
        for c, band in enumerate(BANDS):
            path = root / f"{name}{band}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(arrays[name][..., c]).save(path)
        Image.fromarray(arrays[name]).save(root / f"{name}_TCI.png")
        (root / f"{name}.txt").write_text("no image")
    return dict(sorted(arrays.items()))


def test_several_files_make_one_image_with_one_name(tmp_path):
    arrays = scenes(tmp_path)
    source = opened(tmp_path, bands=BANDS)
    assert (
        source.names == list(arrays) and source.classes == ["acker", "wald"] and source.labels.tolist() == [0, 0, 1, 1]
    )
    np.testing.assert_array_equal(source.arrays(), np.stack(list(arrays.values())))
    assert source.paths == [str(tmp_path / name) for name in arrays]
    taken = opened(tmp_path, bands=BANDS[::-2], channels=2).take([1])  # another order, not all
    np.testing.assert_array_equal(taken.load(0), arrays[taken.names[0]][..., [2, 0]])
    assert [Path(path).name for path in taken.files[0]] == ["Ort 2 ö_B08.tif", "Ort 2 ö_B02.tif"]


def test_a_folder_for_each_image_names_it(tmp_path):
    for name, seed in (("acker/s1", 1), ("wald/s2", 2)):
        for c, band in enumerate(("B1", "B2")):
            path = tmp_path / name / f"{band}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(SIDE, SIDE, 2, seed=seed)[..., c]).save(path)
    source = opened(tmp_path, bands=("B1", "B2"))
    assert source.names == ["acker/s1", "wald/s2"] and source.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(source.load(1), pixels(SIDE, SIDE, 2, seed=2))
    table = tmp_path / "t.csv"
    table.write_text("path,label\nwald/s2,b\nacker/s1,a\n", encoding="utf-8")
    np.testing.assert_array_equal(opened(table, name="csv", bands=("B1", "B2")).load(0), source.load(1))


def test_a_missing_band_is_a_file_that_cannot_be_read(tmp_path, caplog):
    arrays = scenes(tmp_path)
    first = next(iter(arrays))
    (tmp_path / f"{first}_B03.tif").unlink()
    fails(f"1 of 4 files unreadable (25.0%): {first!r}: no file of band '_B03'; allowed", tmp_path, bands=BANDS)
    source = opened(tmp_path, bands=BANDS, max_bad_share=0.3)
    assert source.names == list(arrays)[1:] and f"{first!r}: no file of band '_B03'; skipped" in caplog.text
    Image.fromarray(pixels(SIDE, SIDE)).save(tmp_path / f"{first}_B03.png")
    assert opened(tmp_path, bands=BANDS).names == list(arrays)  # of another kind
    Image.fromarray(pixels(SIDE, SIDE)).save(tmp_path / f"{first}_B03.jpg")
    fails("2 files of band '_B03': 'Ort 0 ö_B03.jpg' and 'Ort 0 ö_B03.png'; allowed: one", tmp_path, bands=BANDS)


def test_what_is_no_band_is_one_line(tmp_path):
    first = next(iter(scenes(tmp_path)))
    bands = {"bands": BANDS}
    fails(
        "config.data.channels=5: allowed: 0, or 3, one for each band: _B02, _B03, _B08", tmp_path, channels=5, **bands
    )
    fails("config.data.bands=('_B2', '_B2'): allowed: endings of file names, each once", tmp_path, bands=("_B2", "_B2"))
    fails(
        "config.data.bands=('_X',): no file ends so before its kind; the first is 'acker/Ort 0", tmp_path, bands=("_X",)
    )
    Image.fromarray(pixels(SIDE, SIDE, 3)).save(tmp_path / f"{first}_B02.tif")
    line = f"{first!r}: 'Ort 0 ö_B02.tif': 3 channels; allowed: 1 in each file of config.data.bands"
    fails(line, tmp_path, **bands)
    tiff(tmp_path / f"{first}_B02.tif", pixels(SIDE, SIDE, 2))
    fails("'Ort 0 ö_B02.tif': 2 channels (pages); allowed: 1 in each file", tmp_path, **bands)
    Image.fromarray(pixels(SIDE, SIDE // 2)).save(tmp_path / f"{first}_B02.tif")
    fails("bands of 12 x 24 and 24 x 24 px; allowed: one ratio of sides", tmp_path, **bands)
    Image.fromarray(pixels(SIDE // 2, SIDE // 2)).save(tmp_path / f"{first}_B02.tif")  # a coarser band
    assert opened(tmp_path, **bands).load(0).shape == (SIDE, SIDE, 3)


def test_a_table_lists_an_image_by_one_of_its_files_or_by_what_their_names_share(tmp_path):
    arrays, table = scenes(tmp_path), tmp_path / "t.csv"
    cells = [f"{name}{end}" for name, end in zip(arrays, ("", "_B02.tif", ".tif", "_B08.tif"), strict=True)]
    rows = "\n".join(f"{cell},{i}" for i, cell in enumerate(cells))
    table.write_text(f"path,label\n{rows}\n", encoding="utf-8")
    source = opened(table, name="csv", bands=BANDS)
    assert source.names == cells and source.paths == [str(tmp_path / name) for name in arrays]
    np.testing.assert_array_equal(source.arrays(), np.stack(list(arrays.values())))
    # What the library writes names images as the folder does; a table of images to leave out names them so, too.
    (tmp_path / "out.csv").write_text(f"path\n{source.paths[1]}\n", encoding="utf-8")
    left = opened(tmp_path, bands=BANDS, exclude=str(tmp_path / "out.csv"))
    assert left.names == [name for i, name in enumerate(arrays) if i != 1]
    table.write_text("path\nacker/Ort 9 ö_B02.tif\n", encoding="utf-8")
    fails("'acker/Ort 9 ö_B02.tif' (line 2): no file of band '_B02'", table, name="csv", bands=BANDS)


@pytest.mark.parametrize("bands", [(), BANDS])
def test_cache_and_both_engines_give_the_same_bytes(tmp_path, bands):
    root = tmp_path / "data"
    if bands:
        arrays = scenes(root)
    else:
        arrays = {f"{i}.tif": pixels(seed=i) for i in range(4)}
        for name, array in arrays.items():
            tiff(root / name, array)
    data = Data(name="folder", path=str(root), size=SIDE, bands=bands, cache=str(tmp_path / "cache"))
    for _ in range(2):  # filled, and read
        np.testing.assert_array_equal(open_source(data).arrays(), np.stack(list(arrays.values())))
    for cache in ("", data.cache):
        source = open_source(dataclasses.replace(data, cache=cache))
        batch = next(iter(batches(source, batch=4, seed=0, start=0, stop=1, workers=2)))
        np.testing.assert_array_equal(batch["image"], np.stack(list(arrays.values()))[batch["index"]])
    if bands:  # one file of an image changes, and other bands are other images
        first = next(iter(arrays))
        Image.fromarray(255 - arrays[first][..., 1]).save(root / f"{first}_B03.tif")
        changed = open_source(data).load(0)
        np.testing.assert_array_equal(changed[..., 1], 255 - arrays[first][..., 1])
        swapped = open_source(dataclasses.replace(data, bands=bands[::-1])).load(0)
        np.testing.assert_array_equal(swapped, changed[..., ::-1])


def test_check_compares_all_files_of_an_image_and_pages_to_label_show_three_channels(tmp_path):
    arrays = scenes(tmp_path / "data")
    first, second, third, _ = arrays
    for c, band in enumerate(BANDS):  # the same pixels in another kind of file; all but one band the same
        (tmp_path / "data" / f"{second}{band}.tif").unlink()
        Image.fromarray(arrays[first][..., c]).save(tmp_path / "data" / f"{second}{band}.png")
        if c < 2:
            Image.fromarray(arrays[first][..., c]).save(tmp_path / "data" / f"{third}{band}.tif")
    main(["check", str(tmp_path / "data"), f"--out={tmp_path / 'out'}", f"--config.data.bands={BANDS}", "--quiet"])
    with (tmp_path / "out" / "check.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["problem"] == "duplicate"]
    assert [(row["path"], row["other path"], row["file"]) for row in rows] == [
        (second, first, str(tmp_path / "data" / second))
    ]
    source = opened(tmp_path / "data", bands=BANDS)
    shown = _picture(source.files[0], Data(channels=3, bands=BANDS))
    np.testing.assert_array_equal(shown, arrays[first])
    tiff(tmp_path / "five.tif", pixels())
    shown = _picture((str(tmp_path / "five.tif"),), Data(channels=5))
    np.testing.assert_array_equal(shown, pixels()[..., :3])
    assert thumbnail(pixels()) == thumbnail(pixels()[..., :3])  # in the report, too
    assert thumbnail(pixels(SIDE, SIDE, 2)) == thumbnail(pixels(SIDE, SIDE, 2)[..., :1])


def test_pretraining_on_five_channels_starts_from_weights_for_three(tmp_path, monkeypatch):
    """On bands, decoded at each step; pages have the same embeddings."""
    bands, model = tuple(f"_{c}" for c in range(5)), Model(name="vit_tiny", width=1 / 16, depth=1, patch=8)
    for i in range(8):
        array = pixels(seed=i)
        tiff(tmp_path / "pages" / f"{i}.tif", array)
        for c, end in enumerate(bands):
            put_pages(tmp_path / "bands" / f"{i}{end}.tif", [array[..., c]])
    monkeypatch.setattr("ssl_jax.report.html.write_report", lambda *_: "")  # it takes as long as everything else
    start = random_encoder(model, SIDE, 3, seed=0)
    export(tmp_path / "rgb", start)
    run = str(tmp_path / "run")
    options = [f"--config.data.bands={bands}", "--config.data.engine=disk", f"--config.data.size={SIDE}"]
    options += [f"--config.model.{key}={getattr(model, key)}" for key in ("name", "width", "depth", "patch")]
    options += [f"--config.model.init={tmp_path / 'rgb'}", "--config.train.batch=8", "--config.train.duration=1 steps"]
    options += ["--config.optim.lr=0", "--config.method.hidden=8", "--config.method.out=4"]
    main(["pretrain", "simclr", str(tmp_path / "bands"), f"--workdir={run}", "--quiet", *options])
    encoder, first = load_encoder(run), "patch_embed.proj.weight"
    expected = to_torch(start.params, start.stats)[first][:, [0, 1, 2, 0, 1]] * 3 / 5  # docs/weights.md
    np.testing.assert_allclose(to_torch(encoder.params, encoder.stats)[first], expected, rtol=1e-6)
    found = []
    for name, more in (("bands", []), ("pages", ["--config.data.bands=()"])):
        main(["embed", f"--workdir={run}", f"--data={tmp_path / name}", f"--out={run}.npz", *more])
        with np.load(f"{run}.npz") as file:
            found.append(file["embeddings"])
    assert found[0].shape == (8, encoder.width)
    np.testing.assert_array_equal(*found)
