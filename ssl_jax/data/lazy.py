"""The images of a source as a sequence that decodes what is asked for: for data sets larger than the memory."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ssl_jax.data.source import Source

T = TypeVar("T")


class LazyImages:
    """The N images of a source, to be read like an array uint8 [N, H, W, C]; nothing is kept.

    images[a:b] and images[indices] are arrays uint8 [n, H, W, C], images[i] is one image [H, W, C]. Threads decode
    (`config.data.workers`). If slices come in order, the next one is read ahead, so memory holds two of them. An image
    that cannot be decoded has a stand-in, as of `Source.load`; UserError if there are too many.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, source: "Source"):
        self.source, self.shape = source, (len(source), *source.shape)
        self._thread = ThreadPoolExecutor(1)
        self._end, self._ahead = 0, dict[range, Future[np.ndarray]]()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self.source.load(range(len(self))[int(rows)])
        if not isinstance(rows, slice):
            return self._read(np.arange(len(self))[np.asarray(rows)])
        wanted = range(len(self))[rows]
        images = self._ahead.pop(wanted, None) or self._submit(wanted)
        self._ahead.clear()
        following = range(len(self))[wanted.stop : wanted.stop + len(wanted)]
        if wanted.step == 1 and wanted.start == self._end and following:
            self._ahead[following] = self._submit(following)
        self._end = wanted.stop
        return images.result()

    def _submit(self, indices: Sequence[int] | np.ndarray) -> Future[np.ndarray]:
        return self._thread.submit(self._read, np.asarray(indices, np.int64))

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return self.source.load_many(indices) if len(indices) else np.zeros((0, *self.source.shape), np.uint8)

    def digest(self) -> str:
        """A hash of the images' names and shape: of their pixels it would take as long as decoding all of them."""
        return hashlib.sha256(json.dumps([list(self.source.names), self.source.shape]).encode()).hexdigest()


Images = np.ndarray | LazyImages  # uint8 [N, H, W, C]


def images_at(images: Images, rows: np.ndarray) -> Images:
    """The images at the indices `rows`, int [n]; those of LazyImages are decoded when they are needed."""
    if isinstance(images, LazyImages):
        return images if _is_all(rows, len(images)) else images.source.take(rows).all_images()
    return images if _is_all(rows, len(images)) else images[rows]


def _is_all(rows: np.ndarray, count: int) -> bool:
    return len(rows) == count and np.array_equal(rows, np.arange(count))


def ahead(fetch: Callable[[int], T], count: int) -> Iterator[T]:
    """fetch(0), fetch(1), ... fetch(count - 1), each called in a thread while the one before is used. What it raises is
    raised here."""
    with ThreadPoolExecutor(1) as thread:
        following = [thread.submit(fetch, step) for step in range(count)[:1]]
        for step in range(1, count + 1):
            made = following.pop().result()
            following += [thread.submit(fetch, step)] if step < count else []
            yield made
