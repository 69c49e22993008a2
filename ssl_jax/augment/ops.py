"""Deterministic image operations, with torchvision's results (transforms.v2.functional on float tensors).

Each takes one float image [H, W, C] in [0, 1] and explicit parameters, and returns a new image in [0, 1]. Parameters
may be traced and sizes are static, so all of them work under `jax.jit` and `jax.vmap`. Any number of channels will do;
operations on colour (saturation, hue, grayscale) leave images unchanged unless their channels are red, green, blue.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

GRAY = (0.2989, 0.587, 0.114)  # ITU-R BT.601 luma, in the digits of torchvision
# By default accelerators may multiply matrices below float32 precision; pixels would be coarser than 8 bit.
EXACT = jax.lax.Precision.HIGHEST


def luma(image: jax.Array) -> jax.Array:
    """Brightness [H, W, 1] of an RGB image; an image with other channels is returned unchanged."""
    if image.shape[-1] != 3:
        return image
    red, green, blue = image[..., :1], image[..., 1:2], image[..., 2:]
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def mean_luma(image: jax.Array) -> jax.Array:
    """Mean of `luma` over the whole image."""
    # Rows first, then luma, then columns: the compiler's sum over all axes at once is ten times slower on a CPU.
    return jnp.mean(luma(jnp.mean(image, axis=0, keepdims=True)))


def blend(image: jax.Array, other: ArrayLike, factor: ArrayLike) -> jax.Array:
    """From `other` (factor 0) through `image` (1) and beyond, clipped."""
    return jnp.clip(factor * image + (1 - factor) * other, 0, 1)


def adjust_brightness(image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Multiply by `factor` >= 0 (0: black, 1: unchanged) and clip."""
    return blend(image, 0.0, factor)


def adjust_contrast(image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Move away from (`factor` > 1) or towards the mean gray of the image; without three channels: its mean value."""
    return blend(image, mean_luma(image), factor)


def adjust_saturation(image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Move away from (`factor` > 1) or towards each pixel's gray. Unchanged unless C = 3."""
    return blend(image, luma(image), factor) if image.shape[-1] == 3 else image


def adjust_hue(image: jax.Array, shift: ArrayLike) -> jax.Array:
    """Turn the colours by `shift` turns of the colour circle (-0.5 to 0.5). Unchanged unless C = 3."""
    if image.shape[-1] != 3:
        return image
    # In HSV terms a turn of the hue keeps each pixel's largest and smallest value, so converting to HSV and back
    # comes down to one angle `sixth` in [0, 6) and three ramps between the two values.
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    high, low = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
    span = high - low
    scale = 1 / jnp.where(span == 0, 1, span)
    sixth = jnp.where(
        high == red,
        (green - blue) * scale,
        jnp.where(high == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    sixth += 6 * shift
    sixth -= 6 * jnp.floor(sixth / 6)
    ramps = (jnp.abs(sixth - 3) - 1, 2 - jnp.abs(sixth - 2), 2 - jnp.abs(sixth - 4))
    return jnp.stack([low + span * jnp.clip(ramp, 0, 1) for ramp in ramps], axis=-1)


def to_grayscale(image: jax.Array) -> jax.Array:
    """Each pixel's gray in all three channels. Unchanged unless C = 3."""
    return jnp.broadcast_to(luma(image), image.shape)


def solarize(image: jax.Array, threshold: ArrayLike) -> jax.Array:
    """Invert the values at or above `threshold`."""
    return jnp.where(image >= threshold, 1 - image, image)


def gaussian_blur(image: jax.Array, kernel_size: int, sigma: ArrayLike) -> jax.Array:
    """Gaussian of standard deviation `sigma` px, cut to `kernel_size` px (odd, under twice the side), edges mirrored.

    sigma = 0 leaves the image unchanged, so that a blur can be switched off for single images of a batch.
    """
    rows, columns = (_blur_weights(side, kernel_size, sigma) for side in image.shape[:2])
    return _separable(image, rows, columns)


def _blur_weights(side: int, kernel_size: int, sigma: ArrayLike) -> jax.Array:
    """The blur along one axis as a matrix [side, side]: one product is faster than a convolution per image."""
    reach = kernel_size // 2
    squared = 2 * jnp.maximum(jnp.asarray(sigma, jnp.float32), 1e-6) ** 2

    def gauss(distance):
        return jnp.where(abs(distance) <= reach, jnp.exp(-(distance**2) / squared), 0)

    target, source = jnp.arange(side)[:, None], jnp.arange(side)[None, :]
    last = side - 1
    before = jnp.where(source > 0, gauss(target + source), 0)  # mirrored at the first pixel, which is not repeated
    after = jnp.where(source < last, gauss(2 * last - target - source), 0)
    return (gauss(target - source) + before + after) / gauss(jnp.arange(-reach, reach + 1)).sum()


def horizontal_flip(image: jax.Array) -> jax.Array:
    """Left becomes right."""
    return image[:, ::-1]


def resized_crop(
    image: jax.Array,
    top: ArrayLike,
    left: ArrayLike,
    height: ArrayLike,
    width: ArrayLike,
    size: int | tuple[int, int],
) -> jax.Array:
    """The box of height x width px at (top, left), resized to `size` px (a side, or rows and columns).

    Bilinear with antialias: a triangle filter as wide as a pixel of the result, or of the source if that is larger.
    The box lies inside the image and is at least 1 px each way; it may be traced and need not be whole numbers.
    """
    out = (size, size) if isinstance(size, int) else size
    rows = _resize_weights(image.shape[0], top, height, out[0])
    columns = _resize_weights(image.shape[1], left, width, out[1])
    return _separable(image, rows, columns)


def _resize_weights(side: int, start: ArrayLike, length: ArrayLike, out: int) -> jax.Array:
    """Weight of each source pixel in each pixel of the result, [out, side]."""
    step = jnp.asarray(length, jnp.float32) / out
    centre = start + (jnp.arange(out)[:, None] + 0.5) * step
    pixel = jnp.arange(side)[None, :] + 0.5
    weights = jnp.maximum(0, 1 - jnp.abs(pixel - centre) / jnp.maximum(step, 1))
    weights = jnp.where((pixel >= start) & (pixel <= start + length), weights, 0)  # nothing from outside the box
    return weights / weights.sum(1, keepdims=True)


def _separable(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Apply rows [P, H] and columns [Q, W] to an image [H, W, C]: [P, Q, C]."""
    across = jnp.einsum("qw,hwc->qhc", columns, image, precision=EXACT)
    return jnp.clip(jnp.einsum("ph,qhc->pqc", rows, across, precision=EXACT), 0, 1)


def rotate(image: jax.Array, degrees: ArrayLike, fill: ArrayLike | None = None) -> jax.Array:
    """Turn counter-clockwise about the centre; bilinear. `fill`: see `warp`."""
    return warp(image, rotation_matrix(image.shape[0], image.shape[1], degrees), fill)


def translate(image: jax.Array, dx: ArrayLike, dy: ArrayLike, fill: ArrayLike | None = None) -> jax.Array:
    """Shift dx px to the right and dy px down; bilinear. `fill`: see `warp`."""
    return warp(image, translation_matrix(dx, dy), fill)


def perspective(
    image: jax.Array, startpoints: ArrayLike, endpoints: ArrayLike, fill: ArrayLike | None = None
) -> jax.Array:
    """Move four corners [4, 2] (x, y in px) from startpoints to endpoints; bilinear. `fill`: see `warp`."""
    return warp(image, perspective_matrix(startpoints, endpoints), fill)


def rotation_matrix(height: int | jax.Array, width: int | jax.Array, degrees: ArrayLike) -> jax.Array:
    """The matrix of `rotate`, for `warp`."""
    angle = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    return _matrix([cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1])


def shear_matrix(height: int | jax.Array, width: int | jax.Array, degrees: ArrayLike) -> jax.Array:
    """For `warp`: rows shift along themselves by tan(degrees) x their distance from the centre, the upper ones right.

    torchvision's `affine(shear=(degrees, 0))`.
    """
    del width
    tan = jnp.tan(jnp.deg2rad(jnp.asarray(degrees, jnp.float32)))
    return _matrix([1, tan, -tan * height / 2], [0, 1, 0], [0, 0, 1])


def zoom_matrix(height: int | jax.Array, width: int | jax.Array, factor: ArrayLike) -> jax.Array:
    """For `warp`: enlarge about the centre by `factor` (below 1: shrink), as torchvision's `affine(scale=factor)`."""
    scale = 1 / jnp.asarray(factor, jnp.float32)
    return _matrix([scale, 0, (1 - scale) * width / 2], [0, scale, (1 - scale) * height / 2], [0, 0, 1])


def translation_matrix(dx: ArrayLike, dy: ArrayLike) -> jax.Array:
    """The matrix of `translate`, for `warp`."""
    return _matrix([1, 0, -jnp.asarray(dx)], [0, 1, -jnp.asarray(dy)], [0, 0, 1])


def perspective_matrix(startpoints: ArrayLike, endpoints: ArrayLike) -> jax.Array:
    """The matrix of `perspective`, for `warp`. The corners go around the image, and no three lie on a line."""
    end = _from_square(jnp.asarray(endpoints, jnp.float32))
    a, b, c = end.T
    adjugate = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)])  # the inverse, up to a factor
    return compose(_from_square(jnp.asarray(startpoints, jnp.float32)), adjugate)


def _from_square(corners: jax.Array) -> jax.Array:
    """Homography from the unit square to `corners` [4, 2] (Heckbert 1989, section 2.2.3).

    A closed form rather than a linear solver, so that it runs unchanged on any device, batched and sharded.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners
    dx1, dx2, dx3 = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, dy3 = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    area = dx1 * dy2 - dx2 * dy1
    g, h = (dx3 * dy2 - dx2 * dy3) / area, (dx1 * dy3 - dx3 * dy1) / area
    return _matrix([x1 - x0 + g * x1, x3 - x0 + h * x3, x0], [y1 - y0 + g * y1, y3 - y0 + h * y3, y0], [g, h, 1])


def _matrix(*rows) -> jax.Array:
    return jnp.stack([jnp.stack([jnp.asarray(value, jnp.float32) for value in row]) for row in rows])


def compose(*matrices: jax.Array) -> jax.Array:
    """One matrix for several warps, listed in the order in which they are applied to the image."""
    product = matrices[0]
    for matrix in matrices[1:]:
        product = jnp.matmul(product, matrix, precision=EXACT)
    return product


def warp(image: jax.Array, matrix: jax.Array, fill: ArrayLike | None = None) -> jax.Array:
    """Look up each pixel of the result in the image, bilinear.

    matrix [3, 3] takes (x, y, 1) of the result to that of the image, in px from the upper left corner (the centre
    of the first pixel is at 0.5). The outside is black, or `fill` if that is a number; as in torchvision, pixels cut
    by the border are then weighted by their covered share twice.
    """
    height, width, channels = image.shape
    out_x, out_y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    (a, b, c), (d, e, f), (g, h, i) = matrix
    depth = g * out_x + h * out_y + i
    depth = jnp.where(depth == 0, 1e-9, depth)  # on the horizon of a perspective; 0 / 0 would be no place at all
    # Black pixels around the image, one before it and two after it, stand for everything outside.
    x = jnp.clip((a * out_x + b * out_y + c) / depth - 0.5, -1, width) + 1
    y = jnp.clip((d * out_x + e * out_y + f) / depth - 0.5, -1, height) + 1
    source = jnp.pad(image, ((1, 2), (1, 2), (0, 0)))
    if fill is not None:
        source = jnp.concatenate([source, jnp.pad(jnp.ones((height, width, 1)), ((1, 2), (1, 2), (0, 0)))], -1)
    # The four neighbours side by side, so that one gather fetches them all.
    near = jnp.concatenate([source[:-1, :-1], source[:-1, 1:], source[1:, :-1], source[1:, 1:]], -1)
    column, row = jnp.floor(x), jnp.floor(y)
    index = (row * (width + 2) + column).astype(jnp.int32)
    near = near.reshape(-1, 4, source.shape[-1]).at[index].get(mode="promise_in_bounds")
    right, down = (x - column)[..., None], (y - row)[..., None]
    above = near[..., 0, :] * (1 - right) + near[..., 1, :] * right
    below = near[..., 2, :] * (1 - right) + near[..., 3, :] * right
    result = above * (1 - down) + below * down
    if fill is not None:
        result = (result[..., :channels] - fill) * result[..., channels:] + fill
    return jnp.clip(result, 0, 1)
