"""Embeddings of more images than memory holds: in a file without a name, which ends with the process."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.data.source import Images
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UserError

AT_A_TIME = 64 * 10**6  # bytes of images that are decoded at a time


class StoredFeatures:
    """Embeddings float32 [N, D] in a file. features[a:b] and features[indices] are arrays.

    The file is mapped for each access alone: what stays mapped counts as memory of this process.
    """

    dtype, ndim = np.dtype(np.float32), 2

    def __init__(self, folder: Path, shape: tuple[int, int]):
        """Raises UserError if the file cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.shape = shape
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when nobody reads it any more
        except OSError as error:
            raise UserError(f"{folder}: embeddings not written ({error.strerror})") from error

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.array(np.memmap(self._file, self.dtype, "r", shape=self.shape)[rows])

    def append(self, part: np.ndarray) -> None:
        """The next rows. Raises UserError if the disk is full."""
        try:
            self._file.write(np.ascontiguousarray(part, self.dtype))
            self._file.flush()
        except OSError as error:
            size = np.prod(self.shape) * self.dtype.itemsize / 1e9
            raise UserError(f"embeddings of {size:.1f} GB: not written ({error.strerror})") from error


def embeddings(encoder: Encoder, images: Images, memory_gb: float, folder: Path) -> np.ndarray | StoredFeatures:
    """Embeddings float32 [N, D]: in memory, or if they take more than memory_gb in a file in `folder`."""
    shape = len(images), encoder.width
    if 4 * shape[0] * shape[1] <= memory_gb * 1e9:
        return encoder.embed(images)
    stored = StoredFeatures(folder, shape)
    size = max(1, AT_A_TIME // int(np.prod(images.shape[1:])))
    for start in range(0, len(images), size):
        part = images[start : start + size]
        stored.append(encoder.embed(part, fixed=True))
    return stored
