"""Pretext tasks: the answer is right, and nothing but the content of the image gives it away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import PRESETS, make_views, ops, render, resolve_views
from ssl_jax.config import Augment, Model, View, method_module
from ssl_jax.errors import UserError
from ssl_jax.methods import context_encoder, jigsaw, mae, rotation, simmim, transformation_prediction
from ssl_jax.models import build_encoder, decoder
from ssl_jax.network import Network
from ssl_jax.testing.tiny import tiny_config, tiny_encoder

RNG = jax.random.key(3)


def noise(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).uniform(size=shape))


def vit(channels=1, depth=2):
    model = Model(name="vit_tiny", width=1 / 16, depth=depth, patch=2)
    return build_encoder(model, channels, 8)


def spied(encoder):
    """(the encoder, a list of the images and keyword arguments that it is applied to): see `forward_of`"""
    seen = []

    def apply(params, stats, x, **kwargs):
        seen.append((x, kwargs))
        return encoder.apply(params, stats, x, **kwargs)

    return Network(encoder.init, apply, encoder.patch), seen


def keys(images):
    return jax.random.split(RNG, len(images))


def forward_of(method, seen=()):
    """A jitted function (views, drawn) -> (what forward gives with new parameters, the last of `seen`)."""

    @jax.jit
    def run(views, drawn=()):
        params, state = method.init(jax.random.key(0), views)
        outputs, _ = method.forward(params, None, state, {"views": views, "drawn": drawn}, keys(views[0]))
        return outputs, seen[-1] if seen else None

    return run


# Rotation


def test_rotations_are_exact_quarter_turns():
    """No pixel is interpolated: a blurred or black border would tell the turn."""
    images = noise(3, 7, 7, 2)
    turned = jax.jit(rotation.quarter_turns)(images)
    for k in range(4):
        np.testing.assert_array_equal(turned[k::4], np.rot90(images, k, axes=(1, 2)))


# Jigsaw puzzles


@functools.partial(jax.jit, static_argnums=(1, 2))
def tiles_of(images, tile, channel_shift):
    return jigsaw.tiles_of(keys(images), images, tile=tile, channel_shift=channel_shift)


def solve(orders, cost):
    """The number of the order whose undoing costs least; cost(at): of the tile at[p] at each place p."""
    return int(np.argmin([cost(np.argsort(order)) for order in orders]))


def by_borders(tiles):
    """cost(at): how much the pixels on both sides of each border differ."""
    right = np.abs(tiles[:, None, :, -1] - tiles[None, :, :, 0]).mean((2, 3))
    below = np.abs(tiles[:, None, -1] - tiles[None, :, 0]).mean((2, 3))

    def cost(at):
        grid = at.reshape(3, 3)
        return right[grid[:, :-1], grid[:, 1:]].sum() + below[grid[:-1], grid[1:]].sum()

    return cost


def by_brightness(tiles):
    """cost(at): how badly the tiles' means fit to an image that gets brighter from each tile to the next."""
    means = tiles.mean((1, 2, 3), dtype=np.float64)
    return lambda at: -float(means[at] @ np.arange(9))


def slopes(count, side, seed=0):
    """Smooth noise on a slope of brightness: borders that fit, and a mean that tells a tile's place."""
    rough = np.random.default_rng(seed).uniform(size=(count, side + 2, side + 2))
    smooth = sum(rough[:, i : i + side, j : j + side] for i in range(3) for j in range(3)) / 9
    rows, columns = np.indices((side, side)) / side
    return (0.5 * smooth + 0.1 * (3 * rows + columns))[..., None].astype(np.float32)


@pytest.mark.parametrize("solver", [by_borders, by_brightness])
def test_tiles_do_not_give_their_order_away(solver):
    count, side, orders = 150, 96, jigsaw.permutation_set(20)
    images, answers = slopes(count, side), np.random.default_rng(1).integers(0, 20, count)
    raw = images.reshape(count, 3, 32, 3, 32, 1).swapaxes(2, 3).reshape(count, 9, 32, 32, 1)
    made = np.asarray(tiles_of(images, 0.75, 2))

    def solved(tiles):
        found = [solve(orders, solver(t[orders[answer]])) for t, answer in zip(tiles, answers)]
        return np.mean(found == answers)

    assert solved(raw) > 0.95
    assert solved(made) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / count)  # chance is 1 of 20


@pytest.mark.parametrize(("count", "least"), [(2, 9), (100, 6), (300, 5)])
def test_permutations_are_far_apart(count, least):
    made = jigsaw.permutation_set(count)
    assert made.shape == (count, 9)
    assert np.all(np.sort(made, axis=1) == np.arange(9))
    distance = (made[:, None] != made[None]).sum(axis=2) + 9 * np.eye(count, dtype=int)
    assert distance.min() >= least
    np.testing.assert_array_equal(made, jigsaw.permutation_set(count))
    assert not np.array_equal(made, jigsaw.permutation_set(count, seed=1))


@pytest.mark.parametrize(("side", "tile"), [(12, 0.75), (31, 0.75), (48, 0.5), (48, 1.0)])
def test_tiles_have_gaps_and_are_normalized(side, tile):
    images = noise(2, side, side, 3)
    made = np.asarray(tiles_of(images, tile, 2))
    np.testing.assert_allclose(made.mean((2, 3)), 0.5, atol=1e-5)
    np.testing.assert_allclose(made.std((2, 3)), 0.25, atol=1e-5)
    cell, t = side // 3, made.shape[2]
    start, slack = (side - 3 * cell) // 2, cell - 1 - t
    assert slack >= 0
    for b, k in np.ndindex(2, 9):
        row, column = start + cell * (k // 3), start + cell * (k % 3)
        corners = []
        for channel in range(3):
            found = []
            for dy, dx in np.ndindex(slack + 1, slack + 1):  # the last row and column of the cell belong to no tile
                cut = images[b, row + dy : row + dy + t, column + dx : column + dx + t, channel]
                if np.allclose((cut - cut.mean()) / cut.std(), (made[b, k, :, :, channel] - 0.5) / 0.25, atol=1e-3):
                    found.append((dy, dx))
            assert len(found) == 1
            corners += found
        assert np.ptp(corners, axis=0).max() <= 2


def test_channels_of_colour_images_are_shifted_against_each_other():
    same = np.repeat(noise(4, 48, 48, 1), 3, axis=-1)
    apart, together = (np.asarray(tiles_of(same, 0.5, channel_shift)) for channel_shift in (2, 0))
    assert not np.allclose(apart[..., 0], apart[..., 1], atol=0.1)
    np.testing.assert_allclose(together[..., 0], together[..., 1], atol=1e-5)


def test_tiles_reach_the_encoder_in_the_order_that_is_asked_for():
    encoder, seen = spied(tiny_encoder())
    method = jigsaw.make(jigsaw.Config(permutations=6, hidden=8), encoder, None)
    images = noise(5, 24, 24, 1)
    outputs, (shown, _) = forward_of(method, seen)([images])

    @jax.jit
    def cut():
        key = jax.vmap(jax.random.split)(keys(images))[:, 0]
        return jigsaw.tiles_of(key, images, tile=0.75, channel_shift=2)

    tiles, orders = np.asarray(cut()), jigsaw.permutation_set(6)
    wanted = [tile[orders[answer]] for tile, answer in zip(tiles, np.asarray(outputs["answer"]))]
    np.testing.assert_array_equal(np.reshape(shown, tiles.shape), wanted)


def test_a_small_image_makes_no_puzzle():
    method = jigsaw.make(jigsaw.Config(permutations=6), tiny_encoder(), None)
    with pytest.raises(UserError, match=r"config.augment.size=11: .* allowed: 12 px or more"):
        jax.eval_shape(method.init, RNG, [noise(2, 11, 11, 1)])


# Transformation prediction

GEOMETRY = ("angle", "shear", "zoom", "shift", "corners")


def warped(seed, side=48, **switched_on):
    """(two views of smooth images, what they were drawn with)"""
    method = transformation_prediction.make(transformation_prediction.Config(hidden=8), tiny_encoder(), None)
    rows, columns = np.indices((side, side)) / side
    waves = [np.sin(3 * rows + 5 * columns + i) * np.cos(4 * columns - i) for i in range(8)]
    images = np.float32(np.stack(waves)[..., None] * 0.4 + 0.5)
    views = View(size=side, flip=0.5), View(size=side, flip=0.5, **switched_on)
    return jax.device_get(jax.jit(make_views(views, method.shares))(jax.random.key(seed), images))


@pytest.mark.parametrize("channels", [1, 3])
def test_targets_are_the_drawn_parameters(channels):
    first, second = resolve_views(Augment(preset="transformation"), 2, 16)
    images = (255 * noise(6, 16, 20, channels)).astype(np.uint8)

    @jax.jit
    def draw():
        _, (_, drawn) = make_views((first, second), ((), ("crop", "flip")))(RNG, images)
        return drawn, transformation_prediction.targets_of(drawn, channels)

    drawn, targets = jax.device_get(draw())
    assert set(targets) == set(transformation_prediction.PARTS) - (set() if channels == 3 else {"saturation", "hue"})
    most = {name: np.abs(value).max() for name, value in targets.items()}
    assert all(0.3 < value <= 1 for value in most.values()), most
    assert len(set(drawn["flip"])) == 2
    for i, flip in enumerate(drawn["flip"]):
        one, d = ({name: value[i] for name, value in made.items()} for made in (targets, drawn))
        sign = -1 if flip else 1
        angle = np.deg2rad(sign * d["angle"])
        np.testing.assert_allclose(one["angle"], [np.sin(angle), np.cos(angle)], atol=1e-6)
        np.testing.assert_allclose(one["shear"], [sign * d["shear"] / 30], rtol=1e-5)
        np.testing.assert_allclose(one["zoom"], [(d["zoom"] - 1) / 0.3], rtol=1e-4)
        np.testing.assert_allclose(one["shift"], [sign * d["shift"][0] / 20 / 0.2, d["shift"][1] / 16 / 0.2], rtol=1e-5)
        for name in ("brightness", "contrast") + (("saturation",) if channels == 3 else ()):
            np.testing.assert_allclose(one[name], [(d[name] - 1) / 0.4], rtol=1e-4, atol=1e-6)
        if channels == 3:
            np.testing.assert_allclose(one["hue"], [d["hue"] / 0.1], rtol=1e-5)


@pytest.mark.parametrize(
    ("switched_on", "border", "tolerance"),
    [
        ({"rotate": 180.0, "shear": 30.0, "zoom": (0.7, 1.3), "translate": 0.2}, 0, 1e-3),
        # torchvision's corners lie half a pixel beside those of the image, which a mirror image makes a whole one.
        ({"perspective": 0.25, "perspective_prob": 1.0}, 8, 0.03),
    ],
)
def test_targets_turn_the_first_view_into_the_second(switched_on, border, tolerance):
    """Flipped pairs too: what is predicted is the warp that the network sees, the mirror image of the drawn one."""
    (first, second), (_, drawn) = warped(seed=0, **switched_on)
    inside = slice(border, 48 - border)
    targets = jax.device_get(jax.jit(transformation_prediction.targets_of, static_argnums=1)(drawn, 1))
    warp = jax.jit(functools.partial(render, view=View(size=48)))
    corners = np.array([[0, 0], [47, 0], [47, 47], [0, 47]])
    for i in range(len(first)):
        one = {name: value[i] * transformation_prediction.PARTS[name][1] for name, value in targets.items()}
        again = {}
        if "angle" in one:
            again = {"angle": np.rad2deg(np.arctan2(*one["angle"])), "shear": one["shear"][0]}
            again |= {"zoom": 1 + one["zoom"][0], "shift": 48 * one["shift"]}
        if "corners" in one:
            again["corners"] = corners + 48 * one["corners"].reshape(4, 2)
        made = np.asarray(warp(first[i], again))
        np.testing.assert_allclose(made[inside, inside], second[i][inside, inside], atol=tolerance)
    assert len(set(drawn["flip"])) == 2


def test_the_inverse_of_the_warp_takes_the_second_view_back():
    (first, second), (_, drawn) = warped(seed=1, rotate=30.0, translate=0.1)

    @jax.jit
    def back():
        targets = transformation_prediction.targets_of(drawn, 1)

        def one(image, angle, shift):
            angle, (dx, dy) = jnp.rad2deg(jnp.arctan2(*angle)), 48 * 0.2 * shift
            turn = ops.compose(ops.translation_matrix(-dx, -dy), ops.rotation_matrix(48, 48, -angle))
            return ops.warp(image, turn)

        return jax.vmap(one)(second, targets["angle"], targets["shift"])

    centre = slice(18, 30)  # within the second view whatever the warp
    np.testing.assert_allclose(back()[:, centre, centre], first[:, centre, centre], atol=0.01)


def test_views_without_a_warp_leave_nothing_to_predict():
    views, drawn = warped(seed=0)
    method = transformation_prediction.make(transformation_prediction.Config(hidden=8), tiny_encoder(), None)
    with pytest.raises(UserError, match=r"config.augment: .*nothing to predict; allowed: preset=transformation"):
        jax.eval_shape(forward_of(method), views, drawn)


def test_both_views_of_the_preset_show_the_same_place():
    for view in PRESETS["transformation"]:
        assert view.crop_scale == (1.0, 1.0) and view.flip == 0.5


# Masked patches


def changed(images, mask, patch=2, to=0.0):
    """The images with the masked patches coloured."""
    side = images.shape[1] // patch
    pixels = mask.reshape(-1, side, side).repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
    return np.where(pixels, np.float32(to), images)


MASKED = {"mae": mae.Config(width=16, depth=1), "simmim": simmim.Config()}


@pytest.mark.parametrize("name", MASKED)
def test_nothing_of_a_masked_patch_reaches_the_network(name):
    method = method_module(name).make(MASKED[name], vit(), None)
    images = noise(3, 8, 8, 1)
    forward = forward_of(method)
    before = jax.device_get(forward([images])[0])
    mask = before["mask"]
    hidden, shown = (jax.device_get(forward([changed(images, places)])[0]) for places in (mask, ~mask))
    for key in ("embedding", "prediction", "mask"):
        np.testing.assert_array_equal(hidden[key], before[key])
    assert np.all((hidden["pixels"] != before["pixels"]).any(axis=-1) == mask)
    assert np.abs(shown["embedding"] - before["embedding"]).max() > 1e-3


@pytest.mark.parametrize("name", MASKED)
def test_the_loss_counts_masked_patches_alone(name):
    method = method_module(name).make(MASKED[name], vit(), None)
    rng = np.random.default_rng(0)
    prediction, pixels = rng.normal(size=(2, 3, 16, 4)).astype(np.float32)
    mask = rng.random((3, 16)) < 0.7

    @jax.jit
    @jax.value_and_grad
    def loss(prediction):
        return method.loss({"prediction": prediction, "pixels": pixels, "mask": mask}, None, {}, None)[0]

    value, gradient = loss(prediction)
    assert np.all((np.asarray(gradient) != 0).any(axis=-1) == mask)
    power = 2 if name == "mae" else 1
    np.testing.assert_allclose(value, (np.abs(prediction - pixels) ** power)[mask].mean(), rtol=1e-5)


@pytest.mark.parametrize(("share", "kept"), [(0.75, 4), (0.5, 8), (0.99, 1), (0.05, 15)])
def test_visible_and_masked_patches_are_all_patches(share, kept):
    encoder, seen = spied(vit(depth=1))
    forward = forward_of(mae.make(mae.Config(mask=share, width=16, depth=1), encoder, None), seen)

    @jax.jit
    def patches():
        outputs, (_, given) = forward([noise(6, 8, 8, 1)])
        return given["visible"], outputs["mask"]

    visible, masks = jax.device_get(patches())
    assert visible.shape == (6, kept)
    for own, mask in zip(visible, masks):
        assert sorted([*own, *np.flatnonzero(mask)]) == list(range(16))
    assert len({tuple(sorted(own)) for own in visible}) > 1


def test_the_decoder_puts_tokens_back_at_their_places():
    """Any order of the visible patches and their tokens gives the same pixels; all of them in order need no order."""
    made = decoder(16, 1, 4, 5)
    tokens = noise(2, 17, 8) - 0.5
    params, _ = made.init(RNG, tokens)

    @jax.jit
    def decode(tokens, order=None):
        return made.apply(params, {}, tokens, train=True, order=order)[0]

    in_order = np.tile(np.arange(16), (2, 1))
    np.testing.assert_array_equal(decode(tokens, in_order), decode(tokens))
    order = np.array([[7, 2, 11, *(i for i in range(16) if i not in (7, 2, 11))]] * 2)
    back = order[:, [2, 0, 1, *reversed(range(3, 16))]]
    few = tokens[:, :4]
    pixels, again = decode(few, order), decode(few[:, [0, 3, 1, 2]], back)
    np.testing.assert_allclose(again, pixels, atol=1e-6)
    # The token of a patch matters most for its own pixels; those of missing ones differ by their positions alone.
    moved = decode(few + np.float32(np.arange(4) == 2)[:, None], order)
    assert np.all(np.argmax(np.abs(np.asarray(moved) - pixels).sum(axis=2), axis=1) == 2)


def test_pixels_of_mae_are_normalized_for_each_patch():
    """Of the images as the encoder gets them, each channel with its mean and deviation (models_mae.py, patchify)."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    images = 0.3 + 0.1 * noise(2, 8, 8, 3)
    images[1, 2:4, 4:6] = mean + std * (0.5 + 0.001 * noise(2, 2, 3))  # almost flat: here the 1e-6 matters

    def pixels_of(**changes):
        forward = forward_of(mae.make(mae.Config(width=16, depth=1, **changes), vit(3, depth=1), None))
        return jax.jit(lambda images: forward([images])[0]["pixels"])

    normalized, plain = pixels_of(), pixels_of(normalize=False)
    patch = ((images - mean) / std)[1, 2:4, 4:6].ravel()  # of the second row, the third one: number 6 of 4 in a row
    want = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
    assert np.abs(want).max() < 0.9 * np.abs(patch - patch.mean()).max() / patch.std(ddof=1)
    np.testing.assert_allclose(normalized(images)[1, 6], want, atol=1e-3)
    np.testing.assert_allclose(normalized(np.broadcast_to(mean + std, images.shape)), 0, atol=1e-3)
    np.testing.assert_allclose(plain(images)[1, 6], patch, rtol=1e-5)


def test_pixels_of_simmim_are_those_that_the_encoder_gets():
    """data_simmim.py normalizes the images, and models/simmim.py predicts these."""
    images, encoder = noise(2, 8, 8, 3), vit(3, depth=1)
    outputs, _ = forward_of(simmim.make(simmim.Config(), encoder, None))([images])
    want = (images - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    np.testing.assert_allclose(outputs["pixels"][1, 6], want[1, 2:4, 4:6].ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "block", "share"), [(8, 2, 0.6), (12, 4, 0.5), (6, 1, 0.1), (7, 2, 0.6), (4, 2, 1.0)])
def test_simmim_masks_whole_blocks(side, block, share):
    draw = jax.jit(lambda: simmim.random_mask(keys(range(20)), side, mask=share, block=block))
    mask = np.asarray(draw()).reshape(20, side, side)
    across = -(-side // block)
    whole = np.stack([mask[:, r * block : (r + 1) * block] for r in range(side // block)]).swapaxes(0, 1)
    assert np.all(whole == whole[:, :, :1])  # all rows of a block are alike
    chosen = mask[:, ::block, ::block]
    np.testing.assert_array_equal(chosen.repeat(block, axis=1).repeat(block, axis=2)[:, :side, :side], mask)
    assert np.all(chosen.sum(axis=(1, 2)) == np.ceil(share * across**2))
    if share < 1:
        assert len({m.tobytes() for m in mask}) > 10
        assert np.all(chosen.mean(axis=0) < 1)


@pytest.mark.parametrize("name", MASKED)
def test_other_networks_have_no_patches(name):
    with pytest.raises(UserError, match=rf"config.model.name: {name} masks patches; allowed: vit_tiny"):
        method_module(name).make(MASKED[name], tiny_encoder(), None)


# Context encoder


@pytest.mark.parametrize("region", ["central", "random"])
@pytest.mark.parametrize("side", [8, 9])
def test_the_blanked_region_does_not_reach_the_encoder(region, side):
    encoder, seen = spied(tiny_encoder())
    method = context_encoder.make(context_encoder.Config(region=region, hidden=8), encoder, None)
    images = noise(30, side, side, 2)
    forward, half = forward_of(method, seen), side // 2
    before, (around, _) = jax.device_get(forward([images]))
    blank = np.all(around != images, axis=-1)
    assert np.all(blank.sum(axis=(1, 2)) == half * half)
    assert np.all(around[blank] == context_encoder.BLANK)
    corners = {tuple(np.argwhere(b)[0]) for b in blank}
    for b, (image, pixels) in enumerate(zip(images, before["pixels"])):
        row, column = np.argwhere(blank[b])[0]
        assert np.all(blank[b, row : row + half, column : column + half])
        hidden = image[row : row + half, column : column + half]
        np.testing.assert_allclose(pixels, 2 * hidden.ravel() - 1, atol=1e-6)
    assert corners == {(side // 4, side // 4)} if region == "central" else len(corners) > 10
    after, _ = jax.device_get(forward([np.where(blank[..., None], np.float32(0.9), images)]))
    for key in ("embedding", "prediction"):
        np.testing.assert_array_equal(after[key], before[key])
    assert np.all(after["pixels"] != before["pixels"])


def test_an_unknown_region_is_named():
    with pytest.raises(UserError, match="config.method.region='center': unknown; did you mean 'central'"):
        tiny_config("context_encoder", method__region="center")
