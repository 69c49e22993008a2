"""Data of which only whole blocks of images can be read, such as the row groups of Parquet: an order, and a store.

Reading one image costs as much as reading its block. So the order of an epoch keeps the images of a block close
together, and the store keeps blocks in memory while they are needed.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
MARGIN = 1.5  # times `window`: images in the store; more than `window`, as batches are read ahead


class Blocks:
    """Consecutive blocks of images, and the order in which an epoch sees all images.

    sizes: int64 [n], images of each block. window: how many images wait to be mixed.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, window: int):
        self.sizes, self.window = np.asarray(sizes, np.int64), window
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.permutation = functools.lru_cache(maxsize=4)(self._permutation)

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        """Indices int64 [N] of all images. A pure function: nothing is stored, so an epoch may begin anywhere.

        The blocks are shuffled and laid end to end. Then each image is put off by a time that is drawn uniformly from
        [0, window): at any moment, the images that come next are drawn from about `window` of them, and blocks begin
        one after another rather than many at once. With a window as large as the data, blocks are still mixed.
        """
        # The modulus makes negative seeds possible; the 2 tells these numbers from those for images in random order.
        rng = np.random.Generator(np.random.PCG64([seed % 2**64, epoch, 2]))
        order = rng.permutation(len(self.sizes))
        sizes = self.sizes[order]
        ends = np.cumsum(sizes)
        images = np.repeat(self.starts[order] - (ends - sizes), sizes) + np.arange(ends[-1])
        indices = images[np.argsort(np.arange(len(images)) + rng.uniform(0, self.window, len(images)), kind="stable")]
        indices.flags.writeable = False  # callers get slices of the cached array
        return indices

    def take(self, kept: np.ndarray) -> "Blocks":
        """The blocks of only the images at `kept`: neighbours from one block stay a block."""
        blocks = np.searchsorted(self.starts, kept, side="right") - 1
        edges = np.flatnonzero(np.diff(blocks, prepend=-1, append=-1))
        return Blocks(np.diff(edges), self.window)


class Store(Generic[T]):
    """Blocks in memory; the one that came first goes first. A block that several threads want is read once.

    read: block -> its content. sizes: images of each block. room: images that are kept.
    """

    def __init__(self, read: Callable[[int], T], sizes: Sequence[int] | np.ndarray, room: float):
        self._read, self._sizes, self._room = read, np.asarray(sizes).tolist(), room
        self._held: dict[int, Future[T]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, block: int) -> T:
        with self._lock:
            future = self._held.get(block)
            if mine := future is None:
                future = self._held[block] = Future()
                held = sum(self._sizes[each] for each in self._held)
                while held > self._room and len(self._held) > 1:
                    oldest = next(iter(self._held))
                    del self._held[oldest]
                    held -= self._sizes[oldest]
        assert future is not None
        if mine:
            try:
                future.set_result(self._read(block))
            except BaseException as error:  # the other threads that wait for it get the error, too
                with self._lock:
                    self._held.pop(block, None)
                future.set_exception(error)
        return future.result()
