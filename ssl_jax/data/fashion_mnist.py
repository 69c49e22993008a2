"""Fashion-MNIST (Xiao et al., https://arxiv.org/abs/1708.07747): 70,000 pictures of clothes, 28 px, 10 classes."""

import dataclasses
import gzip
import zlib
from pathlib import Path

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.arrays import from_array
from ssl_jax.data.source import Source, pick_parts
from ssl_jax.errors import UserError

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FOLDERS = ("/usr/share/datasets/fashion-mnist", "~/.cache/ssl_jax/fashion-mnist")
FILES = {"train": "train", "test": "t10k"}


def read(data: Data) -> Source:
    """Reads the original IDX files in data.path or, if it is empty, in the folder of Debian's package or in
    ~/.cache/ssl_jax; if they are in neither, a prepared TFDS data set."""
    prefixes = pick_parts(FILES, data.split, "fashion_mnist")
    folders = (Path(folder).expanduser() for folder in ([data.path] if data.path else FOLDERS))
    folder = next((folder for folder in folders if _file(folder, "train-images-idx3-ubyte")), None)
    if folder is None:
        if data.path:
            raise UserError(f"config.data.path={data.path!r}: contains no train-images-idx3-ubyte.gz")
        return _from_tfds(data)
    images = [_read_idx(folder, f"{prefix}-images-idx3-ubyte", 3) for prefix in prefixes]
    labels = [_read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1) for prefix in prefixes]
    return from_array(np.concatenate(images), np.concatenate(labels), CLASSES, data, f"fashion_mnist in {folder}")


def _from_tfds(data: Data) -> Source:
    from ssl_jax.data import tfds

    try:
        source = tfds.read(dataclasses.replace(data, name="tfds", path="fashion_mnist"))
    except UserError as error:
        raise UserError(
            f"fashion_mnist: neither in {' or '.join(FOLDERS)} nor prepared by TFDS; run sudo apt-get install "
            f"dataset-fashion-mnist, put the four .gz files into {FOLDERS[-1]}, or run {tfds.command('fashion_mnist')}"
        ) from error
    source.classes = list(CLASSES)
    return source


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Reads an IDX file: two zeros, type 8 (bytes), number of dimensions, each length in 4 big-endian bytes, data."""
    path = _file(folder, name)
    if path is None:
        raise UserError(f"{folder / name}.gz: no such file")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or unreadable ({error})") from error
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != shape.prod():
        raise UserError(f"{path}: not an IDX file of bytes with {dimensions} dimensions, or it is cut off")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
