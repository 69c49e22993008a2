"""config.data.crops="file": where crops lie, which pixels they hold, and that nothing but (seed, step) decides."""

import io
import signal
import time
from pathlib import Path

import forked
import jax
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from ssl_jax import cli, train
from ssl_jax.augment import finish_views, make_views
from ssl_jax.augment.views import _draw_box, _numbers
from ssl_jax.checkpoint import read_metadata, steps
from ssl_jax.config import Data, View
from ssl_jax.data import Partners, batches, open_source, order
from ssl_jax.data.central import central
from ssl_jax.data.crops import NUMBERS, Cutter, draw_box, draws
from ssl_jax.data.decoding import decode
from ssl_jax.errors import UserError
from ssl_jax.files import read_lines
from ssl_jax.parallel import make_mesh
from ssl_jax.testing.tiny import tiny_config, tiny_encoder
from ssl_jax.train import hooks

CROPPED = View(size=12, crop_scale=(0.08, 1.0))
SIDES = [(40, 30), (30, 40), (33, 33), (64, 20), (5, 60), (45, 31), (20, 64), (28, 41), (50, 37), (37, 50)]


def picture(width, height, seed):
    """Smooth, so that a JPEG of it is close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of every shape, of two classes, in a folder each."""
    root = tmp_path_factory.mktemp("photos")
    for i, (width, height) in enumerate(SIDES):
        path = root / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture(width, height, i).save(path, quality=95)
    return root


def data_of(path, **more):
    return Data(**{"name": "folder", "path": str(path), "size": 16, "channels": 3, "crops": "file", **more})


def cutter(data, views=(CROPPED,) * 2, shares=(), seed=0):
    return Cutter(data, views, shares, seed, data.channels, data.size)


def feed(source, cut, start=0, stop=1, batch=8, workers=2, rows=None):
    options = {"batch": batch, "seed": cut.seed, "start": start, "stop": stop, "workers": workers, "rows": rows}
    return list(batches(source, cut=cut, **options))


def equal(a, b):
    assert a.keys() == b.keys()
    jax.tree.map(np.testing.assert_array_equal, a, b)


def by_hand(image, box, size):
    """What torchvision does with an upright image of Pillow."""
    top, left, height, width = map(int, box[:4])
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))


# Where crops lie


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (40, 300), (7, 9), (1, 50)])
def test_the_same_numbers_mean_the_box_that_the_compiled_draw_makes_of_them(height, width):
    view = View(size=8, crop_scale=(0.2, 0.9), crop_ratio=(0.6, 1.5))
    rows = jax.device_get(jax.vmap(_numbers)(jax.random.split(jax.random.key(0), 300)))
    wanted = jax.device_get(jax.jit(jax.vmap(lambda u: _draw_box(u, view, height, width)))(rows))
    numbers = np.concatenate([rows["area"], rows["ratio"], rows["corner"]], axis=1).astype(np.float64)
    found = np.array([draw_box(u, view, height, width) for u in numbers])
    wanted = np.stack([wanted[key] for key in ("top", "left", "height", "width")], axis=1)
    same = (found == wanted).all(axis=1)
    # Float32 rounds a side, a corner or a fit the other way once in a while; the fallback's centre is torchvision's.
    if min(height, width) > 7:
        assert same.mean() > 0.97
    assert np.median(abs(found - wanted).max(axis=1)) <= 1
    assert (found[:, :2] >= 0).all() and (found[:, 2:] >= 1).all()
    assert (found[:, 0] + found[:, 2] <= height).all() and (found[:, 1] + found[:, 3] <= width).all()


def test_boxes_are_distributed_as_those_of_the_compiled_draw():
    height, width, count = 375, 500, 3000
    keys = jax.random.split(jax.random.key(1), count)
    drawn = jax.jit(jax.vmap(lambda key: _draw_box(_numbers(key), CROPPED, height, width)))(keys)
    compiled = np.stack([np.asarray(drawn[key]) for key in ("top", "left", "height", "width")], axis=1)
    cut = cutter(data_of("", channels=3))
    host = np.array([draw_box(cut.numbers(i // 100, i % 100)[i % 2], CROPPED, height, width) for i in range(count)])

    def measures(boxes):
        top, left, h, w = boxes.T
        return np.stack([h * w / (height * width), np.log(w / h), top / (height - h + 1), left / (width - w + 1)])

    for a, b in zip(measures(compiled), measures(host), strict=True):
        # The largest distance of two empirical distributions of 3000 is beyond 0.05 with a probability of 1e-3.
        points = np.sort(np.concatenate([a, b]))
        shares = [np.searchsorted(np.sort(x), points, side="right") / count for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 0.05


def test_numbers_are_uniform_and_depend_on_seed_step_position_and_view():
    cut = cutter(data_of(""))
    many = np.array([cut.numbers(step, position) for step in range(20) for position in range(50)])
    assert many.shape == (1000, 2, NUMBERS) and many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.std() - 12**-0.5) < 0.005
    assert len(np.unique(many)) == many.size
    np.testing.assert_array_equal(cutter(data_of("")).numbers(3, 7), many[3 * 50 + 7])
    others = [cutter(data_of(""), seed=seed).numbers(3, 7) for seed in (1, -1, 2**63)]
    assert len(np.unique([many[157], *others])) == 8 * NUMBERS


def test_a_box_that_never_fits_is_torchvisions_central_one():
    never = np.full(NUMBERS, 0.999)
    assert draw_box(never, View(crop_scale=(0.9, 1.0)), 5, 300) == (0, (300 - 7) // 2, 5, 7)
    assert draw_box(never, View(crop_scale=(0.9, 1.0)), 300, 6) == ((300 - 8) // 2, 0, 8, 6)
    assert draw_box(never, View(crop_scale=(0.9, 1.0)), 1, 1) == (0, 0, 1, 1)


# Pixels


def test_crops_are_cut_first_and_resized_then(photos):
    source = open_source(data_of(photos))
    [batch] = feed(source, cutter(data_of(photos)))
    index = order(0, 10, 8, 0)
    np.testing.assert_array_equal(batch["index"], index)
    np.testing.assert_array_equal(batch["label"], source.labels[index])
    assert batch["boxes"].shape == (8, 2, 6) and batch["boxes"].dtype == np.float32
    for v, crops in enumerate(batch["crops"]):
        assert crops.shape == (8, 12, 12, 3) and crops.dtype == np.uint8
        for row, i in enumerate(index):
            image, box = Image.open(source.paths[i]).convert("RGB"), batch["boxes"][row, v]
            assert tuple(box[4:]) == image.size[::-1]
            # JPEGs of which both crops have twice the pixels of their views are decoded small.
            if batch["boxes"][row, :, 2:4].min() < 24:
                np.testing.assert_array_equal(crops[row], by_hand(image, box, 12))
            else:
                assert np.abs(crops[row] - by_hand(image, box, 12).astype(int)).mean() < 8


def test_a_jpeg_is_decoded_small_only_as_far_as_no_crop_is_enlarged(monkeypatch):
    image, asked = picture(800, 600, 0), []
    image.save(file := io.BytesIO(), "jpeg", quality=95)
    whole = JpegImageFile.load

    def load(self):
        asked.append(self.size)
        return whole(self)

    monkeypatch.setattr(JpegImageFile, "load", load)
    numbers = np.full((2, NUMBERS), 0.5)
    for size, wanted in ((300, 1), (299, 1), (200, 2), (100, 4), (51, 8), (3, 8)):
        views = [View(size=size, crop_scale=(0.5625, 0.5625), crop_ratio=(4 / 3, 4 / 3))] * 2  # 600 x 450 px
        cut = cutter(data_of("", size=16), views)
        asked.clear()
        for crop, box in cut.cut(file.getvalue(), numbers, range(2)):
            assert box == (75, 100, 450, 600, 600, 800)
            assert asked[0] == (-(-800 // wanted), -(-600 // wanted))
            close = np.abs(crop - by_hand(image, box, size).astype(int)).mean()
            assert close < 3, (size, close)
    views[1] = View(size=3)  # the test image, whole
    asked.clear()
    cutter(data_of("", size=16), views).cut(file.getvalue(), numbers, range(2))
    assert asked[0] == (800, 600)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_that_lies_on_its_side_is_decoded_small(orientation):
    """Of sides that are no multiples of the scale, whose last pixel shows less than the others."""
    exif = Image.Exif()
    exif[274] = orientation
    picture(203, 157, 0).save(file := io.BytesIO(), "jpeg", quality=97, exif=exif, subsampling=0)
    upright = ImageOps.exif_transpose(Image.open(file))
    cut = cutter(data_of(""), [View(size=24, crop_scale=(0.6, 1.0))] * 2)
    for position in range(3):
        for crop, box in cut.cut(file.getvalue(), cut.numbers(0, position), range(2)):
            assert np.abs(crop - by_hand(upright, box, 24).astype(int)).mean() < 2


def test_odd_files(tmp_path):
    picture(40, 30, 0).convert("L").save(tmp_path / "gray.jpg")
    turned = picture(40, 30, 1)
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[274] = orientation
        turned.save(tmp_path / f"turned{orientation}.jpg", exif=exif, quality=95)
    picture(300, 5, 2).save(tmp_path / "tiny.png")
    picture(40, 30, 3).convert("CMYK").save(tmp_path / "cmyk.jpg")
    clear = picture(40, 30, 4)
    clear.putalpha(picture(40, 30, 5).convert("L"))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 7).save(tmp_path / "deep.png")
    data = data_of(tmp_path, background="#ff0000")
    source, cut = open_source(data), cutter(data)
    assert len(source) == 13 and not source.skipped
    for i, name in enumerate(source.names):
        upright = ImageOps.exif_transpose(Image.open(tmp_path / name))
        out = cut.empty(1)
        cut.fill(out, 0, source, 0, i, [i])
        for v in range(2):
            box = out["boxes"][0, v]
            assert tuple(box[4:]) == upright.size[::-1], name
            if "clear" not in name and "deep" not in name:
                wanted = by_hand(upright.convert("RGB"), box, 12)
                assert np.abs(out["crops"][v][0] - wanted.astype(int)).mean() < 8, name
    for name in ("clear.png", "deep.png", "turned6.jpg"):
        i = source.names.index(name)
        out = cut.empty(1)
        cut.fill(out, 0, source, 0, i, [i])
        image = Image.fromarray(decode((tmp_path / name).read_bytes(), 0, 3, background="#ff0000"))
        np.testing.assert_array_equal(out["crops"][0][0], by_hand(image, out["boxes"][0, 0], 12))


def test_gray_bands_pages_and_arrays(tmp_path):
    """One channel from colour files; several from bands and pages; any number from arrays: all as cut by hand."""
    (tmp_path / "bands").mkdir()
    planes = [picture(40, 30, seed).convert("L") for seed in range(4)]
    planes[0].save(tmp_path / "pages.tif", save_all=True, append_images=planes[1:])
    for name, plane in zip("abcd", planes, strict=True):
        plane.copy().save(tmp_path / "bands" / f"x_{name}.png")
    arrays = np.stack([np.stack([np.asarray(p) for p in planes], -1)] * 2)
    np.savez(tmp_path / "a.npz", images=arrays)
    bands = {"path": str(tmp_path / "bands"), "bands": ("_a", "_b", "_c", "_d"), "channels": 4}
    for data in (
        data_of(**bands),
        data_of(tmp_path, channels=4, max_bad_share=1.0),
        data_of(tmp_path / "a.npz", name="npz", channels=4),
    ):
        source = open_source(data)
        source = source.take([source.names.index("pages.tif")]) if "pages.tif" in source.names else source
        out, cut = cutter(data).empty(1), cutter(data)
        cut.fill(out, 0, source, 0, 0, [0])
        for v in range(2):
            wanted = np.stack([by_hand(plane, out["boxes"][0, v], 12) for plane in planes], axis=-1)
            np.testing.assert_array_equal(out["crops"][v][0], wanted)
    gray = data_of(tmp_path / "g", channels=1)
    (tmp_path / "g").mkdir()
    picture(40, 30, 9).save(tmp_path / "g" / "c.png")
    out = cutter(gray).empty(1)
    cutter(gray).fill(out, 0, open_source(gray), 0, 0, [0])
    wanted = by_hand(picture(40, 30, 9).convert("L"), out["boxes"][0, 0], 12)
    np.testing.assert_array_equal(out["crops"][0][0], wanted[..., None])


def test_records_of_tfds():
    path = Path(__file__).parent / "data" / "tfds" / "tiny_squares" / "1.0.0"
    data = data_of(path, name="tfds", size=8, test_side=9)
    source, cut = open_source(data), cutter(data)
    [batch] = feed(source, cut)
    assert batch["boxes"][:, :, 4:].reshape(-1, 2).tolist() == [[12, 16]] * 16
    whole = open_source(Data(name="tfds", path=str(path))).arrays()
    for row, i in enumerate(batch["index"]):
        np.testing.assert_array_equal(source.load(i), central(Image.fromarray(whole[i]), 8, 9))
        image = Image.fromarray(whole[i])
        np.testing.assert_array_equal(batch["crops"][1][row], by_hand(image, batch["boxes"][row, 1], 12))


def test_a_dicom_file_is_cut_after_its_window(tmp_path):
    pytest.importorskip("pydicom")
    from test_data_dicom import made

    content = made(np.arange(2000, dtype=np.uint16).reshape(40, 50), WindowCenter=1000, WindowWidth=400)
    (tmp_path / "a.dcm").write_bytes(content)
    data = data_of(tmp_path, channels=1)
    out, cut = cutter(data).empty(1), cutter(data)
    cut.fill(out, 0, open_source(data), 0, 0, [0])
    whole = Image.fromarray(decode(content, 0, 1)[..., 0])
    assert np.asarray(whole).min() == 0 and np.asarray(whole).max() == 255
    np.testing.assert_array_equal(out["crops"][0][0, ..., 0], by_hand(whole, out["boxes"][0, 0], 12))


def test_a_view_without_a_crop_is_the_test_image(photos):
    for side in (0, 20):
        data = data_of(photos, test_side=side)
        source = open_source(data)
        cut = cutter(data, (View(size=16), CROPPED, View(size=8)))
        [batch] = feed(source, cut)
        if side:  # where JPEGs are not decoded small
            np.testing.assert_array_equal(batch["crops"][0], source.load_many(batch["index"]))
        height, width = batch["boxes"][0, 0, 4:]
        shown = min(height, width) * (16 / side if side else 1)
        wanted = ((height - shown) / 2, (width - shown) / 2, shown, shown)
        np.testing.assert_allclose(batch["boxes"][0, 0, :4], wanted, rtol=1e-6)
        np.testing.assert_allclose(batch["boxes"][0, 2, :4], wanted, rtol=1e-6)


# Nothing but (seed, step) decides


def test_workers_rows_and_the_step_to_begin_at_change_nothing(photos):
    source = open_source(data_of(photos))
    cut = cutter(data_of(photos), (CROPPED, View(size=5, crop_scale=(0.05, 0.4))))
    whole = feed(source, cut, 0, 5, workers=1)
    for a, b in zip(whole, feed(source, cut, 0, 5, workers=3), strict=True):
        equal(a, b)
    for a, b in zip(whole[2:], feed(source, cut, 2, 5), strict=True):
        equal(a, b)
    for rows in (np.arange(3), np.array([1, 4, 5, 7])):  # as of one of several processes
        for a, b in zip(whole, feed(source, cut, 0, 5, rows=rows), strict=True):
            equal(jax.tree.map(lambda x, rows=rows: x[rows], a), b)
    boxes = np.stack([batch["boxes"] for batch in whole])
    assert len(np.unique(boxes[..., :4].reshape(-1, 4), axis=0)) > 70  # of 80


def test_views_that_share_the_crop(photos):
    source, views = open_source(data_of(photos)), (CROPPED,) * 3
    [batch] = feed(source, cutter(data_of(photos), views, ((), ("crop",), ("flip", "colour"))))
    np.testing.assert_array_equal(batch["boxes"][:, 0], batch["boxes"][:, 1])
    np.testing.assert_array_equal(batch["crops"][0], batch["crops"][1])
    assert (batch["boxes"][:, 0] != batch["boxes"][:, 2]).any(axis=1).sum() > 5  # boxes of small images may agree


def test_every_second_view_shows_the_partner(photos):
    data = data_of(photos, pairs="folder")
    source = open_source(data)
    views = (CROPPED, CROPPED, View(size=6, crop_scale=(0.1, 0.5)), View(size=6, crop_scale=(0.1, 0.5)))
    [batch] = feed(source, cutter(data, views))
    index = order(0, 10, 8, 0)
    shown = index, Partners(source.objects)(0, index, 0)
    for v in range(4):
        sides = np.array([Image.open(source.paths[i]).size[::-1] for i in shown[v % 2]])
        np.testing.assert_array_equal(batch["boxes"][:, v, 4:], sides)
        image = Image.open(source.paths[shown[v % 2][0]]).convert("RGB")
        wanted = by_hand(image, batch["boxes"][0, v], views[v].size).astype(int)
        assert np.abs(batch["crops"][v][0] - wanted).mean() < 5


def test_an_unreadable_file_has_the_stand_in_of_the_squares(photos, tmp_path):
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
        content = path.read_bytes()
        (tmp_path / f"{i}.jpg").write_bytes(content[: len(content) * 4 // 5] if i in (2, 3) else content)
    data = data_of(tmp_path, max_bad_share=0.5)
    squares, source = open_source(data), open_source(data)
    squares.load_many(range(10))
    [batch] = feed(source, cutter(data), batch=10)
    assert source.replaced == squares.replaced and set(source.replaced) == {2, 3}
    row = batch["index"].tolist().index(2)
    stand_in = Image.open(source.paths[source.replaced[2]])
    assert tuple(batch["boxes"][row, 0, 4:]) == stand_in.size[::-1]
    (tmp_path / "5.jpg").unlink()
    with pytest.raises(UserError, match="5.jpg': No such file or directory; it was readable at the start"):
        feed(open_source(data).take([0, 1]), cutter(data), batch=2)
        feed(source, cutter(data), batch=10)


# In the compiled step


def test_the_rest_of_a_view_is_that_of_the_same_random_numbers():
    """Cut or not: flip, colour and blur of a crop of the whole image are those of the image."""
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    view = View(size=12, flip=0.5, jitter_prob=0.8, brightness=0.4, hue=0.1, gray=0.2, blur=0.5, solarize=0.2)
    shares, key = ((), ("flip", "colour")), jax.random.key(3)
    wanted, told = jax.device_get(jax.jit(make_views((view, view), shares))(key, images))
    boxes = np.tile(np.float32([3, 4, 100, 200, 300, 400]), (4, 2, 1))
    cropped = View(**{**vars(view), "crop_scale": (0.1, 1.0)})
    finish = jax.jit(finish_views((cropped, cropped), shares))
    views, drawn = jax.device_get(finish(key, (images, images), boxes))
    jax.tree.map(np.testing.assert_array_equal, views, wanted)
    part, _ = jax.device_get(finish(key, (images[2:], images[2:]), boxes[2:], np.arange(2, 4)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[2:], atol=1e-6), part, wanted)
    for one, other in zip(drawn, told, strict=True):
        assert one.keys() == other.keys()
        assert {k: one[k][0].tolist() for k in ("top", "left", "height", "width", "source")} == {
            "top": 3, "left": 4, "height": 100, "width": 200, "source": [300, 400],
        }  # fmt: skip
        np.testing.assert_array_equal(one["hue"], other["hue"])


def losses_of(config, source, devices, count=3):
    setup = train.set_up(config, source, tiny_encoder())
    mesh = make_mesh(devices, config.train.batch, config.train.part)
    state = jax.device_put(train.init_state(setup, 0), train.step.parallel.replicated(mesh))
    step, found = jax.jit(train.make_step(setup, config, mesh)), []
    for batch in train.step.batches(config, source, mesh, 0, count, setup.views, setup.method.shares):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


def test_devices_and_micro_batches_change_no_loss(photos):
    changes = {"data__name": "folder", "data__path": str(photos), "data__size": 16, "data__crops": "file"}
    changes |= {"train__batch": 8, "train__bn_group": 4, "data__channels": 3}
    configs = [tiny_config("simclr", **changes), tiny_config("simclr", **changes, train__micro_batch=4)]
    source = open_source(configs[0].data)
    whole = losses_of(configs[0], source, 1)
    np.testing.assert_allclose(losses_of(configs[1], source, 4), whole, atol=1e-5)


def test_what_cannot_be_cut_from_files_is_one_line(photos):
    source = open_source(data_of(photos))
    warps = {"rotate": 10.0, "zoom": (0.8, 1.2), "translate": 0.1, "shear": 5.0, "perspective": 0.2}
    for key, value in warps.items():
        config = tiny_config("simclr", data__crops="file", train__batch=8, **{f"augment__{key}": value})
        told = rf"config.augment.{key}=.*: allowed with config.data.crops='file': "
        with pytest.raises(UserError, match=told) as error:
            train.set_up(config, source)
        assert "\n" not in str(error.value)
    config = tiny_config("simclr", data__crops="file", data__engine="memory", train__batch=8)
    with pytest.raises(UserError, match="config.data.engine='memory': .*; allowed with config.data.crops='file': disk"):
        train.set_up(config, source)
    drawn = open_source(Data(name="synthetic", size=16, crops="file"))
    with pytest.raises(UserError, match="config.data.crops='file': images of 'synthetic' .*; allowed: square"):
        feed(drawn, cutter(data_of("", name="synthetic")))


def test_the_sheet_shows_crops_of_the_files(photos):
    config = tiny_config("simclr", data__name="folder", data__path=str(photos), data__size=16, data__crops="file")
    source = open_source(config.data)
    made = draws(config, source, (CROPPED, CROPPED), [3, 0], count=2)
    assert len(made) == 2 and (made[0]["boxes"] != made[1]["boxes"]).any()
    assert made[0]["boxes"][0, 0, 4:].tolist() == list(Image.open(source.paths[3]).size[::-1])
    assert draws(tiny_config("simclr"), source, (CROPPED,), [0]) == []


# A whole run

RUN = {
    "data.name": "folder", "data.size": 16, "data.crops": "file", "data.test_side": 18,
    "augment.preset": "none", "augment.crop_scale": "(0.1, 1.0)", "augment.flip": 0.5,
    "model.name": "ssl_jax.testing.model", "method.hidden": 16, "method.out": 8, "train.batch": 8,
    "train.duration": "16 steps", "train.log_every": "1 steps", "train.save_every": "4 steps",
    "eval.every": "8 steps", "train.devices": 1,
}  # fmt: skip


def arguments(photos, workdir):
    flags = [f"--config.{key}={value}" for key, value in {**RUN, "data.path": photos}.items()]
    return ["pretrain", "--config=pretrain:simclr", f"--workdir={workdir}", *flags]


def test_a_killed_run_ends_bit_identical(photos, tmp_path, monkeypatch):
    assert cli.main(arguments(photos, tmp_path / "whole")) == 0
    assert (tmp_path / "whole" / "views.png").is_file()
    process = forked.Python(forked.SLOWLY, *arguments(photos, tmp_path / "run"))
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if len(read_lines(tmp_path / "run" / "metrics.jsonl")) >= 7:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(hooks, "write_views", lambda *_: None)
    assert cli.main(arguments(photos, tmp_path / "run")) == 0
    found, wanted = (
        (
            read_metadata(run / "checkpoints" / f"{steps(run / 'checkpoints')[-1]:09d}")["arrays"],
            (run / "metrics.jsonl").read_bytes(),
        )
        for run in (tmp_path / "run", tmp_path / "whole")
    )
    assert found == wanted
