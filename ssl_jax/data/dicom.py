"""Decodes DICOM images to gray levels or colours, with pydicom (the extra `dicom`).

It reads only tags that describe pixels, never names, dates or private tags. pydicom's own messages, which may quote a
file's content, are suppressed.
"""

import contextlib
import functools
import io
import logging
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssl_jax.data.source import MAX_BYTES, check_memory
from ssl_jax.errors import UnreadableError, UserError

MARK = b"DICM"  # bytes 128 to 131
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax
PERCENTILES = (0.5, 99.5)  # of the pixels, which become black and white if a file has no window of its own
PIXEL_BYTES = 40  # per pixel that decoding takes at its peak, measured: gray levels are float64 on their way to 8 bits
TAGS = """
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration Rows Columns NumberOfFrames BitsAllocated BitsStored
    HighBit PixelRepresentation PixelPaddingValue RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter
    WindowWidth VOILUTFunction VOILUTSequence ExtendedOffsetTable ExtendedOffsetTableLengths
    RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
    SegmentedBluePaletteColorLookupTableData PixelData FloatPixelData DoubleFloatPixelData
"""
# The packages for a family of transfer syntaxes, by a word in its name.
PLUGINS = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG-LS": "pylibjpeg pylibjpeg-libjpeg",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
}


def is_dicom(head: bytes) -> bool:
    """Whether a file is DICOM. head: at least its first 132 bytes."""
    return head[128:132] == MARK


def check(path: Path) -> None:
    """Raises UnreadableError unless the file contains an image that `decode` can take, with the installed packages."""
    with path.open("rb") as file:
        length = _length(file)
        header = _read(file, stop_before_pixels=True)
    _check_memory(header, length)
    _decompressor(header)


def decode(content: bytes, window: str) -> np.ndarray:
    """The first frame of the file with this content, uint8 [H,W] or, for colour images, [H,W,3].

    The file's rescale or modality table is applied to gray values, and then its window or VOI table. With
    window="percentile", or if the file has no window, they are stretched between PERCENTILES instead. MONOCHROME1 is
    inverted, so that larger values are always brighter. Raises UnreadableError.
    """
    file = io.BytesIO(content)
    length = _length(file)
    header = _read(file)
    _check_memory(header, length)
    compressed = _decompressor(header)
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    try:
        kind = str(header.PhotometricInterpretation)
        pixels = pixel_array(header, index=0)
        if kind == "PALETTE COLOR":
            return _eight_bits(apply_color_lut(pixels, header))
        if pixels.ndim == 3:
            return _eight_bits(pixels, int(header.BitsStored))
        values = np.asarray(apply_modality_lut(pixels, header), np.float64)
        shade = _own_window(values, header) if window == "auto" else None
        if shade is None:
            padding = header.get("PixelPaddingValue")
            shade = stretch(values, PERCENTILES, None if padding is None else pixels != padding)
    except (MemoryError, UnreadableError):
        raise
    except Exception as error:
        reason = f"damaged, or needs: pip install {compressed}" if compressed else "damaged"
        raise UnreadableError(
            f"DICOM ({_syntax(header)}) that cannot be decoded ({type(error).__name__}): {reason}"
        ) from None
    shade = 1 - shade if kind == "MONOCHROME1" else shade
    shade *= 255
    return np.round(shade, out=shade).astype(np.uint8)


def _length(file: BinaryIO) -> int:
    """The bytes of a file; of a deflated one, which pydicom inflates as a whole, the bytes that it becomes.

    Raises UnreadableError if these are more than MAX_BYTES.
    """
    head = file.read(144)  # preamble, mark, and the length of the group that names the transfer syntax
    names = file.read(min(int.from_bytes(head[140:], "little"), 2**16))
    length = file.seek(0, io.SEEK_END)
    if DEFLATED in names:
        file.seek(len(head) + len(names))
        content, inflate, length = file.read(), zlib.decompressobj(-zlib.MAX_WBITS), 0
        with contextlib.suppress(zlib.error):  # damaged, as pydicom will say
            while content and not inflate.eof and length <= MAX_BYTES:
                length += len(inflate.decompress(content, 2**24))
                content = inflate.unconsumed_tail
        if length > MAX_BYTES:
            raise UnreadableError(f"deflated DICOM of more than {MAX_BYTES / 1e9:g} GB; allowed: less")
    file.seek(0)
    return length


def _check_memory(header: Any, length: int) -> None:
    """Raises UnreadableError if decoding a file of `length` bytes would take too much memory."""
    try:
        width, height = int(header.Columns), int(header.Rows)
    except (AttributeError, TypeError, ValueError):
        raise UnreadableError("damaged DICOM (no size)") from None
    check_memory(width, height, PIXEL_BYTES * width * height + 2 * length)


def _own_window(values: np.ndarray, header: Any) -> np.ndarray | None:
    """Values mapped to [0, 1] by the first VOI table or window of the file; None if it has no valid one.

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    """
    from pydicom.pixels import apply_voi

    if header.get("VOILUTSequence"):
        depth = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi(values.round().astype(np.int64), header) / (2.0**depth - 1)
    centre, width = (_first(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    kind = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if centre is None or width is None or width <= (1 if kind == "LINEAR" else 0):
        return None
    if kind == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if kind == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return np.clip((values - centre) / width + 0.5, 0, 1)


def stretch(values: np.ndarray, percentiles: tuple[float, float], known: np.ndarray | None = None) -> np.ndarray:
    """Values mapped to [0, 1] between two percentiles of the `known` ones (no padding); 0 if all are equal.

    Raises UnreadableError if a value is not finite.
    """
    if not np.isfinite(values).all():
        raise UnreadableError("pixels that are not finite")
    low, high = np.percentile(values if known is None or not known.any() else values[known], percentiles)
    if high <= low:
        return np.zeros_like(values)
    shade = values - low
    shade /= high - low  # in place: a large image takes 8 bytes per pixel
    return np.clip(shade, 0, 1, out=shade)


def _first(value: Any) -> float | None:
    """A number, or the first of several."""
    value = value if value is None or isinstance(value, int | float | str) else next(iter(value), None)
    return None if value is None or value == "" else float(value)


def _eight_bits(pixels: np.ndarray, bits: int = 0) -> np.ndarray:
    """The upper 8 of the bits in use."""
    return (pixels >> max((bits or 8 * pixels.dtype.itemsize) - 8, 0)).astype(np.uint8)


def _read(file: Any, **options: bool) -> Any:
    """The tags TAGS of a file, and no others."""
    pydicom = _pydicom()
    try:
        header = pydicom.dcmread(file, specific_tags=TAGS.split(), **options)
    except OSError as error:
        raise UnreadableError(error.strerror or "damaged DICOM") from None
    except Exception as error:
        raise UnreadableError(f"damaged DICOM ({type(error).__name__})") from None
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        raise UnreadableError("DICOM without an image")
    return header


def _decompressor(header: Any) -> str:
    """The packages that decompress the pixels, for error messages; "" if they are not compressed.

    Raises UnreadableError if no installed package can decompress them.
    """
    from pydicom.pixels import get_decoder

    uid = getattr(header.file_meta, "TransferSyntaxUID", None)
    if uid is None:
        raise UnreadableError("damaged DICOM (no transfer syntax)")
    if not uid.is_transfer_syntax:
        raise UnreadableError("DICOM with an unknown transfer syntax")
    if not uid.is_encapsulated:
        return ""
    name = _syntax(header)
    packages = next((package for word, package in PLUGINS.items() if word in name), "")
    try:
        available = get_decoder(uid).is_available
    except NotImplementedError:
        raise UnreadableError(f"DICOM compressed as {name}, which is not supported") from None
    if not available:
        raise UnreadableError(f"DICOM compressed as {name}, which needs: pip install {packages}")
    return packages


def _syntax(header: Any) -> str:
    return header.file_meta.TransferSyntaxUID.name


@functools.cache
def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError("DICOM files need pydicom: pip install 'ssl_jax[dicom]'") from None
    # Its warnings quote values of tags.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module=r"pydicom|ssl_jax\.data\.dicom")
    return pydicom
