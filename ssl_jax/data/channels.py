"""Where the channels of an image are: in its pixels, in the pages of a TIFF, or in several files, one channel each."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO

from PIL import Image, TiffImagePlugin

from ssl_jax.data.source import printable
from ssl_jax.errors import UnreadableError, UserError

DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Pillow's modes of more than 8 bits in one channel
GRAY = ("L", *DEEP)  # not "1": pages of black and white are those of a document
SUBFILE, BITS, SAMPLES = 254, 258, 277  # TIFF tags: NewSubfileType, BitsPerSample, SamplesPerPixel
SMALLER, MASK = 1, 4  # of NewSubfileType: a page that is a reduced copy, or a mask, of another one


def pages_of(image: Image.Image) -> list[int]:
    """The pages of a TIFF that are channels, if the first is gray: all but smaller copies and masks; [0] otherwise."""
    pages = [0]
    if image.format == "TIFF" and image.mode in GRAY:
        for number in range(1, getattr(image, "n_frames", 1)):
            image.seek(number)
            if not _tag(image, SUBFILE, 0) & (SMALLER | MASK):
                pages.append(number)
        image.seek(0)
    return pages


def count(image: Image.Image) -> int:
    """The number of channels of an opened image: its pages, or else the samples of a pixel; transparency is none."""
    if len(pages := pages_of(image)) > 1:
        return len(pages)
    if image.format == "TIFF" and image.mode == "RGB":
        return max(3, _tag(image, SAMPLES, 3))  # Pillow skips those after the third
    return 1 if image.mode in ("1", "L", "LA", *DEEP) else 3


def choose(image: Image.Image, channels: int, exact: bool = False) -> list[int]:
    """The pages to read for an image with this number of channels: one page for each of them, or only the first.

    Gray becomes RGB and RGB gray, and one channel is that of the first page; exact: not so. Raises UnreadableError if
    the image has another number of channels, if pages differ in size, or if one of them is not gray.
    """
    pages = [0] if channels == 1 and not exact else pages_of(image)
    if len(pages) > 1:
        if len(pages) != channels:
            raise UnreadableError(_other(f"{len(pages)} channels (pages)", channels, exact, len(pages)))
        _check_pages(image, pages)
        return pages
    if not exact and channels in (1, 3):
        return pages
    own, samples = 3 if image.mode in ("P", "PA") else len(image.getbands()), _tag(image, SAMPLES, 0)
    if samples > own and samples == channels:
        way = f", or read the first {own} with config.data.channels={own}" * (own == 3)
        raise UnreadableError(
            f"a TIFF of {samples} samples per pixel, of which Pillow reads {own}; save each channel as a page{way}"
        )
    if own != channels:
        own = max(own, samples)
        raise UnreadableError(_other(f"{own} channel{'s' * (own > 1)}", channels, exact))
    return pages


def _other(own: str, channels: int, exact: bool, pages: int = 0) -> str:
    if exact:
        return f"{own}; allowed: 1 in each file of config.data.bands"
    way = f"; config.data.channels={pages} reads every page, 1 the first" if pages and channels == 3 else ""
    return f"{own}; allowed: {channels} (config.data.channels){way}"


def _check_pages(image: Image.Image, pages: Sequence[int]) -> None:
    width, height = image.size
    for number in pages:
        image.seek(number)
        where = f"page {number + 1}"
        if image.size != (width, height):
            raise UnreadableError(f"{where} has {image.width} x {image.height} px; allowed: {width} x {height}")
        if image.mode not in GRAY:
            raise UnreadableError(f"{where} is {image.mode}; allowed: gray pages, one channel each")
    image.seek(0)


def _tag(image: Image.Image, number: int, default: int) -> int:
    return int(getattr(image, "tag_v2", {}).get(number, default))


def why_unknown(file: BinaryIO) -> str:
    """Why Pillow cannot open a file: it is no image, or a TIFF whose pixels have samples that Pillow does not know."""
    try:
        file.seek(0)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        samples, bits = int(tags[SAMPLES]), tags[BITS]
    except Exception:  # whatever other bytes make Pillow raise
        return "not an image"
    if samples < 2:
        return "not an image"
    return f"a TIFF of {samples} samples of {bits[0]} bits, which Pillow cannot read; save each channel as a page"


# Several files, of which each holds one channel (config.data.bands).


def split_band(stem: str, bands: Sequence[str]) -> str | None:
    """The name of the image whose file `stem` is, without its ending: the longest of `bands` that fits, or None."""
    fitting = [band for band in bands if stem.endswith(band)]
    return stem[: -len(max(fitting, key=len))] if fitting else None


def by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    """The files of one folder under their names without the kind."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(PurePath(path).stem, []).append(path)
    return found


def band_files(stems: Mapping[str, Sequence[str]], image: str, bands: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """(the file of each band of `image`, ""), or ((), which band is missing or has several files).

    stems: the files of the image's folder, as of `by_stem`.
    """
    files = [stems.get(image + band, ()) for band in bands]
    for band, found in zip(bands, files, strict=True):
        if not found:
            return (), f"no file of band {band!r}"
        if len(found) > 1:
            names = " and ".join(repr(printable(PurePath(path).name)) for path in sorted(found)[:2])
            return (), f"{len(found)} files of band {band!r}: {names}; allowed: one"
    return tuple(found[0] for found in files), ""


def grouped(
    root: Path, paths: Sequence[tuple[str, ...]], bands: Sequence[str]
) -> dict[tuple[str, ...], tuple[tuple[str, ...], str]]:
    """Each image that has a file with one of the endings, as a path without it, sorted, and what `band_files` says.

    paths: of files below root. An image whose files are called like the endings alone has the name of their folder.
    Raises UserError if no file has one of the endings.
    """
    number_of_bands(bands, 0)
    folders: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        folders.setdefault(path[:-1], []).append(str(root.joinpath(*path)))
    found = {}
    for folder, files in folders.items():
        stems = by_stem(files)
        for image in {name for stem in stems if (name := split_band(stem, bands)) is not None}:
            if path := (*folder, image) if image else folder:
                found[path] = band_files(stems, image, bands)
    if paths and not found:
        first = printable("/".join(paths[0]))
        raise UserError(f"config.data.bands={tuple(bands)!r}: no file ends so before its kind; the first is {first!r}")
    return dict(sorted(found.items()))


def number_of_bands(bands: Sequence[str], channels: int) -> int:
    """UserError unless bands are different endings, and as many as `channels` (0: any)."""
    if len(set(bands)) < len(bands) or "" in bands:
        raise UserError(f"config.data.bands={tuple(bands)!r}: allowed: endings of file names, each once")
    if channels not in (0, len(bands)):
        names = ", ".join(bands)
        raise UserError(f"config.data.channels={channels}: allowed: 0, or {len(bands)}, one for each band: {names}")
    return len(bands)


@contextlib.contextmanager
def naming(path: str, band: bool = True) -> Iterator[None]:
    """Says in which file of an image the error is; band=False: the image has one file."""
    try:
        yield
    except UnreadableError as error:
        if not band:
            raise
        raise UnreadableError(f"{printable(PurePath(path).name)!r}: {error}") from error


def check_ratios(sizes: Sequence[tuple[int, int]]) -> None:
    """UnreadableError if bands, of these widths and heights, show different areas. (0, 0): unknown.

    Their resolutions may differ. Sides are whole numbers of pixels, so ratios may miss each other by one.
    """
    width, height = sizes[0]
    for other_width, other_height in sizes[1:]:
        if abs(width * other_height - other_width * height) > width + height and other_width:
            raise UnreadableError(
                f"bands of {width} x {height} and {other_width} x {other_height} px; allowed: one ratio of sides"
            )
