"""RandAugment and random erasing, with which MAE and DeiT fine-tune: timm's `rand-m9-mstd0.5-inc1` and `pixel` mode.

    RandAugment     N operations one after the other, each with probability 0.5, any of OPERATIONS, as often as it comes
    random erasing  a random box is filled with noise

Both work on a view that is already cut to its size, RandAugment on whole numbers from 0 to 255, with Pillow's results.
Sources: https://arxiv.org/abs/1909.13719, https://arxiv.org/abs/1708.04896; huggingface/pytorch-image-models,
timm/data/auto_augment.py and timm/data/random_erasing.py.

Under vmap all branches of a switch are computed. So an operation is described by three parts, of which one at most is
not the identity, and each is computed once: a warp, a function of single values, and a blend with another image.
"""

import math

import jax
import jax.numpy as jnp

from ssl_jax.augment import ops
from ssl_jax.config import View

Parameters = dict[str, jax.Array]

OPERATIONS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
BLENDS = ("color", "contrast", "brightness", "sharpness")
PROBABILITY = 0.5  # of each operation
STRONGEST = 10.0  # magnitude
# At STRONGEST, for operations that grow with the magnitude ("inc1").
DEGREES, SHEAR, SHIFT, ENHANCE, ADDED, ADDED_UP_TO = 30.0, 0.3, 0.45, 0.9, 110.0, 128
ROUNDING = 1e-3  # of sums of products in float32, for which a whole number would become the one below it
TRIES = 10  # erased boxes drawn, of which the first that is smaller than the view is used
ERASED = (0.02, 1 / 3)  # share of the area, uniform
ERASED_RATIO = 0.3  # smallest aspect ratio; the largest is its inverse; log-uniform
# What comes into a view from outside (timm: the mean of the images), and the noise. Of other than three channels, what
# `config.model` assumes of them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OTHER_MEAN, OTHER_STD = 0.5, 0.25


def draw(key: jax.Array, view: View) -> Parameters:
    """Random parameters of what `view` turns on.

    operation [N]    positions in OPERATIONS; -1: none
    amount [N]       its argument, as Pillow takes it: degrees, bits, threshold, addend, factor, share of the side
    moved [N, 2, 3]  where it takes pixels from: (x, y, 1) of the result, in px, to (x, y) of the image
    erased [4]       top, left, height and width of a box in px; height 0: nothing
    noise            the seed of its content, uint32
    """
    drawn: Parameters = {}
    pick, extent, erase = jax.random.split(key, 3)
    if view.randaugment:
        u = jax.random.uniform(pick, (3, view.randaugment))
        level = view.randaugment_magnitude + view.randaugment_std * jax.random.normal(extent, (view.randaugment,))
        number = jnp.floor(u[0] * len(OPERATIONS)).astype(jnp.int32)
        operation = jnp.where(u[1] < PROBABILITY, number, -1)
        amount = amount_of(operation, jnp.clip(level, 0, STRONGEST), jnp.where(u[2] < 0.5, -1.0, 1.0))
        drawn = {"operation": operation, "amount": amount, "moved": matrices(operation, amount, view.size)}
    if view.erase:
        drawn |= _draw_erased(erase, view)
    return drawn


def _is(operation: jax.Array, *names: str) -> jax.Array:
    found = [operation == OPERATIONS.index(name) for name in names]
    return jnp.stack(found).any(axis=0)


def amount_of(operation: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """The argument of operations [N] at levels [N] from 0 to STRONGEST; sign: -1 or 1, where it matters."""
    share = level / STRONGEST
    choices = {
        ("rotate",): sign * share * DEGREES,
        ("posterize",): 4 - jnp.floor(share * 4),
        ("solarize",): 256 - jnp.floor(share * 256),
        ("solarize_add",): jnp.floor(share * ADDED),
        BLENDS: jnp.maximum(0.1, 1 + sign * share * ENHANCE),
        ("shear_x", "shear_y"): sign * share * SHEAR,
        ("translate_x", "translate_y"): sign * share * SHIFT,
    }
    return jnp.select([_is(operation, *names) for names in choices], list(choices.values()), 0.0)


def matrices(operation: jax.Array, amount: jax.Array, size: int) -> jax.Array:
    """[N, 2, 3]: the identity for operations that move nothing. Shears are about the upper left corner (timm)."""

    def only(name: str) -> jax.Array:
        return jnp.where(_is(operation, name), amount, 0.0)

    angle, half = jnp.deg2rad(only("rotate")), size / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    across = [cos, only("shear_x") - sin, half - cos * half + sin * half + size * only("translate_x")]
    down = [only("shear_y") + sin, cos, half - sin * half - cos * half + size * only("translate_y")]
    return jnp.stack([jnp.stack(across, axis=-1), jnp.stack(down, axis=-1)], axis=-2)


def _draw_erased(key: jax.Array, view: View) -> Parameters:
    apply, area, ratio, corner, seed = jax.random.split(key, 5)
    side = view.size
    areas = jax.random.uniform(area, (TRIES,), minval=ERASED[0], maxval=ERASED[1]) * side**2
    limit = -math.log(ERASED_RATIO)
    ratios = jnp.exp(jax.random.uniform(ratio, (TRIES,), minval=-limit, maxval=limit))
    heights, widths = jnp.round(jnp.sqrt(areas * ratios)), jnp.round(jnp.sqrt(areas / ratios))
    fits = (heights < side) & (widths < side)
    first = jnp.argmax(fits)
    used = fits.any() & (jax.random.uniform(apply) < view.erase)
    extent = jnp.stack([heights[first], widths[first]])
    start = jnp.floor(jax.random.uniform(corner, (2,)) * (side - extent + 1))
    return {"erased": jnp.concatenate([start, jnp.where(used, extent, 0)]), "noise": jax.random.bits(seed)}


def randaugment(image: jax.Array, parameters: Parameters) -> jax.Array:
    """An image [H, W, C] in [0, 1] after the operations in `parameters`, in 255ths.

    With "moved" alone, as for a mask, pixels are moved, nothing else happens, and black comes in from outside.
    """
    colours = "operation" in parameters
    if colours:
        image = _computed_once(jnp.round(255 * image))
    for step in range(len(parameters["moved"]) if "moved" in parameters else len(parameters.get("operation", ()))):
        if "moved" in parameters:
            fill = jnp.floor(255 * _of_channels(MEAN, OTHER_MEAN, image) + 0.5) if colours else 0.0
            image = jnp.clip(bicubic(image, parameters["moved"][step], fill), 0, 255 if colours else 1)
            image = jnp.floor(image + ROUNDING) if colours else image
        if colours:
            image = change(_computed_once(image), parameters["operation"][step], parameters["amount"][step])
            image = _computed_once(image)
    return image / 255 if colours else image


def _computed_once(image: jax.Array) -> jax.Array:
    """The image, by a product that XLA does not fuse: else it computes what is before it anew for each use of a pixel,
    which takes twice as long on a CPU. (There, an optimization barrier is gone before fusion.)"""
    return jnp.matmul(image, jnp.eye(image.shape[-1]), precision=ops.EXACT)


def _of_channels(values: tuple[float, ...], other: float, image: jax.Array) -> jax.Array:
    channels = image.shape[-1]
    return jnp.array(values if channels == len(values) else (other,) * channels)


def bicubic(image: jax.Array, matrix: jax.Array, fill: jax.Array | float) -> jax.Array:
    """Look up each pixel of the result in the image [H, W, C]; Pillow's transform with Resampling.BICUBIC.

    matrix [2, 3] is as in `draw`. What lies outside is `fill`, a number or [C]; near the border, the last pixels count
    several times. The cubic has a = -1 (https://en.wikipedia.org/wiki/Bicubic_interpolation) and may overshoot.
    """
    height, width, channels = image.shape
    out_x, out_y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    x, y = (row[0] * out_x + row[1] * out_y + row[2] for row in matrix)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    column, row = jnp.clip(jnp.floor(x), -1, width - 1), jnp.clip(jnp.floor(y), -1, height - 1)
    padded = jnp.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    # Four neighbours in a row side by side, so that one gather fetches them.
    near = jnp.concatenate([padded[:, k : k + width + 1] for k in range(4)], axis=-1).reshape(-1, 4 * channels)
    start = ((row + 1) * (width + 1) + column + 1).astype(jnp.int32)
    across, down = _cubic(x - column), _cubic(y - row)
    result = jnp.zeros_like(image)
    for k in range(4):
        taps = near.at[start + k * (width + 1)].get(mode="promise_in_bounds").reshape(height, width, 4, channels)
        result += down[k][..., None] * sum(across[i][..., None] * taps[:, :, i] for i in range(4))
    return jnp.where(inside[..., None], result, fill)


def _cubic(d: jax.Array) -> tuple[jax.Array, ...]:
    """Weights of the pixels at -1, 0, 1 and 2 in a value at d in [0, 1)."""
    return d * (d * (2 - d) - 1), 1 - d * d * (2 - d), d * (1 + d * (1 - d)), d * d * (d - 1)


def change(image: jax.Array, operation: jax.Array, amount: jax.Array) -> jax.Array:
    """An image [H, W, C] of whole numbers from 0 to 255 after an operation, if it is one that moves no pixels."""

    def where(name: str, value: jax.Array, otherwise: jax.Array) -> jax.Array:
        return jnp.where(_is(operation, name), value, otherwise)

    histogram = histograms(image)
    unit = 2.0 ** (8 - amount)  # posterize
    result = where("auto_contrast", _auto_contrast(image, histogram), image)
    result = where("equalize", _equalize(image, histogram), result)
    result = where("invert", 255 - image, result)
    result = where("posterize", jnp.floor(image / unit) * unit, result)
    result = where("solarize", jnp.where(image < amount, image, 255 - image), result)
    result = where("solarize_add", jnp.where(image < ADDED_UP_TO, jnp.minimum(255, image + amount), image), result)
    gray = _luma(image)
    other = where("color", gray, jnp.zeros_like(image))
    other = where("contrast", jnp.floor(gray.mean(axis=0).mean() + 0.5), other)
    other = where("sharpness", _smooth(image), other)
    factor = jnp.where(_is(operation, *BLENDS), amount, 1.0)
    return jnp.clip(jnp.floor(other + factor * (result - other)), 0, 255)


def histograms(image: jax.Array) -> jax.Array:
    """How often each value occurs, int [C, 256]."""
    bins = jnp.zeros(image.shape[-1] * 256, jnp.int32).at[_bins(image)].add(1, mode="promise_in_bounds")
    return bins.reshape(-1, 256)


def _bins(image: jax.Array) -> jax.Array:
    """The place of each value in the rows of `histograms`, [H, W, C]."""
    return image.astype(jnp.int32) + 256 * jnp.arange(image.shape[-1])


def _auto_contrast(image: jax.Array, histogram: jax.Array) -> jax.Array:
    """Each channel from 0 to 255."""
    low = jnp.argmax(histogram > 0, axis=-1)
    high = 255 - jnp.argmax(histogram[:, ::-1] > 0, axis=-1)
    return jnp.where(high > low, jnp.floor((image - low) * 255 / jnp.maximum(high - low, 1)), image)


def _equalize(image: jax.Array, histogram: jax.Array) -> jax.Array:
    """Each value of a channel about equally often."""
    pixels = image.shape[0] * image.shape[1]
    last = 255 - jnp.argmax(histogram[:, ::-1] > 0, axis=-1)
    step = (pixels - jnp.take_along_axis(histogram, last[:, None], axis=-1)) // 255
    below = jnp.cumsum(histogram, axis=-1) - histogram
    table = (step // 2 + below) // jnp.maximum(step, 1)
    table = jnp.where(step > 0, jnp.minimum(table, 255), jnp.arange(256)).astype(jnp.float32)
    return table.reshape(-1).at[_bins(image)].get(mode="promise_in_bounds")


def _luma(image: jax.Array) -> jax.Array:
    """Pillow's gray [H, W, 1] of whole numbers, in its fixed-point arithmetic; other than RGB: the image."""
    if image.shape[-1] != 3:
        return image
    red, green, blue = image[..., :1], image[..., 1:2], image[..., 2:]
    return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


def _smooth(image: jax.Array) -> jax.Array:
    """Pillow's ImageFilter.SMOOTH: 3 x 3 px, of which the middle counts five times; pixels at the border stay."""
    rows = image[:-2] + image[1:-1] + image[2:]
    inner = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]) / 13
    return image.at[1:-1, 1:-1].set(jnp.floor(inner + 0.5)) if min(image.shape[:2]) > 2 else image


def erase(image: jax.Array, parameters: Parameters) -> jax.Array:
    """An image [H, W, C] in [0, 1] with noise in its box "erased"; without "noise", as for a mask, with zeros.

    The noise is normal with mean and deviation of the images, as timm's is of normalised ones, clipped to [0, 1].
    """
    top, left, height, width = parameters["erased"]
    row, column = jnp.arange(image.shape[0])[:, None, None], jnp.arange(image.shape[1])[:, None]
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    noise = jnp.zeros_like(image)
    if "noise" in parameters:
        normal = jax.random.normal(jax.random.key(parameters["noise"]), image.shape)
        mean, std = _of_channels(MEAN, OTHER_MEAN, image), _of_channels(STD, OTHER_STD, image)
        noise = jnp.clip(mean + std * normal, 0, 1)
    return jnp.where(inside, noise, image)
