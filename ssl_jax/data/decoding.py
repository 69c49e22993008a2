"""How image files and arrays of any source become uint8 [size, size, C].

Pillow decodes the files, except for DICOM, which pydicom decodes.
"""

import contextlib
import functools
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageColor, ImageOps

from ssl_jax.config import Data
from ssl_jax.data import dicom
from ssl_jax.data.central import central
from ssl_jax.data.channels import DEEP, check_ratios, choose, count, naming, why_unknown
from ssl_jax.data.source import check_memory, open_file
from ssl_jax.errors import UnreadableError, UserError

SIZE = 224  # side of images from files in px, unless data.size is set
FIRST = 8  # files that say how many channels images have, unless config.data.channels does
KINDS = "jpg, jpeg, jpe, jfif, png, bmp, gif, tif, tiff, webp, ppm, pgm, pbm, pnm, jp2, j2k, avif, dcm, dicom"
EXTENSIONS = frozenset(f".{kind}" for kind in KINDS.split(", "))
# Pillow tries only these formats, whatever the extension says, because others (EPS, PDF) start programs.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
# Bytes per pixel that decoding takes at its peak, measured: of a deep image; of one with transparency; of the decoders.
DEEP_BYTES, CLEAR_BYTES, DECODER_BYTES = 24, 12, {"JPEG2000": 16, "WEBP": 8, "AVIF": 8, "GIF": 4, "TIFF": 4}


def own_channels(content: BinaryIO) -> list[int]:
    """[the number of channels of an image]; [] for DICOM. Raises anything for a damaged image."""
    if dicom.is_dicom(content.read(132)):
        return []
    content.seek(0)
    with Image.open(content, formats=_formats()) as image:
        return [count(image)]


def most_common(channels: Sequence[int]) -> int:
    """What most images have, 3 for gray or if nothing is known."""
    number = max(channels, default=3, key=Counter(channels).__getitem__)
    return 3 if number == 1 else number


def check(path: Path | str, size: int = 0, channels: int = 3, exact: bool = False) -> tuple[int, int]:
    """(width, height) of an image that `decode` can take, by its header; (0, 0) for DICOM. Decodes no pixels.

    exact: as for `decode`. Raises UnreadableError for all other files.
    """
    try:
        with open_file(path) as file:
            if dicom.is_dicom(file.read(132)):
                dicom.check(Path(path))
                return 0, 0
            file.seek(0)
            with open_image(file, size, channels, exact) as image:
                whole = image.size  # of a JPEG, that at which it is decoded: of the same ratio
                choose(image, channels, exact)
                return whole
    except (MemoryError, UnreadableError, UserError):
        raise
    except Exception as error:  # on bad bytes, Pillow raises anything from OSError to struct.error
        raise UnreadableError(reason_of(error)) from error


def header(path: Path | str) -> tuple[int, int, str]:
    """(width, height, kind) of an image file that `check` accepts; kind: gray or colour, and what else is seldom.

    (0, 0, "DICOM") for DICOM.
    """
    with open_file(path) as file:
        if dicom.is_dicom(file.read(132)):
            return 0, 0, "DICOM"
        file.seek(0)
        with Image.open(file, formats=_formats()) as image:
            kind = "gray" if image.mode in ("1", "L", "LA", *DEEP) else "colour"
            kind += ", more than 8 bits" * (image.mode in DEEP) + ", transparent" * image.has_transparency_data
            return image.width, image.height, kind


def read_image(files: Sequence[str], size: int, channels: int, data: Data) -> np.ndarray:
    """The image in a file, or in the files of data.bands, one channel each, uint8 [size, size, channels].

    It is decoded as `decode` says. Raises OSError and UnreadableError; bands with size 0 must be equally large.
    """
    if not data.bands:
        content = Path(files[0]).read_bytes()
        return decode(content, size, channels, data.window, data.background, False, data.test_side)
    planes, sizes = [], []
    for path in files:
        content = Path(path).read_bytes()
        with naming(path):
            planes.append(decode(content, size, 1, data.window, data.background, True, data.test_side))
            sizes.append((0, 0) if dicom.is_dicom(content[:132]) else _size(content))
    check_ratios(sizes)
    if len({plane.shape for plane in planes}) > 1:
        raise UnreadableError("bands of several sizes")
    return np.concatenate(planes, axis=-1)


def decode(
    content: bytes,
    size: int,
    channels: int,
    window: str = "auto",
    background: str = "white",
    exact: bool = False,
    side: int = 0,
) -> np.ndarray:
    """The image, or its first frame, in `content` as uint8 [size, size, channels].

    It is rotated according to its EXIF orientation. Its central part is resized as `central` says (side: see there);
    size 0 keeps the whole image at its size. Transparent parts become `background`. A deep channel (16 bit, 32 bit,
    float) is stretched from the image's own lowest and highest value to 0..255: medical images often use 12 of 16 bits,
    and would be black otherwise. window="percentile" stretches between `dicom.PERCENTILES` instead. For DICOM, see
    `dicom.decode`. The pages of a TIFF, if they are gray, are its channels, each read like a file of its own.

    exact: only an image that has this number of channels, which is so anyway if it is neither 1 nor 3
    (`channels.choose`). Raises UnreadableError.
    """
    if dicom.is_dicom(content[:132]):
        pixels = dicom.decode(content, window)
        own = 1 if pixels.ndim == 2 else 3
        if own != channels and (exact or channels not in (1, 3)):
            raise UnreadableError(f"DICOM of {own} channel{'s' * (own > 1)}; allowed: {channels}")
        return finish(Image.fromarray(pixels), size, channels, side=side)
    try:
        with open_image(io.BytesIO(content), 0 if side else size, channels, exact) as image:
            pages = choose(image, channels, exact)
            if len(pages) > 1 or channels not in (1, 3):
                return _planes(image, pages, size, channels, window, side)
            image.load()  # first, so that only errors of a damaged EXIF block are suppressed below
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return finish(image, size, channels, window, background, side)
    except (MemoryError, UnreadableError):
        raise
    except Exception as error:
        raise UnreadableError(reason_of(error)) from error


def check_background(colour: str) -> None:
    """Raises UserError unless Pillow knows the colour."""
    try:
        ImageColor.getrgb(colour)
    except ValueError as error:
        example = "white, black, '#808080', 'rgb(128,128,128)'"
        raise UserError(f"config.data.background={colour!r}: not a colour; allowed: {example}") from error


def _planes(image: Image.Image, pages: Sequence[int], size: int, channels: int, window: str, side: int) -> np.ndarray:
    """The pages of an opened image, or the samples of its pixels, as uint8 [size, size, channels]."""
    planes = []
    for number in pages:
        image.seek(number)
        _prepare(image, 0 if side else size, image.mode)
        image.load()
        upright: Image.Image = image
        with contextlib.suppress(Exception):
            upright = ImageOps.exif_transpose(image)  # not in place: the next page is loaded into `image`
        if len(pages) == 1:
            return convert(np.asarray(upright), size, channels, side)
        planes.append(finish(upright, size, 1, window, side=side))
    return np.concatenate(planes, axis=-1)


def _size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        return image.size


def open_image(file: BinaryIO, size: int, channels: int, exact: bool = False) -> Image.Image:
    """An image of which only the header is read. Raises UnreadableError if decoding it would take too much memory."""
    try:
        image = Image.open(file, formats=_formats())
    except Image.UnidentifiedImageError as error:
        raise UnreadableError(why_unknown(file)) from error
    _prepare(image, size, "L" if channels == 1 and not exact else image.mode)
    return image


def _prepare(image: Image.Image, size: int, mode: str) -> None:
    """Has a JPEG decoded small. Raises UnreadableError if decoding the image would take too much memory."""
    width, height = image.size
    needed = DECODER_BYTES.get(image.format or "", 0)
    if "progressive" in image.info:  # libjpeg holds all coefficients, whatever the size that it decodes at
        needed += 2 * len(image.getbands())
    needed *= width * height
    if size:
        # libjpeg decodes at 1/2, 1/4 or 1/8 of the size in a fraction of the time; never below `size`.
        image.draft(mode, (size, size))
    each = 8 if image.mode not in ("1", "L", "P") else 5  # as decoded (Pillow keeps colours in 4 bytes), and a copy
    if image.mode in DEEP:
        each = DEEP_BYTES
    elif image.has_transparency_data:
        each += CLEAR_BYTES
    check_memory(width, height, needed + each * image.width * image.height)


def convert(array: np.ndarray, size: int, channels: int, side: int = 0) -> np.ndarray:
    """uint8 [H,W,C] as [size, size, channels], as by `decode`; C does not change if it is neither 1 nor 3."""
    if array.shape[-1] not in (1, 3):
        return np.concatenate([convert(array[..., i : i + 1], size, 1, side) for i in range(array.shape[-1])], axis=-1)
    return finish(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), size, channels, side=side)


def finish(
    image: Image.Image, size: int, channels: int, window: str = "auto", background: str = "white", side: int = 0
) -> np.ndarray:
    """A loaded image that is upright, as `decode` returns it."""
    image = plain(image, channels, window, background)
    array = np.asarray(central(image, size, side) if size else image)
    return array[..., None] if channels == 1 else array


def plain(image: Image.Image, channels: int, window: str, background: str) -> Image.Image:
    """A loaded image in 8 bits, without transparency: gray if `channels` is 1, else RGB."""
    if image.mode in DEEP:
        image = _stretch(image, window)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3]), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _stretch(image: Image.Image, window: str) -> Image.Image:
    shade = dicom.stretch(np.asarray(image, np.float64), dicom.PERCENTILES if window == "percentile" else (0, 100))
    shade *= 255
    return Image.fromarray(np.round(shade, out=shade).astype(np.uint8))


@functools.cache
def _formats() -> list[str]:
    Image.init()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_open` decides
    return [name for name in FORMATS if name in Image.OPEN]  # not every Pillow has AVIF


def reason_of(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
