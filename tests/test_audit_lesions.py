"""The audit of lesions against counts by hand, on images with a bright disc."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from discs import disc, discs, write_discs
from PIL import Image

from ssl_jax.audit import ladder
from ssl_jax.audit import lesions as audit_lesions
from ssl_jax.audit.ladder import TRANSFORMS, alone, draw_many
from ssl_jax.audit.lesions import audit, by_class, kept_area, ring, verdict, worst
from ssl_jax.audit.masks import Lesion, find_lesions, open_masks
from ssl_jax.augment import geometry, render, resolve_views
from ssl_jax.cli import main
from ssl_jax.config import Augment, Data, View
from ssl_jax.data import open_source
from ssl_jax.errors import UserError


def as_lesions(masks, name="Nodule"):
    return [Lesion(i, name, mask.astype(np.float32)) for i, mask in enumerate(masks)]


def test_area_by_hand():
    """A lesion of 4 x 4 px at rows 8 to 11 and columns 0 to 3 of a 20 px image."""
    mask = np.zeros((1, 20, 20), np.float32)
    mask[0, 8:12, :4] = 1
    view = View(size=20)

    def kept(**parameters):
        many = {name: jnp.asarray(value)[None] for name, value in parameters.items()}
        return kept_area(mask, many, view).item()

    assert kept(shift=[-3.0, 0.0]) == pytest.approx(1 / 4)  # three of four columns leave on the left
    assert kept(shift=[-1.0, -10.0]) == pytest.approx(3 / 4 * 2 / 4)  # and two rows on top
    assert kept(shift=[7.0, 2.0]) == 1
    assert kept(top=9.0, left=1.0, height=10.0, width=10.0) == pytest.approx(9 / 16)
    assert kept(top=9.0, left=1.0, height=10.0, width=10.0, flip=True) == pytest.approx(9 / 16)
    assert kept(top=0.0, left=0.0, height=8.0, width=20.0) == 0
    assert kept(angle=180.0) == kept(flip=True) == 1
    # Enlarged twice about the centre, rows and columns 5 to 14 remain.
    assert kept(zoom=2.0) == 0
    assert kept(corners=[[-3.0, 0.0], [16.0, 0.0], [16.0, 19.0], [-3.0, 19.0]]) == pytest.approx(1 / 4)  # a shift
    assert kept(corners=[[-19.0, 0.0], [19.0, 0.0], [19.0, 19.0], [-19.0, 19.0]]) == 0  # the right half fills the view


def test_crop_against_boxes_counted_by_slicing():
    size, n = 24, 3
    _, masks = discs(n, size)
    view = alone(TRANSFORMS["crop"], 0.2, size)
    drawn = draw_many(view, 50, 1, (size, size))
    kept = kept_area(masks.astype(np.float32), geometry(drawn), view)
    for lesion in range(n):
        for i in range(50):
            top, left, height, width = (int(drawn[k][i]) for k in ("top", "left", "height", "width"))
            inside = masks[lesion, top : top + height, left : left + width].sum()
            assert kept[lesion, i] == pytest.approx(inside / masks[lesion].sum(), abs=1e-6)
    assert 0 < (kept < 0.5).mean() < 1


def test_rotation_keeps_what_stays_within_the_image():
    """A pixel remains if its turned centre is inside: the same but for the border's pixels."""
    size, angle = 40, 30.0
    mask = disc(size, 4, 4, 6)[None].astype(np.float32)
    y, x = np.nonzero(mask[0])
    turn = np.deg2rad(angle)
    right, down = x + 0.5 - size / 2, y + 0.5 - size / 2
    where = np.cos(turn) * right + np.sin(turn) * down, -np.sin(turn) * right + np.cos(turn) * down
    share = (np.abs(where) < size / 2).all(axis=0).mean()
    kept = kept_area(mask, {"angle": jnp.array([angle])}, View(size=size)).item()
    assert 0.1 < share < 0.9 and kept == pytest.approx(share, abs=0.12)


def test_rates_by_hand():
    first = np.array([[1.0, 0.4, 0.4, 1.0], [0.5, 0.5, 0.5, 0.5], [np.nan] * 4])
    second = np.array([[1.0, 0.4, 1.0, 1.0], [0.0, 0.5, 0.5, 0.5], [np.nan] * 4])
    rows = {row["class"]: row for row in by_class([first, second], ["b", "a", "a"])}
    assert rows["b"] == {"class": "b", "lesions": 1, "lost": 3 / 8, "disagree": 1 / 4, "kept": pytest.approx(6.2 / 8)}
    assert rows["a"]["lost"] == 1 / 8 and rows["a"]["disagree"] == 1 / 4 and rows["a"]["lesions"] == 1
    assert rows["all"]["lost"] == 2 / 8 and rows["all"]["lesions"] == 2


def test_contrast_of_known_factors():
    """Half the brightness halves a contrast; a blur takes more from a small disc than from a large one."""
    size = 40
    masks = np.stack([disc(size, 20, 20, 2.5), disc(size, 20, 20, 9), disc(size, 20, 20, 9)])
    levels = np.array([90, 90, 2])[:, None, None]  # the last one can hardly be seen
    images = (80 + levels * masks).astype(np.uint8)[..., None]
    measure = audit_lesions._Contrast(images, as_lesions(masks), size)
    np.testing.assert_allclose(measure.before[:2], 90 / 255, rtol=1e-5)
    half = {"order": jnp.zeros((1, 1), int), "brightness": jnp.array([0.5])}
    dark = audit_lesions._contrasts(measure.images, measure.inside, measure.around, half, View(size=size))
    np.testing.assert_allclose(np.asarray(dark)[:2, 0] / measure.before[:2], 0.5, rtol=1e-5)
    kept = measure(View(size=size, blur=1.0, blur_sigma=(2.0, 2.0)), 0)
    assert kept[0].max() < 0.6 < kept[1].min() < 1 and np.isnan(kept[2]).all()
    assert (measure(View(size=size, rotate=40.0), 0)[:2] == 1).all()  # contrast is asked where pixels stay


def test_ring_is_around_and_follows_the_size():
    small, large = disc(60, 30, 30, 2), disc(60, 30, 30, 16)
    assert not (ring(small) & small).any() and not (ring(large) & large).any()
    assert (np.nonzero(ring(small))[0].min(), np.nonzero(ring(large))[0].min()) == (25, 6)


def test_chest_xray_passes_and_the_natural_crop_shows_its_damage(monkeypatch):
    one = TRANSFORMS["contrast"]._replace(strengths=(0.4,))  # each strength is a program of its own
    monkeypatch.setattr(ladder, "TRANSFORMS", {**TRANSFORMS, "contrast": one})
    size = 48
    images, masks = discs(12, size)

    def rows(preset, *transforms):
        return audit(images, as_lesions(masks), resolve_views(Augment(preset), 2, size), transforms=transforms)

    chest, natural = rows("chest_xray", "crop"), rows("natural", "contrast")
    assert worst(chest)["lost"] <= 0.05 and verdict(chest).startswith("passes")
    assert worst(natural)["lost"] > 0.3 and verdict(natural).startswith("does not pass")
    crop = {r["strength"]: r for r in chest if (r["transform"], r["class"]) == ("crop", "all")}
    assert list(crop) == [0.8, 0.6, 0.4, 0.2, 0.08]
    assert [r["lost"] for r in crop.values()] == sorted(r["lost"] for r in crop.values())  # the more, the stronger
    assert crop[0.2]["lost"] > 0.2 and crop[0.2]["disagree"] > 0.2 and crop[0.8]["lost"] < 0.1
    assert {(r["transform"], r["strength"]) for r in natural if r["configured"]} == {
        ("config", None),
        ("contrast", 0.4),
    }


def test_masks_and_boxes_tell_the_same(tmp_path):
    _, masks = write_discs(tmp_path, 4, 32)
    data = Data(name="folder", path=str(tmp_path / "images"), size=32, channels=1)
    source = open_source(data)
    found, outside = find_lesions(source, open_masks(str(tmp_path / "masks"), source, data), 3, seed=0)
    assert outside == 0 and len(found) == 3 and {lesion.name for lesion in found} == {"Nodule"}
    for lesion in found:
        i = int(source.names[lesion.image].split("/")[1].removesuffix(".png"))
        np.testing.assert_array_equal(lesion.mask, masks[i])
    boxes = open_masks(str(tmp_path / "boxes.csv"), source, data)(found[0].image)["Nodule"]
    y, x = np.nonzero(found[0].mask)
    assert boxes[y.min() : y.max() + 1, x.min() : x.max() + 1].all()
    assert boxes.sum() == (y.max() + 1 - y.min()) * (x.max() + 1 - x.min())
    for column, asked in (("Image", ""), ("scan", "scan"), ("file", "scan")):
        (tmp_path / "other.csv").write_text((tmp_path / "boxes.csv").read_text().replace("path", column, 1))
        how = dataclasses.replace(data, image_column=asked)
        again = open_masks(str(tmp_path / "other.csv"), source, how)(found[0].image)["Nodule"]
        np.testing.assert_array_equal(again, boxes)
    (tmp_path / "other.csv").write_text((tmp_path / "boxes.csv").read_text().replace("path", "scan", 1))
    with pytest.raises(UserError, match=r"--masks=.*other\.csv: no column of paths, such as path, file"):
        open_masks(str(tmp_path / "other.csv"), source, data)


def test_a_mask_is_cut_and_resized_like_its_image(tmp_path):
    """An image of 60 x 30 px read at 15 px: the middle square, halved. A mask of one bit beside it, without a class."""
    shown = np.zeros((30, 60), np.uint8)
    shown[10:20, 15:25] = 200
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.fromarray(shown).save(tmp_path / "images" / "a.b.png")
    Image.fromarray((shown > 0).astype(np.uint8)).save(tmp_path / "masks" / "a.b.png")  # 0 and 1, as some tools write
    data = Data(name="folder", path=str(tmp_path / "images"), size=15, channels=1)
    source = open_source(data)
    (lesion,), _ = find_lesions(source, open_masks(str(tmp_path / "masks"), source, data), 1, seed=0)
    assert lesion.name == "lesion"
    np.testing.assert_allclose(lesion.mask * 200 / 255, source.load(0)[..., 0] / 255, atol=1.5 / 255)
    # Left of the square: nothing of it can be seen.
    shown[:] = 0
    shown[10:20, :12] = 1
    Image.fromarray(shown).save(tmp_path / "masks" / "a.b.png")
    with pytest.raises(UserError, match="no lesion for any of 1 images"):
        find_lesions(source, open_masks(str(tmp_path / "masks"), source, data), 1, seed=0)
    Image.fromarray(np.ones((15, 15), np.uint8)).save(tmp_path / "masks" / "a.b.png")
    with pytest.raises(UserError, match=r"a\.b\.png: 15 x 15 px, but the image has 60 x 30; allowed: the image's size"):
        open_masks(str(tmp_path / "masks"), source, data)(0)


def test_command_writes_table_and_picture(tmp_path, capsys, monkeypatch):
    names = ("flip", "rotate", "perspective", "hue", "saturation", "gray", "blur")  # for time's sake not all
    weak = {name: TRANSFORMS[name]._replace(strengths=TRANSFORMS[name].strengths[:2]) for name in names}
    monkeypatch.setattr(ladder, "TRANSFORMS", weak)
    write_discs(tmp_path, 5, 24)
    how = ["--config=pretrain:byol", "--config.data.name=folder", f"--config.data.path={tmp_path / 'images'}"]
    how += ["--config.data.size=24", "--config.data.channels=1", "--config.augment.preset=chest_xray"]
    out = tmp_path / "new" / "audit"
    masks = f"--masks={tmp_path / 'masks'}"
    assert main(["audit", "--lesions", *how, masks, f"--out={out}", "--images=4"]) == 0
    with (out / "lesions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["lesions"] for r in rows} == {"4"} and {r["class"] for r in rows} == {"all", "Nodule"}
    chosen = {(r["transform"], r["strength"]) for r in rows if r["configured"] == "True"}
    assert chosen == {("config", ""), ("rotate", "10"), ("perspective", "0.2")}
    # One channel has no colour, and a flip keeps all.
    assert {r["transform"] for r in rows} == {"config", "rotate", "perspective", "blur"}
    assert (out / "lesions.png").stat().st_size > 10_000
    assert "chest_xray: passes" in capsys.readouterr().out
    sheet = tmp_path / "views.png"
    assert main(["views", *how, f"--masks={tmp_path / 'boxes.csv'}", f"--out={sheet}", "--images=2"]) == 0
    assert sheet.stat().st_size > 1000


BOXES = "path,left,top,right,bottom\n"
MISTAKES = [
    (["--lesions"], None, "--masks: missing"),
    ([], None, "audit: nothing to do; use --lesions, --invariance or both"),
    (["--lesions", "--masks=/no/such"], None, "--masks=/no/such: not found"),
    (["--lesions", "--masks=BOXES"], "path,left\n", "no column 'top'"),
    (["--lesions", "--masks=BOXES"], BOXES + "sub/0.png,1,2,x,4\n", "(line 2): could not convert string to float: 'x'"),
    (["--lesions", "--masks=BOXES"], BOXES + "sub/0.png,1,2,3,4\nsub/1.png,5,1,3,4\n", "(line 3): left=5 top=1"),
    (["--lesions", "--masks=BOXES"], BOXES + "sub/0.png,1,2,3\n", "(line 2): 4 values, but the header has 5"),
    (["--lesions", "--masks=BOXES"], BOXES + "other.png,1,2,3,4\n", "no path is that of an image, such as 'other.png'"),
    (["--lesions", "--masks=EMPTY"], None, "no lesion for any of 2 images; for 'sub/0.png'"),
    (["--lesions", "--masks=EMPTY", "--out=BOXES"], BOXES, "boxes.csv: is a file; allowed: a folder"),
    (["--lesions", "--masks=EMPTY", "--images=0"], None, "--images=0: allowed: 1 or more"),
]


@pytest.mark.parametrize(("flags", "text", "message"), MISTAKES)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, text, message):
    write_discs(tmp_path, 2, 16)
    if text:
        (tmp_path / "boxes.csv").write_text(text)
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "BOXES": tmp_path / "boxes.csv"}
    flags = [
        f"{flag.split('=')[0]}={places[flag.split('=')[1]]}" if flag.split("=")[-1] in places else flag
        for flag in flags
    ]
    config = ["--config=pretrain", "--config.data.name=folder", f"--config.data.path={tmp_path / 'images'}"]
    assert main(["audit", *config, *flags]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0], told


def test_outlines_follow_the_view(tmp_path):
    """On a sheet the outline of a mask lies around the lesion of each view, flipped views among them."""
    from ssl_jax.augment.sheet import _moved

    images, masks = discs(2, 24)
    views = resolve_views(Augment("none", {"flip": 1.0, "rotate": 20.0}), 1, 24)
    drawn = draw_many(views[0], 2, 0, (24, 24))
    moved = _moved([{"a": masks[0].astype(np.float32)}, {}], drawn, views[0])
    shown = render(jnp.asarray(images[0]), jax.tree.map(lambda v: v[0], drawn), views[0])[..., 0]
    inside = moved[0]["a"] > 0.9
    assert moved[1] == {} and inside.sum() > 5 and shown[inside].min() > 0.45 > np.median(shown)
