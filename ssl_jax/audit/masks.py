"""Where the lesions of an image are: masks or boxes, cropped and resized like the image."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data import Source
from ssl_jax.data.csv import paths_of
from ssl_jax.data.source import open_file, printable
from ssl_jax.data.table import read_table
from ssl_jax.errors import UnreadableError, UserError, visible

LESION = "lesion"  # the class of a mask or box that names none
CORNERS = ("left", "top", "right", "bottom")  # columns of a box, beside the image; "class" may follow
Masks = Callable[[int], dict[str, np.ndarray]]  # index of an image -> class -> float32 [H, W] in [0, 1]


class Lesion(NamedTuple):
    """One visible lesion class of one image: its index in the source, the class, float32 [H, W] in [0, 1]."""

    image: int
    name: str
    mask: np.ndarray


def open_masks(where: str, source: Source, data: Data) -> Masks:
    """A function from the index of an image of `source` (opened from `data`) to its masks, {} if it has none.

    where: a folder with `<image path without extension>/<Class>.png`, or `<image path without extension>.png` for a
        lesion without a class, of the image's size and black where there is nothing; or a table (.csv, .tsv) of boxes
        with the columns path, left, top, right, bottom (px of the image file; right and bottom lie just outside) and,
        optionally, class. The column path may have another name, as in a table of images (`csv.paths_of`). Paths are
        those of `source.names`.

    Raises UserError for a table with a bad line, and later for a mask that has not the shape of its image.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        return lambda index: _from_folder(path, source, index, data)
    if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
        problem = "unknown file type" if path.is_file() else "not found"
        raise UserError(f"--masks={where}: {problem}; allowed: a folder of masks, or a .csv or .tsv file of boxes")
    boxes = _read_boxes(path, where, data.image_column)
    if not boxes.keys() & {*source.names}:
        raise UserError(
            f"--masks={where}: no path is that of an image, such as {next(iter(boxes), 'empty')!r}; "
            f"allowed: paths such as {source.names[0]!r}"
        )
    return lambda index: _from_boxes(boxes, source, index, data)


def find_lesions(source: Source, masks: Masks, images: int, seed: int) -> tuple[list[Lesion], int]:
    """(lesions of `images` random images with masks; how many others lie outside the square that is cut from an image).

    Raises UserError if no image has a mask.
    """
    lesions, outside, seen = list[Lesion](), 0, 0
    for index in map(int, np.random.default_rng(seed).permutation(len(source))):
        try:
            masks_of_image = masks(index)
        except UnreadableError:  # the image, whose size the masks need
            source.load(index)  # says so
            continue
        if not masks_of_image:
            continue
        source.load(index)
        if index in source.replaced:  # unreadable, and its stand-in has other lesions
            continue
        seen += 1
        inside = [Lesion(index, name, mask) for name, mask in sorted(masks_of_image.items()) if mask.max() > 0.5]
        lesions += inside
        outside += len(masks_of_image) - len(inside)
        if seen == images:
            break
    if not lesions:
        raise UserError(
            f"--masks: no lesion for any of {len(source)} images; for {source.names[0]!r}, the mask would be "
            f"{Path(source.names[0]).with_suffix('')}/<Class>.png"
        )
    return lesions, outside


def _from_folder(root: Path, source: Source, index: int, data: Data) -> dict[str, np.ndarray]:
    name = _below(source.names[index], data)
    files: dict[str, Path] = {}
    for place in dict.fromkeys((root / name.with_suffix(""), root / name)):
        if place.is_dir():
            files = {file.stem: file for file in sorted(place.iterdir()) if file.suffix.lower() == ".png"}
        single = place.with_name(f"{place.name}.png")
        if not files and single.is_file():
            files = {LESION: single}
        if files:
            break
    size, masks = None, {}
    for lesion, file in files.items():
        try:
            values = _decode(file)
        except (OSError, UnreadableError) as error:
            raise UserError(f"{printable(file)!r}: cannot be read as a mask ({error})") from error
        size = size or full_size(source, index, data) or values.shape
        if abs(values.shape[0] * size[1] - values.shape[1] * size[0]) > max(size) + max(values.shape):
            shapes = f"{values.shape[1]} x {values.shape[0]} px, but the image has {size[1]} x {size[0]}"
            raise UserError(f"{file}: {shapes}; allowed: the image's size")
        masks[visible(printable(lesion))] = as_read(values > values.max() / 2, source.shape, str(file), data.test_side)
    return masks


def _from_boxes(boxes: dict[str, list], source: Source, index: int, data: Data) -> dict[str, np.ndarray]:
    boxes_of_image = boxes.get(source.names[index])
    if not boxes_of_image:
        return {}
    size = full_size(source, index, data)
    if size is None and data.size:
        raise UserError(f"config.data.size={data.size}: boxes are in px of the original images; allowed: 0")
    height, width = size or source.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    masks: dict[str, np.ndarray] = {}
    for name, left, top, right, bottom in boxes_of_image:
        box = (x > left) & (x < right) & (y > top) & (y < bottom)
        masks[name] = masks.get(name, False) | box
    name_of_image = source.names[index]
    return {name: as_read(mask, source.shape, name_of_image, data.test_side) for name, mask in masks.items()}


def as_read(mask: np.ndarray, shape: tuple[int, ...], where: str, side: int = 0) -> np.ndarray:
    """A mask bool [H, W] of a whole image, cropped and resized as the image is when it is read: float32 [H, W].

    side: config.data.test_side
    """
    from ssl_jax.data.decoding import convert

    height, width = shape[:2]
    if mask.shape != (height, width) or side:
        if height != width:
            raise UserError(f"{where}: a mask of {mask.shape[1]} x {mask.shape[0]} px; allowed: {width} x {height}")
        mask = convert(255 * mask[..., None].astype(np.uint8), height, 1, side)[..., 0] / 255
    return mask.astype(np.float32)


def full_size(source: Source, index: int, data: Data) -> tuple[int, int] | None:
    """(height, width) of the image file, before cropping and resizing; None if the data are not files.

    Raises UnreadableError if it cannot be decoded.
    """
    folder = Path(data.path).expanduser()
    for root in (folder, folder.parent):
        file = root / source.names[index]
        if data.path and file.is_file():
            height, width = _decode(file).shape
            return height, width
    return None


def _decode(file: Path) -> np.ndarray:
    """A whole image in gray, uint8 [H, W]. Raises UnreadableError, or OSError."""
    from ssl_jax.data.decoding import decode

    with open_file(file) as content:
        return decode(content.read(), 0, 1)[..., 0]


def _below(name: str, data: Data) -> Path:
    """The path of an image relative to the folder of the data; an absolute path elsewhere loses its root."""
    path, folder = Path(name), Path(data.path).expanduser().absolute()
    if not path.is_absolute():
        return path
    for root in (folder, folder.parent):
        if path.is_relative_to(root):
            return path.relative_to(root)
    return path.relative_to(path.anchor)


def _read_boxes(path: Path, where: str, column: str) -> dict[str, list[tuple[str, float, float, float, float]]]:
    """Image path -> (class, left, top, right, bottom) of its boxes. column: data.image_column."""
    table = read_table(path, f"--masks={where}")
    missing = [name for name in CORNERS if table.find(name) is None]
    if missing:
        needed = f"needed: {', '.join(CORNERS)} and the path of the image; optional: class"
        raise UserError(f"--masks={where}: no column {missing[0]!r}; {needed}")
    images = paths_of(table, column if column and table.find(column) else "")
    corners = [table.column(table.find(name) or name) for name in CORNERS]
    kind = table.find("class")
    names = table.column(kind) if kind else [""] * len(images)
    boxes: dict[str, list[tuple[str, float, float, float, float]]] = {}
    for number, (image, name, *box) in enumerate(zip(images, names, *corners, strict=True)):
        try:
            left, top, right, bottom = map(float, box)
        except ValueError as error:
            raise table.fail(number, f"{error}; allowed: numbers, px") from error
        if not (left < right and top < bottom):
            shown = f"left={left:g} top={top:g} right={right:g} bottom={bottom:g}"
            raise table.fail(number, f"{shown}; allowed: left < right, top < bottom")
        boxes.setdefault(image, []).append((visible(name) or LESION, left, top, right, bottom))
    return boxes
