"""Arrays in a .npz file: images and labels, in one part or in train, val and test parts."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.source import Source, from_array, log, pick_parts
from ssl_jax.errors import UserError, unknown

PARTS = ("train", "val", "test")
ALLOWED = "images [labels], train_images [train_labels, val_..., test_...] or x_train [y_train, x_val ..., x_test ...]"


def read(data: Data) -> Source:
    """data.path: keys images and labels (or x and y), or for each part train_images and train_labels, as MedMNIST has
    them, or x_train and y_train, as Keras has them. Images are uint8 [N,H,W] or [N,H,W,C], labels integers [N] or
    [N,1], -1 for one that is not known; labels [N,L] with L > 1 (multi-label) are passed over."""
    if not data.path:
        raise UserError("config.data.path='': missing; allowed: a .npz file of images")
    where = f"config.data.path={data.path!r}"
    try:
        with np.load(Path(data.path).expanduser(), allow_pickle=False) as file:
            keys = _keys(file.files, where)
            chosen = pick_parts(keys, data.split, where)
            images = [file[image] for image, _ in chosen]
            labels = [_labels(file[label], f"{where}: {label}") if label else None for _, label in chosen]
            objects = _objects(file, data.pairs)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a .npz file of plain arrays"
        raise UserError(f"{where}: {reason}") from error
    for (name, label), array, numbers in zip(chosen, images, labels, strict=True):
        kind = f"{where}: {name} is {array.dtype} {list(array.shape)}"
        if array.dtype != np.uint8 or array.ndim not in (3, 4):
            raise UserError(f"{kind}; allowed: uint8 [N,H,W] or [N,H,W,C]")
        if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] > 4:
            raise UserError(f"{kind}, channels first; allowed: [N,H,W,C]")
        if array.shape[1:] != images[0].shape[1:]:
            raise UserError(f"{kind}; allowed: {list(images[0].shape[1:])} as in {chosen[0][0]}")
        if numbers is not None and len(numbers) != len(array):
            raise UserError(f"{where}: {len(numbers)} {label} for {len(array)} {name}; allowed: one each")
    if objects is not None and objects.shape != (sum(map(len, images)),):
        raise UserError(f"config.data.pairs={data.pairs!r}: shape {objects.shape}; allowed: one for each image")
    known = [numbers for numbers in labels if numbers is not None]
    joined = np.concatenate(known) if len(known) == len(labels) else None
    classes = [] if joined is None else [str(i) for i in range(1 + int(joined.max(initial=-1)))]
    return from_array(np.concatenate(images), joined, classes, data, where, objects)


def _keys(found: list[str], where: str) -> dict[str, tuple[str, str | None]]:
    """The names of images and labels of each part."""

    def pair(images: str, labels: str) -> tuple[str, str | None]:
        return images, labels if labels in found else None

    for images, labels in (("images", "labels"), ("x", "y")):
        if images in found:
            return {"train": pair(images, labels)}
    for images, labels in (("{}_images", "{}_labels"), ("x_{}", "y_{}")):
        parts = {p: pair(images.format(p), labels.format(p)) for p in PARTS if images.format(p) in found}
        if parts:
            return parts
    raise UserError(f"{where}: keys are {', '.join(sorted(found)) or 'none'}; allowed: {ALLOWED}")


def _objects(file: Any, key: str) -> np.ndarray | None:
    if key and key not in file.files:
        raise unknown("config.data.pairs", key, file.files)
    return file[key] if key else None


def _labels(labels: np.ndarray, where: str) -> np.ndarray | None:
    if labels.ndim == 2 and labels.shape[1] > 1:
        log.warning("%s are %s, several for an image: passed over", where, list(labels.shape))
        return None
    labels = labels.reshape(len(labels), -1)[:, 0] if labels.ndim == 2 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iub" or (labels.size and labels.astype(np.int64).min() < -1):
        raise UserError(
            f"{where}: {labels.dtype} {list(labels.shape)}; allowed: integers [N] or [N,1], -1 (not known) or more"
        )
    return labels.astype(np.int64)
