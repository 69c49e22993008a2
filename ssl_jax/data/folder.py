"""A folder of image files as a source, and how files and arrays of any source become uint8 [size, size, C].

Pillow decodes the files, except for DICOM, which pydicom decodes.
"""

import contextlib
import functools
import io
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from ssl_jax.config import Data
from ssl_jax.data import dicom
from ssl_jax.data.central import central, check_side
from ssl_jax.data.channels import DEEP, check_ratios, choose, count, grouped, naming, number_of_bands, why_unknown
from ssl_jax.data.exclude import wanted as chosen
from ssl_jax.data.layout import in_parts
from ssl_jax.data.source import (
    Source,
    check_bad_share,
    check_is_file,
    check_memory,
    open_file,
    printable,
    reading,
    same_object,
)
from ssl_jax.errors import UnreadableError, UserError

log = logging.getLogger("ssl_jax")
MAX_HEADERS = 10_000  # with more files than this, the first look only checks that they exist, and reads no headers
SIZE = 224  # side of images from files in px, unless data.size is set
FIRST = 8  # files that say how many channels images have, unless config.data.channels does
KINDS = "jpg, jpeg, jpe, jfif, png, bmp, gif, tif, tiff, webp, ppm, pgm, pbm, pnm, jp2, j2k, avif, dcm, dicom"
EXTENSIONS = frozenset(f".{kind}" for kind in KINDS.split(", "))
# Pillow tries only these formats, whatever the extension says, because others (EPS, PDF) start programs.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
# Bytes per pixel that decoding takes at its peak, measured: of a deep image; of one with transparency; of the decoders.
DEEP_BYTES, CLEAR_BYTES, DECODER_BYTES = 24, 12, {"JPEG2000": 16, "WEBP": 8, "AVIF": 8, "GIF": 4, "TIFF": 4}


def read(data: Data) -> Source:
    """The images below data.path, sorted by name. Hidden files and files that are not images are skipped.

    The top-level folders train/ and test/ (or val/, valid/) are parts of the data. Labels are the names of the
    top-level folders, or of those directly below the parts, if there are at least two and every image is in one.

    With data.bands, files of one folder that differ only in these endings are an image, which bears their common name.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; set it to a folder of images")
    if data.pairs not in ("", "folder"):
        raise UserError(f"config.data.pairs={data.pairs!r}: allowed with folder: folder (one object per folder)")
    if "://" in data.path:
        from ssl_jax.data.remote_folder import open_folder

        return open_folder(data)
    root = Path(data.path).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.path={data.path!r}: {'not a folder' if root.exists() else 'no such folder'}")
    paths = sorted(_image_paths(root))
    bands = grouped(root, paths, data.bands) if data.bands else {}
    paths = list(bands) or paths
    selected, classes = in_parts(paths, data)
    files = [
        File(str(root.joinpath(*path)), printable("/".join(path)), label, "", "/".join(path[:-1]), *bands.get(path, ()))
        for path, label in selected
    ]
    return from_files(files, classes, data, f"config.data.path={data.path!r}")


def _image_paths(root: Path) -> Iterator[tuple[str, ...]]:
    """The image files below root, as tuples of names. A folder that links lead to again is read once."""

    def fail(error: OSError) -> None:
        raise UserError(f"{printable(error.filename)!r}: {error.strerror}") from error

    seen = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parents = Path(folder).relative_to(root).parts
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield (*parents, name)


class File(NamedTuple):
    path: str  # not a Path: creating 200,000 of them takes a second
    name: str  # printable, as in Source.names
    label: str | None  # None: unknown
    at: str = ""  # where it is listed, for messages
    object: str = ""  # the object that it shows (config.data.pairs)
    bands: tuple[str, ...] = ()  # with config.data.bands, the files themselves, and `path` is what their names share
    problem: str = ""  # why they cannot be read: one is missing

    @property
    def files(self) -> tuple[str, ...]:
        return self.bands or (self.path,)


def from_files(
    files: Sequence[File],
    classes: Sequence[str],
    data: Data,
    where: str,
    *,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Source:
    """A source of these files, except those that a first look finds unreadable. data.limit counts files.

    labels: float32 [N, K], for multi-label data, instead of the files' labels. groups: int64 [N], as in Source.
    """
    files = files[: data.limit or None]
    if not files:
        raise UserError(f"{where}: no images; allowed: {KINDS}")
    check_background(data.background)
    wanted = chosen(data, [file.name for file in files], [file.path for file in files])
    shape = (data.size or SIZE, data.size or SIZE, channels_of([files[i] for i in wanted], data))
    check_side(data, shape[0])
    look = functools.partial(_check_file, size=shape[0], channels=shape[2], exact=bool(data.bands))
    problems = dict(zip(wanted, _first_look([files[i] for i in wanted], data.workers, look), strict=True))
    bad = {i: problem for i, problem in problems.items() if problem}
    skipped = [f"{files[i].name!r}{files[i].at}: {problem}" for i, problem in bad.items()]
    check_bad_share(skipped, len(wanted), data.max_bad_share)
    for problem in skipped:
        log.warning("%s; skipped", problem)
    kept, unreadable = [i for i in wanted if i not in bad], {files[i].name: (files[i].path, bad[i]) for i in bad}
    files = [files[i] for i in kept]

    def read(index: int) -> np.ndarray:
        with reading(files[index].path):
            return read_image(files[index].files, shape[0], shape[2], data)

    load: Callable[[int], np.ndarray] = read
    if data.cache:
        from ssl_jax.data.cache import cached

        load = cached([file.files for file in files], read, shape, data)
    if labels is not None:
        labels = labels[kept]
    elif classes:
        numbers = {name: i for i, name in enumerate(classes)}
        labels = np.array([numbers.get(file.label or "", -1) for file in files], np.int32)
    return Source(
        [file.name for file in files],
        shape,
        load,
        labels=labels,
        classes=classes,
        groups=None if groups is None else groups[kept],
        objects=same_object([file.object for file in files], where, data.pairs) if data.pairs else None,
        paths=[file.path for file in files],
        files=[file.files for file in files] if data.bands else (),
        unreadable=unreadable,
        skipped=skipped,
        max_bad_share=data.max_bad_share,
        workers=data.workers,
        content=lambda index: files[index].bands or files[index].path,
    )


def channels_of(files: Sequence[File], data: Data) -> int:
    """data.channels, or the number of data.bands; if neither is set, what most of the first files have, 3 for gray."""
    if data.bands:
        return number_of_bands(data.bands, data.channels)
    if data.channels:
        return data.channels
    found = list[int]()
    for file in files[:FIRST]:
        with contextlib.suppress(Exception), open_file(file.path) as content:  # `check` says what is wrong
            found += own_channels(content)
    return most_common(found)


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


def _check_file(file: File, size: int, channels: int, exact: bool) -> None:
    sizes = []
    for path in file.files:
        with naming(path, exact):
            sizes.append(check(path, size, 1 if exact else channels, exact))
    check_ratios(sizes)


def _first_look(files: Sequence[File], workers: int, look: Callable[[File], None]) -> list[str]:
    """For each file, the reason why it cannot be read, or "" if nothing is wrong so far. look: reads its header."""
    few = len(files) <= MAX_HEADERS

    def problem(file: File) -> str:
        if file.problem:
            return file.problem
        try:
            if few:
                look(file)
            else:
                for path in file.files:
                    check_is_file(path)
        except UnreadableError as error:
            return str(error)
        return ""

    def problems_in(chunk: Sequence[File]) -> list[str]:
        return [problem(file) for file in chunk]

    first, *rest = [files[i : i + 256] for i in range(0, len(files), 256)]
    start = time.perf_counter()
    problems = problems_in(first)
    # Many threads help on a network drive. On a local disk, 200,000 files take 1.9 s with eight threads, 0.7 with two.
    fast = time.perf_counter() - start < 1e-4 * len(first)
    with ThreadPoolExecutor(2 if fast else max(8, workers)) as pool:
        for chunk_problems in pool.map(problems_in, rest):
            problems += chunk_problems
    return problems


def from_array(
    images: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str],
    data: Data,
    where: str,
    objects: np.ndarray | None = None,
) -> Source:
    """A source of images uint8 [N,H,W] or [N,H,W,C] in memory. data.limit, data.size and data.channels are applied."""
    images = images[..., None] if images.ndim == 3 else images
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{where}: {len(labels)} labels for {len(images)} images; allowed: one each")
    images, labels = images[: data.limit or None], None if labels is None else labels[: data.limit or None]
    if not len(images):
        raise UserError(f"{where}: no images")
    _, height, width, channels = images.shape
    new_channels = data.channels or channels
    if new_channels != channels and {new_channels, channels} != {1, 3}:
        raise UserError(f"config.data.channels={data.channels}: {where} has {channels}; allowed: 0 or {channels}")
    shape = (data.size or height, data.size or width, new_channels)
    check_side(data, data.size)
    unchanged = shape == images.shape[1:] and not data.test_side

    def load(index: int) -> np.ndarray:
        if unchanged:
            return images[index]
        return convert(images[index], data.size, new_channels, data.test_side)

    return Source(
        [str(i) for i in range(len(images))],
        shape,
        load,
        labels=None if labels is None else labels.astype(np.float32 if labels.ndim == 2 else np.int32),
        classes=classes,
        objects=None if objects is None else same_object(objects[: data.limit or None], where, data.pairs),
        array=images if unchanged else None,
        workers=data.workers,
        content=images.__getitem__,
    )


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
