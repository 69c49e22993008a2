"""Arrays in a .npz file: images and labels, in one part or in train, val and test parts."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.arrays import from_array
from ssl_jax.data.source import Source, pick_parts, require_file
from ssl_jax.errors import UserError, first_line, unknown

PARTS = ("train", "val", "test")
MAX_CLASSES = 100_000  # labels number the classes from 0, so a larger one is hardly the number of a class
ALLOWED = "images [labels], train_images [train_labels, val_..., test_...] or x_train [y_train, x_val ..., x_test ...]"


def read(data: Data) -> Source:
    """The arrays in the file data.path.

    Keys are images and labels (or x and y), or for each part train_images and train_labels, as in MedMNIST, or x_train
    and y_train, as in Keras. Images are uint8 [N,H,W] or [N,H,W,C]. Labels are integers [N] or [N,1]. For multi-label
    data they are [N,L] with L > 1, each 0 or 1. -1 means unknown.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; set it to a .npz file of images")
    where = f"config.data.path={data.path!r}"
    path = Path(data.path).expanduser()
    require_file(path, where)
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = _keys(file.files, where)
            selected = pick_parts(keys, data.split, where)
            images = [_array(file, image, where) for image, _ in selected]
            labels = [
                _labels(_array(file, label, where), f"{where}: {label}") if label else None for _, label in selected
            ]
            objects = _objects(file, data.pairs, where)
    except MemoryError as error:
        raise UserError(f"{where}: its arrays do not fit in memory") from error
    except (NotImplementedError, RuntimeError) as error:  # encrypted, or compressed in a way that Python lacks
        raise UserError(f"{where}: {first_line(error)}; allowed: a .npz file as numpy writes it") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a .npz file of plain arrays"
        raise UserError(f"{where}: {reason}") from error
    for (name, label), array, numbers in zip(selected, images, labels, strict=True):
        problem = f"{where}: {name} is {array.dtype} {list(array.shape)}"
        if array.dtype != np.uint8 or array.ndim not in (3, 4):
            raise UserError(f"{problem}; allowed: uint8 [N,H,W] or [N,H,W,C]")
        if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] > 4:
            raise UserError(f"{problem}, channels first; allowed: [N,H,W,C]")
        if array.shape[1:] != images[0].shape[1:]:
            raise UserError(f"{problem}; allowed: {list(images[0].shape[1:])} as in {selected[0][0]}")
        if numbers is not None and len(numbers) != len(array):
            raise UserError(f"{where}: {len(numbers)} {label} for {len(array)} {name}; allowed: one each")
    if objects is not None and objects.shape != (sum(map(len, images)),):
        raise UserError(f"config.data.pairs={data.pairs!r}: shape {objects.shape}; allowed: one number per image")
    known = [numbers for numbers in labels if numbers is not None]
    if len({numbers.shape[1:] for numbers in known}) > 1:
        shapes = ", ".join(str(list(numbers.shape)) for numbers in known)
        raise UserError(f"{where}: labels are {shapes}; allowed: the same number of labels per image in every part")
    joined = np.concatenate(known) if len(known) == len(labels) else None
    classes = [] if joined is None else _classes(joined)
    return from_array(np.concatenate(images), joined, classes, data, where, objects)


def _classes(labels: np.ndarray) -> list[str]:
    return [str(i) for i in range(labels.shape[1] if labels.ndim == 2 else 1 + int(labels.max(initial=-1)))]


def _keys(names: list[str], where: str) -> dict[str, tuple[str, str | None]]:
    """For each part, the keys of its images and labels."""

    def pair(images: str, labels: str) -> tuple[str, str | None]:
        return images, labels if labels in names else None

    for images, labels in (("images", "labels"), ("x", "y")):
        if images in names:
            return {"train": pair(images, labels)}
    for images, labels in (("{}_images", "{}_labels"), ("x_{}", "y_{}")):
        parts = {p: pair(images.format(p), labels.format(p)) for p in PARTS if images.format(p) in names}
        if parts:
            return parts
    raise UserError(f"{where}: keys are {', '.join(sorted(names)) or 'none'}; allowed: {ALLOWED}")


def _array(file: Any, key: str, where: str) -> np.ndarray:
    """An array of the archive. UserError if its header promises more or less than its bytes hold.

    numpy would allocate what a damaged header promises before it reads.
    """
    member = next(name for name in (f"{key}.npy", key) if name in file.zip.namelist())
    with file.zip.open(member) as content:
        first = np.lib.format.read_magic(content) == (1, 0)
        header = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(content)
        shape, _, dtype = header
        held = file.zip.getinfo(member).file_size - content.tell()
    needed = math.prod(shape) * dtype.itemsize  # of Python's integers, which do not overflow
    if min(shape, default=0) < 0 or needed != held and not dtype.hasobject:
        raise UserError(
            f"{where}: {key} is {dtype} {list(shape)}, but the file holds {held} bytes of it; it is damaged"
        )
    return file[key]


def _objects(file: Any, key: str, where: str) -> np.ndarray | None:
    if key and key not in file.files:
        raise unknown("config.data.pairs", key, file.files)
    return _array(file, key, where) if key else None


def _labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int64 [N], or as float32 [N,L] with NaN where unknown if an image has several."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    several = labels.ndim == 2
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "iub":
        raise UserError(f"{where}: {labels.dtype} {list(labels.shape)}; allowed: integers [N], [N,1] or [N,L]")
    if labels.size and labels.max() >= MAX_CLASSES:  # before a conversion to 64 bits, in which it may become negative
        raise UserError(f"{where}: {labels.max()}; allowed: numbers of classes, from 0 to {MAX_CLASSES - 1}, or -1")
    labels = labels.astype(np.int64)
    invalid = np.flatnonzero((labels < -1) | (several & (labels > 1)))
    if len(invalid):
        allowed = "0, 1 or -1 (unknown)" if several else "-1 (unknown) or more"
        raise UserError(
            f"{where}: {labels.flat[invalid[0]]} for image {invalid[0] // labels[0].size}; allowed: {allowed}"
        )
    return np.where(labels < 0, np.nan, labels).astype(np.float32) if several else labels
