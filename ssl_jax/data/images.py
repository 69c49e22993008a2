"""Images that a caller hands over: arrays and Pillow's images, checked and brought to the size of an encoder.

Numbers mean what they mean to matplotlib's imshow: integers are from 0 to 255, floats from 0 to 1.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError, first_line

VALUES = "integers from 0 to 255 or floats from 0 to 1"
ROUNDING = 1e-3  # by which floats may miss the range from 0 to 1, after a resampling for instance


def as_images(images: Any, rows: slice, size: int, channels: int, side: int = 0) -> np.ndarray:
    """One or more of the images, images[rows], as uint8 or float32 in [0, 1], [N, size, size, channels].

    images: an array [N, H, W, C], or [N, H, W] if `channels` is 1; or a sequence of arrays [H, W, C], or [H, W], and
        Pillow's images, of which each may have its own size.

    An image of another size is treated like a file: its central square is resized, bilinear with antialias; side: as
    `central.central` says. Pillow's images become gray or RGB; arrays must have `channels` channels. Raises UserError
    for everything else.
    """
    if isinstance(images, list | tuple) or getattr(images, "dtype", "") == np.dtype(object):
        each = [_one(image, size, channels, side, f"images[{i}]") for i, image in enumerate(images[rows], rows.start)]
    else:
        array = _with_channels(images[rows], 4, channels, "images", getattr(images, "shape", None))
        if array.shape[1:3] == (size, size):
            return as_pixels(array, "images")
        each = [_resized(image, size, channels, side) for image in as_pixels(array, "images")]
    if len({image.dtype for image in each}) > 1:
        each = [image if image.dtype == np.float32 else image.astype(np.float32) / 255 for image in each]
    return np.stack(each)


def as_pixels(array: np.ndarray, where: str) -> np.ndarray:
    """The array as uint8, or as float32 from 0 to 1 if it holds floats. UserError if its values are no pixels."""
    if array.dtype == np.uint8:
        return array
    is_float = jnp.issubdtype(array.dtype, jnp.floating)  # bfloat16, too
    if not is_float and array.dtype.kind not in "iu":
        raise UserError(f"{where}: {array.dtype}; allowed: {VALUES}")
    array = array.astype(np.float32) if is_float else array
    low, high = array.min(initial=0), array.max(initial=0)
    smallest, largest = (-ROUNDING, 1 + ROUNDING) if is_float else (0, 255)
    if not (low >= smallest and high <= largest):  # NaN, too
        raise UserError(f"{where}: {'floats' if is_float else 'integers'} from {low:g} to {high:g}; allowed: {VALUES}")
    return array if is_float else array.astype(np.uint8)


def _one(image: Any, size: int, channels: int, side: int, where: str) -> np.ndarray:
    """uint8 or float32 [size, size, channels]."""
    from PIL import Image, ImageOps

    from ssl_jax.data.decoding import finish

    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise UserError(f"{where}: a Pillow image; allowed: an array with {channels} channels, as in training")
        try:
            image = ImageOps.exif_transpose(image)
            return finish(image, size, channels, side=0 if image.size == (size, size) else side)
        except Exception as error:  # a file that is read only now, and damaged
            raise UserError(f"{where}: {first_line(error)}") from error
    array = as_pixels(_with_channels(image, 3, channels, where), where)
    return array if array.shape[:2] == (size, size) else _resized(array, size, channels, side)


def _with_channels(images: Any, ndim: int, channels: int, where: str, whole: Sequence[int] | None = None) -> np.ndarray:
    """An array with `ndim` axes, of which the last is the channels. UserError if it has other axes or channels.

    whole: the shape of the array that these images are from, for messages.
    """
    try:
        array = np.asarray(images)
    except ValueError as error:  # rows of different lengths
        raise UserError(f"{where}: {first_line(error)}") from error
    if array.dtype.kind in "OSU":  # None, text
        kind = type(images).__name__
        raise UserError(f"{where}: {kind}; allowed: arrays of {VALUES}, or Pillow images")
    shape = list(whole or array.shape)
    wanted = f"[{'N, ' * (ndim == 4)}H, W, {channels}]"
    # Gray images without an axis for it, unless the last axis must be that of one image.
    if array.ndim == ndim - 1 and channels == 1 and shape[-1] > 4:
        array = array[..., None]
    if array.ndim == 3 and ndim == 4:
        raise UserError(f"{where}: shape {shape}; allowed: {wanted}; write [image] for a single image")
    if array.ndim != ndim or 0 in array.shape[-3:]:
        raise UserError(f"{where}: shape {shape}; allowed: {wanted}")
    if array.shape[-1] != channels:
        first = ", not channels first" * (array.shape[-3] == channels)
        raise UserError(
            f"{where}: {array.shape[-1]} channels; allowed: {channels}, as in the encoder's training: {wanted}{first}"
        )
    return array


def _resized(image: np.ndarray, size: int, channels: int, side: int) -> np.ndarray:
    from ssl_jax.data.decoding import convert

    image = image if image.dtype == np.uint8 else np.round(255 * image.clip(0, 1)).astype(np.uint8)
    return convert(image, size, channels, side)
