"""Any image file as uint8 [size, size, C], with Pillow; DICOM with pydicom."""

import contextlib
import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ssl_jax.data import dicom
from ssl_jax.errors import UnreadableError, UserError

KINDS = "jpg, jpeg, jpe, jfif, png, bmp, gif, tif, tiff, webp, ppm, pgm, pbm, pnm, jp2, j2k, avif, dcm, dicom"
EXTENSIONS = frozenset(f".{kind}" for kind in KINDS.split(", "))
# Only these are tried, whatever the extension says: Pillow knows others (EPS, PDF) that start programs.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # more than 8 bits in one channel


def check(path: Path) -> None:
    """Raises UnreadableError unless the file's header is that of an image: cheap, the pixels are not decoded."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
        if dicom.is_dicom(head):
            return dicom.check(path)
        with Image.open(path, formats=_formats()):
            pass
    except (MemoryError, UnreadableError, UserError):
        raise
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on bad bytes
        raise UnreadableError(_reason(error)) from error


def decode(content: bytes, size: int, channels: int, window: str = "auto") -> np.ndarray:
    """The image in `content` (any of FORMATS; the first frame), turned as its EXIF orientation says, its centre square
    resized to uint8 [size, size, channels], bilinear with antialias. size 0: all of it, as it is.

    Transparent parts are put on white. One deep channel (16 bit, 32 bit, float) is scaled from the image's own lowest
    and highest value to 0..255: medical images often use 12 of 16 bits, and the full range would leave them black;
    under window="percentile" from its percentiles `dicom.PERCENTILES`. DICOM: see `dicom.decode`.
    Raises UnreadableError.
    """
    if dicom.is_dicom(content[:132]):
        return _finish(Image.fromarray(dicom.decode(content, window)), size, channels)
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if size:
                # libjpeg decodes at 1/2, 1/4 or 1/8 of the size for a fraction of the time; never below `size`.
                image.draft("L" if channels == 1 else image.mode, (size, size))
            image.load()  # first, so that nothing but a damaged EXIF block is passed over below
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return _finish(image, size, channels, window)
    except (MemoryError, UnreadableError):
        raise
    except Exception as error:
        raise UnreadableError(_reason(error)) from error


def convert(array: np.ndarray, size: int, channels: int) -> np.ndarray:
    """uint8 [H,W,C] as [size, size, channels], like `decode`; C other than 1 and 3 is kept."""
    if array.shape[-1] not in (1, 3):
        return np.concatenate([convert(array[..., i : i + 1], size, 1) for i in range(array.shape[-1])], axis=-1)
    return _finish(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), size, channels)


def _finish(image: Image.Image, size: int, channels: int, window: str = "auto") -> np.ndarray:
    if image.mode in DEEP:
        image = _stretch(image, window)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if size and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)[..., None] if channels == 1 else np.asarray(image)


def _stretch(image: Image.Image, window: str) -> Image.Image:
    shade = dicom.stretch(np.asarray(image, np.float64), dicom.PERCENTILES if window == "percentile" else (0, 100))
    return Image.fromarray((shade * 255).round().astype(np.uint8))


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
