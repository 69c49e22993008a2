import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import PRESETS, center_view, draw, make_views, ops, origins, render, resolve_views
from ssl_jax.augment.views import COLOUR
from ssl_jax.config import Augment, View
from ssl_jax.errors import UserError

EVERYTHING = View(
    size=12, crop_scale=(0.1, 1.0), flip=0.5, rotate=20.0, translate=0.1, perspective=0.5, jitter_prob=0.8,
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, blur=0.5, solarize=0.2,
)  # fmt: skip


def photos(count=5, height=16, width=16, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@functools.cache
def many_draws(view, height=32, width=32, count=4000):
    @jax.jit
    def drawn():
        return jax.vmap(lambda key: draw(key, view, height, width))(jax.random.split(jax.random.key(0), count))

    return jax.device_get(drawn())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_shapes_range_and_asymmetric_sizes_for_any_channels(channels):
    images = photos(6, 16, 20, channels)
    made = jax.device_get(jax.jit(make_views([EVERYTHING, View(size=9, flip=0.5)]))(jax.random.key(0), images)[0])
    assert [v.shape for v in made] == [(6, 12, 12, channels), (6, 9, 9, channels)]
    for view in made:
        assert view.dtype == jnp.float32
        assert 0 <= view.min() < view.max() <= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_draws_what_it_says(preset):
    views = resolve_views(Augment(preset), 2, 16)
    first, second = jax.device_get(jax.jit(make_views(views))(jax.random.key(1), photos(8))[0])
    unchanged = photos(8) / np.float32(255)
    changes = preset != "none"
    assert (np.abs(first - unchanged).max() > 0.05) == changes
    assert (np.abs(first - second).max() > 0.05) == changes


def test_a_view_depends_only_on_key_and_position():
    small = View(size=12, crop_scale=(0.1, 1.0))
    jitted = jax.jit(make_views([small, small]))

    def views(key, images):
        return jax.device_get(jitted(key, images)[0])

    images = photos(7)
    whole, again, part = (views(jax.random.key(3), x) for x in (images, images, images[:3]))
    other = views(jax.random.key(4), images)
    for v in range(2):
        np.testing.assert_array_equal(whole[v], again[v])
        np.testing.assert_allclose(whole[v][:3], part[v], atol=1e-6)
        assert np.abs(whole[v] - other[v]).max() > 0.1
    copies = views(jax.random.key(3), np.repeat(images[:1], 2, 0))
    assert np.abs(copies[0][0] - copies[0][1]).max() > 0.1  # another position
    assert np.abs(copies[0][0] - copies[1][0]).max() > 0.1  # another view


MOST = make_views([replace(EVERYTHING, perspective=0.0, translate=0.0, saturation=0.0, hue=0.0)])


@pytest.mark.slow
def test_jit_changes_nothing():
    plain, jitted = (views(jax.random.key(5), photos(8))[0][0] for views in (MOST, jax.jit(MOST)))
    np.testing.assert_allclose(jitted, plain, atol=2e-6)


def test_sharding_changes_nothing():
    views, images = jax.jit(MOST), photos(8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    sharded = jax.device_put(images, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    alone, together = (np.asarray(views(jax.random.key(5), x)[0][0]) for x in (images, sharded))
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_what_is_off_is_not_drawn_and_moves_no_other_draw():
    assert draw(jax.random.key(0), View(), 8, 8) == {}
    assert draw(jax.random.key(0), View(brightness=0.4, blur_sigma=(1.0, 2.0), hue=0.1), 8, 8) == {}  # probability 0

    @jax.jit
    def drawn():
        views = EVERYTHING, replace(EVERYTHING, blur=0, flip=0), replace(EVERYTHING, brightness=0.0)
        return [draw(jax.random.key(0), view, 8, 8) for view in views]

    with_blur, without, without_brightness = jax.device_get(drawn())
    assert set(with_blur) - set(without) == {"sigma", "flip"}
    for name in without:
        np.testing.assert_array_equal(with_blur[name], without[name])
    fewer = without_brightness["order"]  # the others keep their order
    np.testing.assert_array_equal(fewer + 1, [n for n in with_blur["order"] if n != 0])


def test_rates_and_ranges():
    made = many_draws(EVERYTHING)
    for name, probability in (("flip", 0.5), ("gray", 0.2), ("solarize", 0.2)):
        assert made[name].mean() == pytest.approx(probability, abs=0.03)
    blurred = made["sigma"][made["sigma"] > 0]
    assert len(blurred) / 4000 == pytest.approx(0.5, abs=0.03)
    assert blurred.min() >= 0.1 and blurred.max() <= 2 and blurred.mean() == pytest.approx(1.05, abs=0.05)
    jittered = made["brightness"] != 1
    assert jittered.mean() == pytest.approx(0.8, abs=0.03)
    np.testing.assert_array_equal(jittered, made["hue"] != 0)  # jitter is on or off as a whole
    assert made["brightness"].min() < 0.62 and made["brightness"].max() > 1.38
    assert abs(made["hue"]).max() <= 0.1 and abs(made["angle"]).max() <= 20 and abs(made["shift"]).max() == 3
    moved = (made["corners"] != np.array([[0, 0], [31, 0], [31, 31], [0, 31]])).any((1, 2))
    assert moved.mean() == pytest.approx(0.5, abs=0.03)
    assert made["corners"].min() == 0 and made["corners"].max() == 31


def test_crop_boxes_are_those_of_random_resized_crop():
    made = many_draws(View(size=8, crop_scale=(0.2, 0.6)), height=60, width=90)
    top, left, height, width = (made[k] for k in ("top", "left", "height", "width"))
    share = height * width / (60 * 90)
    assert 0.19 < share.min() < 0.22 and 0.58 < share.max() < 0.62 and share.mean() == pytest.approx(0.4, abs=0.01)
    ratio = np.log(width / height)
    assert abs(ratio).max() < np.log(4 / 3) + 0.05 and abs(ratio.mean()) < 0.02
    assert top.min() == 0 and left.min() == 0 and (top + height).max() == 60 and (left + width).max() == 90
    for box in (top, left, height, width):
        np.testing.assert_array_equal(box, np.round(box))


def test_crop_that_never_fits_is_the_largest_central_box():
    made = many_draws(View(crop_scale=(0.9, 0.99), crop_ratio=(2.0, 3.0)), height=30, width=30, count=3)
    assert {k: float(v[0]) for k, v in made.items()} == {"top": 8.0, "left": 0.0, "height": 15.0, "width": 30.0}


def test_all_orders_of_the_jitter_occur():
    orders = many_draws(EVERYTHING)["order"]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 4000 / 24 / 2


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_the_ops_in_the_drawn_order(channels):
    image = np.float32(photos(1, channels=channels)[0] / 255)
    factors = {"brightness": 1.3, "contrast": 0.6, "saturation": 1.7, "hue": -0.1}
    adjust = [jax.jit(getattr(ops, f"adjust_{name}")) for name in COLOUR]
    jitter = jax.jit(lambda order: render(image, {**factors, "order": order}, View(size=16)))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0), (1, 0, 3, 2)):
        expected = image
        for number in order:
            expected = adjust[number](expected, factors[COLOUR[number]])
        np.testing.assert_allclose(jitter(np.array(order)), expected, atol=2e-6)


def test_grayscale_comes_before_the_jitter_if_asked():
    """MoCo v1 and instance discrimination (main_moco.py, lemniscate's main.py): gray, then jitter. They do not commute:
    gray of a shifted hue has another brightness, a shifted hue of gray is the same gray."""
    image = photos(1)[0] / np.float32(255)
    parameters = {"hue": 0.3, "brightness": 0.7, "order": jnp.array([1, 0]), "gray": True}
    first, last = (render(image, parameters, View(size=16, gray_first=value)) for value in (True, False))
    gray = ops.to_grayscale(image)
    np.testing.assert_allclose(first, ops.adjust_brightness(ops.adjust_hue(gray, 0.3), 0.7), atol=1e-6)
    jittered = ops.adjust_brightness(ops.adjust_hue(image, 0.3), 0.7)
    np.testing.assert_allclose(last, ops.to_grayscale(jittered), atol=1e-6)
    assert np.abs(np.asarray(first) - np.asarray(last)).max() > 0.02


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_colour_leaves_other_channels_alone(channels):
    image = np.float32(photos(1, channels=channels)[0] / 255)

    @jax.jit
    def recoloured(image):
        parameters = {"saturation": 0.0, "hue": 0.3, "order": jnp.array([1, 0]), "gray": True}
        single = ops.adjust_saturation(image, 0.1), ops.adjust_hue(image, 0.3), ops.to_grayscale(image)
        return (*single, render(image, parameters, View(size=16))), ops.adjust_contrast(image, 0.5)

    same, other = recoloured(image)
    for made in same:
        np.testing.assert_array_equal(made, image)
    assert np.abs(other - image).max() > 0.1


def test_warps_are_fused_into_one():
    image = np.float32(photos(1)[0] / 255)
    shift, whole = np.float32([3, -2]), np.float32([[0, 0], [15, 0], [15, 15], [0, 15]])
    warp, turned = jax.jit(functools.partial(render, view=View(size=16))), jax.jit(ops.rotate)(image, 30.0)
    np.testing.assert_allclose(warp(image, {"angle": 30.0}), turned, atol=1e-6)
    both = warp(image, {"angle": 30.0, "corners": whole})  # corners that stay change nothing
    np.testing.assert_allclose(both, turned, atol=2e-5)
    moved = warp(image, {"angle": 180.0, "shift": shift})  # whole pixels: no interpolation
    expected = np.zeros_like(image)
    expected[:-2, 3:] = image[::-1, ::-1][2:, :-3]
    np.testing.assert_allclose(moved, expected, atol=2e-5)


def test_parameters_can_be_shared_between_views():
    image, view = photos(1)[0], View(size=8, crop_scale=(0.2, 0.5), jitter_prob=1.0, brightness=0.5)

    @jax.jit
    def made():
        one, two = (draw(jax.random.key(k), view, 16, 16) for k in (1, 2))
        shared = render(image, {**two, **{k: one[k] for k in ("top", "left", "height", "width")}}, view)
        crop = ops.resized_crop(image / np.float32(255), one["top"], one["left"], one["height"], one["width"], 8)
        return shared, ops.adjust_brightness(crop, two["brightness"]), render(image, two, view)

    shared, expected, own = made()
    np.testing.assert_allclose(shared, expected, atol=1e-6)
    assert np.abs(shared - own).max() > 0.1


def test_center_view():
    images = photos(3, 16, 16)
    view = jax.jit(center_view, static_argnums=1)
    np.testing.assert_allclose(view(images, 16), images / np.float32(255), atol=1e-7)
    halved = images.reshape(3, 8, 2, 8, 2, 3).mean((2, 4)) / 255
    small = view(images, 8)
    assert small.shape == (3, 8, 8, 3) and small.dtype == jnp.float32
    triangle = np.array([1, 3, 3, 1]) / 8  # antialiased halving, away from the border
    inner = images[:, 1:5, 1:5] / 255
    np.testing.assert_allclose(small[:, 1, 1], np.einsum("bhwc,h,w->bc", inner, triangle, triangle), atol=1e-6)
    assert np.abs(small - halved).max() < 0.4


def test_asymmetric_preset():
    first, second = (many_draws(view) for view in resolve_views(Augment("natural"), 2, 32))
    assert (first["sigma"] > 0).all() and (second["sigma"] > 0).mean() == pytest.approx(0.1, abs=0.03)
    assert "solarize" not in first and second["solarize"].mean() == pytest.approx(0.2, abs=0.03)


def test_the_usual_views_follow_the_size_of_the_images():
    for size, name in ((28, "small"), (64, "small"), (65, "natural"), (224, "natural")):
        assert resolve_views(Augment(), 2, size) == resolve_views(Augment(name), 2, size)
    changed = Augment(override={"hue": 0.0, "size": 96})
    assert resolve_views(changed, 1, 32)[0] == replace(PRESETS["small"][0], hue=0.0, size=96)


def test_resolve_fills_sizes_and_overrides():
    augment = Augment("natural", {"blur": 0.5, "hue": 0.0}, {"blur": 0.1, "size": 48})
    one, two, three = resolve_views(augment, 3, 64)
    assert (one.blur, two.blur, three.blur) == (0.5, 0.1, 0.5)
    assert (one.size, two.size, three.size) == (64, 48, 64)
    assert (one.hue, two.hue, one.solarize, two.solarize) == (0.0, 0.0, 0.0, 0.2)
    assert resolve_views(Augment("none"), 1, 28) == (View(size=28),)


@pytest.mark.parametrize(
    "augment, message",
    [
        (
            Augment("naturall"),
            "config.augment.preset='naturall': unknown; did you mean 'natural'? available: auto, chest_xray",
        ),
        (Augment("none", {"blurr": 1}), "config.augment='blurr': unknown; did you mean 'blur'?"),
        (Augment("none", {"flip": 1.5}), "config.augment.flip=1.5: allowed: 0 to 1"),
        (Augment("none", {}, {"hue": 0.6}), "config.augment.second.hue=0.6: allowed: 0 to 0.5"),
        (Augment("none", {"crop_scale": (0.0, 1.0)}), "config.augment.crop_scale=(0.0, 1.0): allowed: two numbers"),
        (Augment("none", {"crop_scale": (0.5, 2.0)}), "0 < smallest <= largest <= 1"),
        (Augment("none", {"blur_sigma": (2.0, 1.0)}), "config.augment.blur_sigma=(2.0, 1.0): allowed: two numbers"),
        (Augment("none", {"rotate": -3.0}), "config.augment.rotate=-3.0: allowed: 0 to 180"),
        (Augment("none", {"brightness": -0.1}), "config.augment.brightness=-0.1: allowed: 0 or more"),
    ],
)
def test_mistakes_are_one_line(augment, message):
    with pytest.raises(UserError) as error:
        resolve_views(augment, 2, 32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_views_without_a_size_are_refused():
    with pytest.raises(UserError, match="view.size=0: allowed: 1 or more"):
        make_views([View()])


@pytest.mark.parametrize("warps", [{}, {"rotate": 20.0}, {"perspective": 0.3, "perspective_prob": 1.0}, "all"])
def test_positions_are_where_the_pixels_come_from(warps):
    """Pixels hold their own column and row; what a place shows is the x and y of its position."""
    if warps == "all":
        warps = {"rotate": 10.0, "shear": 8.0, "zoom": (0.9, 1.2), "translate": 0.1, "perspective": 0.2}
    size, held = 32, np.arange(32) * 7
    image = np.stack([*np.broadcast_arrays(held, held[:, None]), np.full((size, size), 255)], -1).astype(np.uint8)[None]
    views = (View(size=size, crop_scale=(0.3, 1.0), flip=0.5, **warps),) * 2

    @jax.jit
    def draw(seed):
        made, drawn = make_views(views)(jax.random.key(seed), image)
        return [(shown[0], origins(box, 4, 4)[0]) for shown, box in zip(made, drawn)]

    compared = 0
    for seed in range(6):
        for shown, where in jax.device_get(draw(seed)):
            pixels = shown.reshape(4, 8, 4, 8, 3)
            x, y = np.moveaxis(pixels.mean((1, 3))[..., :2] * 255 / 7 + 0.5, -1, 0)
            inside = pixels[..., 2].min((1, 3)) > 0.999  # nothing black from outside the image
            # Not at the image's border, where there is less to interpolate from.
            at = where.reshape(4, 4, 2)
            inside &= (at > 3).all(-1) & (at < size - 3).all(-1)
            np.testing.assert_allclose(np.stack([x, y], -1)[inside], at[inside], atol=0.2)
            compared += inside.sum()
    assert compared > 60
