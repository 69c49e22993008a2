"""RandAugment within a level of 255 of timm's, erasing, and what both tell of the geometry of a view."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.audit.lesions import kept_area
from ssl_jax.augment import PRESETS, appearance, draw, geometry, make_views, randaugment, render
from ssl_jax.augment.sheet import describe_view
from ssl_jax.config import View
from ssl_jax.errors import UserError
from ssl_jax.testing.tiny import Images, set_up, tiny_config

REFERENCE = np.load(Path(__file__).parent / "reference" / "randaugment.npz")  # benchmarks/randaugment_reference.py
rendered, augmented = jax.jit(render, static_argnums=2), jax.jit(randaugment.randaugment)
BOTH = View(size=24, randaugment=2, erase=0.5)
MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@jax.jit
def applied(image, number, level, sign):
    operation = jnp.array([number])
    amount = randaugment.amount_of(operation, level[None], sign[None])
    moved = randaugment.matrices(operation, amount, image.shape[0])
    return 255 * randaugment.randaugment(image, {"operation": operation, "amount": amount, "moved": moved})


@pytest.mark.parametrize("kind", ["colour", "gray", "constant"])
def test_operations_equal_those_of_timm(kind):
    seen = defaultdict(list)
    for key in REFERENCE:
        if key.startswith(f"{kind}-"):
            _, name, level, sign = key.split("-", 3)
            given = np.float32(REFERENCE[f"{kind}.image"]) / 255
            made = applied(given, randaugment.OPERATIONS.index(name), np.float32(level), np.float32(sign))
            away = np.abs(np.asarray(made) - REFERENCE[key])
            assert away.max() < 1.01 and (away > 0.5).mean() < 0.01, key
            seen[name].append(np.abs(REFERENCE[key] - 255 * given).max() > 1)
    assert set(seen) == set(randaugment.OPERATIONS)
    still = {name for name, changes in seen.items() if not any(changes)}
    expected = {"colour": set(), "gray": {"color"}}.get(kind)
    assert still == expected or kind == "constant" and still >= {"auto_contrast", "equalize", "color", "contrast"}


def test_several_operations_are_one_after_the_other():
    image = np.float32(REFERENCE["colour.image"]) / 255
    numbers = jnp.array([randaugment.OPERATIONS.index(name) for name in ("rotate", "equalize")])
    amounts = jnp.array([20.0, 0.0])
    drawn = {"operation": numbers, "amount": amounts, "moved": randaugment.matrices(numbers, amounts, 20)}
    steps = [{name: value[i : i + 1] for name, value in drawn.items()} for i in range(2)]
    first = augmented(augmented(image, steps[0]), steps[1])
    together = augmented(image, drawn)
    np.testing.assert_allclose(together, first, atol=1e-6)
    back = augmented(augmented(image, steps[1]), steps[0])
    assert np.abs(np.asarray(together - back)).max() > 0.05


def test_what_is_drawn():
    keys = jax.random.split(jax.random.key(0), 6000)
    made = jax.device_get(jax.jit(jax.vmap(lambda key: draw(key, BOTH, 24, 24)))(keys))
    assert set(made) == {"operation", "amount", "moved", "erased", "noise"}
    counts = np.bincount(made["operation"].ravel() + 1, minlength=16) / 12000
    assert counts[0] == pytest.approx(0.5, abs=0.02)  # each with probability 0.5
    np.testing.assert_allclose(counts[1:], 0.5 / 15, atol=0.008)  # four deviations
    angles = made["amount"][made["operation"] == randaugment.OPERATIONS.index("rotate")]
    assert np.abs(angles).mean() == pytest.approx(27, abs=0.5) and np.abs(angles).max() <= 30  # 0.9 x 30
    assert (angles > 0).mean() == pytest.approx(0.5, abs=0.1)
    moves = np.isin(made["operation"], [randaugment.OPERATIONS.index(name) for name in MOVING])
    still = (made["moved"] == np.array([[1, 0, 0], [0, 1, 0]])).all((-1, -2))
    assert (moves == ~still).all()
    top, left, height, width = made["erased"].T
    used = height > 0
    assert used.mean() == pytest.approx(0.5, abs=0.03) and (used == (width > 0)).all()
    area = (height * width / 24**2)[used]
    assert area.min() > 0.015 and area.max() < 0.36 and area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    assert (top >= 0).all() and (top + height <= 24).all() and (left + width <= 24).all()
    assert top[used].min() == 0 and (left + width)[used].max() == 24


def test_it_changes_no_other_draw_and_repeats():
    images = np.random.default_rng(0).integers(0, 256, (8, 30, 30, 3), dtype=np.uint8)
    plain = View(size=24, crop_scale=(0.3, 1.0), flip=0.5)
    specs = [plain, replace(plain, randaugment=2, erase=0.5)]
    made = [jax.jit(make_views([view]))(jax.random.key(1), images) for view in specs]
    for name, value in made[0][1][0].items():
        np.testing.assert_array_equal(value, made[1][1][0][name])
    views, drawn = made[1][0][0], made[1][1][0]
    assert views.min() >= 0 and views.max() <= 1 and views.dtype == jnp.float32
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    split = jax.device_put(images, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    again, _ = jax.jit(make_views(specs[1:]))(jax.random.key(1), split)
    np.testing.assert_allclose(views, again[0], atol=1.01 / 255)  # a sum that is rounded otherwise
    assert (np.asarray(views) != again[0]).mean() < 0.01
    nothing = (drawn["operation"] < 0).all(1) & (drawn["erased"][:, 2] == 0)
    away = np.abs(np.asarray(views - made[0][0][0])).max((1, 2, 3))
    assert (away[~nothing] > 0.01).all() and (away[nothing] <= 0.51 / 255).all()  # in 255ths


def test_a_mask_moves_with_its_image():
    """Black squares on white: where the mask goes, there the image is dark; what is erased, the mask has lost."""
    view = View(size=32, randaugment=3, randaugment_std=0.0, erase=0.5)
    rotate, shift = (randaugment.OPERATIONS.index(name) for name in ("rotate", "translate_x"))
    operation = jnp.array([rotate, randaugment.OPERATIONS.index("brightness"), shift])
    amount = jnp.array([25.0, 0.8, 0.2])
    drawn = {"operation": operation, "amount": amount, "moved": randaugment.matrices(operation, amount, 32)}
    drawn |= {"erased": jnp.array([0.0, 0.0, 8.0, 32.0]), "noise": jnp.uint32(3)}
    mask = np.zeros((32, 32, 1), np.float32)
    mask[4:20, 10:24] = 1
    image = np.repeat(1 - mask, 3, axis=2)
    shown, moved = np.asarray(rendered(image, drawn, view)), np.asarray(rendered(mask, geometry(drawn), view))[..., 0]
    assert set(geometry(drawn)) == {"moved", "erased"} and set(appearance(drawn)) == {"operation", "amount", "noise"}
    assert moved[8:].max() > 0.9 and not moved[:8].any()
    assert (shown[moved > 0.95] < 0.1).all() and (shown[8:][moved[8:] < 0.05] > 0.2).all()
    still = np.asarray(rendered(image, appearance(drawn), view))
    assert still[mask[..., 0] > 0].max() < 0.1 < still[mask[..., 0] == 0].min()
    assert 0.1 < shown[:8].std() < 0.4  # noise


def test_the_audit_knows_what_a_view_has_lost():
    masks = np.zeros((3, 32, 32), np.float32)
    masks[0, 10:20, 1:6] = masks[1, 10:20, 14:20] = masks[2, 24:30, 14:20] = 1  # at the left, in the middle, below it
    operation, amount = jnp.array([randaugment.OPERATIONS.index("translate_x")]), jnp.array([0.25])
    moved = randaugment.matrices(operation, amount, 32)
    drawn = {"moved": moved[None], "erased": jnp.array([[22.0, 0.0, 10.0, 32.0]])}
    np.testing.assert_allclose(kept_area(masks, drawn, View(size=32))[:, 0], [0, 1, 0], atol=0.02)


def test_the_sheet_of_views_says_it():
    view = View(size=28, randaugment=2, erase=0.25)
    assert describe_view(view) == "28 px, RandAugment 2 (magnitude 9 ± 0.5), erase 0.25"


def test_erased_pixels_are_noise_of_the_images_distribution():
    drawn = {"erased": jnp.array([2.0, 3.0, 200.0, 190.0]), "noise": jnp.uint32(5)}
    image = np.ones((224, 224, 3), np.float32)
    made = np.array(randaugment.erase(image, drawn))
    box = made[2:202, 3:193]
    np.testing.assert_allclose(box.mean((0, 1)), randaugment.MEAN, atol=0.01)
    np.testing.assert_allclose(box.std((0, 1)), randaugment.STD, atol=0.01)
    made[2:202, 3:193] = 1
    np.testing.assert_array_equal(made, image)
    assert rendered(image[..., :1], {**drawn, "erased": jnp.zeros(4)}, View(size=224)).min() == 1


@pytest.mark.parametrize("name", ["vicregl", "transformation_prediction", "looc"])
def test_methods_that_read_the_geometry_refuse_it(name):
    config = tiny_config(name, augment__randaugment=2, augment__second={"randaugment": 0})
    setup = set_up(config, Images(n=24, size=8, channels=3))
    batch = {"views": [jnp.zeros((4, 8, 8, 3))] * 2}
    batch["drawn"] = [draw(jax.random.key(0), view, 8, 8) for view in setup.views]
    with pytest.raises(UserError, match=rf"^config.augment.randaugment: .* {name} does not read; allowed: 0"):
        setup.method.forward(None, None, None, batch, None)


def test_values_out_of_range():
    for key, value in (("randaugment", -1), ("randaugment_magnitude", 11.0), ("erase", 1.5)):
        with pytest.raises(UserError, match=f"view.{key}={value}"):
            make_views([View(size=8, **{key: value})])
    assert PRESETS["finetune"][0].randaugment == 2
