"""Images that are decoded when they are asked for: arrays and lazy sequences behind one way of reading.

A lazy sequence has `shape` (N, H, W, C), and images[rows] decodes those at an array of indices: uint8 [n, H, W, C].
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ssl_jax.data.images import as_pixels

T = TypeVar("T")
PIECE = 1_024  # images that are decoded at a time


def is_lazy(images: Any) -> bool:
    """Whether these are images to ask for, and no array nor anything that becomes one."""
    return not isinstance(images, np.ndarray | list | tuple) and not hasattr(images, "__array__")


def opened(images: Any) -> Any:
    """An array of pixels, as `as_pixels` checks it, or the lazy sequence as it is."""
    return images if is_lazy(images) else as_pixels(np.asarray(images), "images")


def by_piece(function: Callable[[np.ndarray], np.ndarray], images: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """function(images[rows]), of a lazy sequence for PIECE images at a time; rows: None: all."""
    if not is_lazy(images):
        return function(images if rows is None else images[rows])
    rows = np.arange(len(images)) if rows is None else rows
    return np.concatenate([function(images[rows[i : i + PIECE]]) for i in range(0, max(1, len(rows)), PIECE)])


def ahead(fetch: Callable[[int], T], count: int) -> Iterator[T]:
    """fetch(0), fetch(1), ... fetch(count - 1), each called in a thread while the one before is used. What it raises is
    raised here."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(fetch, 0) if count else None
        for step in range(1, count + 1):
            assert following is not None
            made = following.result()
            following = thread.submit(fetch, step) if step < count else None
            yield made
