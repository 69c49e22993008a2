"""What every reader returns: images by index, with one rule for files that turn out to be unreadable."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from ssl_jax.config import Data
from ssl_jax.errors import NoPartError, UnreadableError, UserError, unknown

log = logging.getLogger("ssl_jax")
T = TypeVar("T")


class Source:
    """N images of one shape, decoded when asked for; safe to use from several threads.

    names:    file names relative to the root (or the index, as text), printable
    labels:   int32 [N], -1 where it is not known; several an image (multilabel): float32 [N, K] in [0, 1], NaN where
              not known; None without any
    classes:  name of each label, [] without labels
    groups:   int64 [N], equal for images of one patient (or of another group that must not be split); None without
    objects:  int [N], equal for images of the same object (config.data.pairs); None where nothing says so
    shape:    (H, W, C) of every image
    skipped:  names of the files that could not be read, with the reason: those left out when the source was opened,
              and those found since
    replaced: index -> index of the image that stands in for it

    An image that can't be decoded is replaced by the next readable one (of the same label, where there are labels; of
    several an image, the one that differs in the fewest): a function of the files alone, so that every order of reading
    gives the same images. If more than `max_bad_share` of all files are unreadable, UserError.
    """

    def __init__(
        self,
        names: Sequence[str],
        shape: tuple[int, int, int],
        load: Callable[[int], np.ndarray],
        *,
        labels: np.ndarray | Callable[[], np.ndarray | None] | None = None,
        classes: Sequence[str] = (),
        objects: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        array: np.ndarray | None = None,
        skipped: Sequence[str] = (),
        max_bad_share: float = 0.0,
        workers: int = 2,
    ):
        """load: index -> uint8 [H,W,C], or raises UnreadableError. labels: a function is called when they are first
        needed. array: the images themselves, where they are in memory already."""
        self.names, self.shape, self.classes, self.objects = list(names), shape, list(classes), objects
        self.groups = groups
        self.replaced: dict[int, int] = {}
        self._load, self._labels, self._array = load, labels, array
        self._skipped, self._bad = list(skipped), dict[int, str]()
        self._max_bad_share, self._workers = max_bad_share, workers
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Memory that `arrays()` takes, bytes."""
        return len(self) * int(np.prod(self.shape))

    @property
    def labels(self) -> np.ndarray | None:
        if callable(self._labels):
            self._labels = self._labels()
        return self._labels

    def forget_labels(self) -> None:
        """For those who only look: any image may then stand in for one that is damaged."""
        self._labels = None

    @property
    def multilabel(self) -> bool:
        return self.labels is not None and self.labels.ndim == 2

    def labels_as(self, classes: Sequence[str], where: str) -> np.ndarray:
        """The labels as numbers of `classes`, int32 [N], -1 where not known; of several labels an image the columns of
        `classes`, float32 [N, K], NaN where not known. UserError without labels, or if a class is not among them."""
        if self.labels is None:
            raise UserError(
                f"{where}: has no labels; allowed: data with class folders, a label column or a labels array"
            )
        strange = [name for name in self.classes if name not in classes]
        if strange:
            raise unknown(f"{where}: class", strange[0], classes)
        numbers = np.array([list(classes).index(name) for name in self.classes], np.int32)
        if self.multilabel:
            columns = np.full((len(self), len(classes)), np.nan, np.float32)
            columns[:, numbers] = self.labels
            return columns
        return np.where(self.labels >= 0, numbers[self.labels], -1)

    @property
    def skipped(self) -> list[str]:
        return self._skipped + [self._bad[i] for i in sorted(self._bad)]

    def load(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [H,W,C], or the one that stands in for it. UserError if too many are unreadable."""
        for candidate in self._candidates(index):
            if candidate in self._bad:
                continue
            try:
                image = self._load(candidate)
            except UnreadableError as error:
                self._add_bad(candidate, str(error))
                continue
            if candidate != index:
                self.replaced[index] = candidate
            return image
        raise UserError(f"{self.names[index]!r}: unreadable, and no other image of its label to stand in for it")

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        others = np.roll(np.arange(len(self)), -index)[1:]
        if self.labels is not None:
            kinds = self.labels if self.labels.ndim == 1 else np.where(np.isnan(self.labels), -1, self.labels >= 0.5)
            differing = (kinds[others] != kinds[index]).reshape(len(others), -1).sum(axis=1)
            # Few images agree in fourteen labels: those of the fewest differences come first.
            others = others[differing == 0] if kinds.ndim == 1 else others[np.argsort(differing, kind="stable")]
        yield from map(int, others)

    def _add_bad(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = f"{self.names[index]!r}: {reason}"
            log.warning("%s; another image stands in for it", self._bad[index])
            check_bad_share(self.skipped, len(self) + len(self._skipped), self._max_bad_share)

    def arrays(self, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """All images, uint8 [N,H,W,C], decoded by threads. progress(done, total) is called from this thread."""
        if self._array is None:
            images = np.empty((len(self), *self.shape), np.uint8)

            def fill(chunk: range) -> int:
                for i in chunk:
                    images[i] = self.load(i)
                return chunk.stop

            chunks = [range(i, min(i + 64, len(self))) for i in range(0, len(self), 64)]
            with ThreadPoolExecutor(self._workers) as pool:
                for done in pool.map(fill, chunks):
                    if progress:
                        progress(done, len(self))
            self._array = images
        return self._array

    def take(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """The source of these images alone, in this order; stand-ins come from among them."""
        chosen = [int(i) for i in indices]

        def labels() -> np.ndarray | None:
            return None if self.labels is None else self.labels[chosen]

        return Source(
            [self.names[i] for i in chosen],
            self.shape,
            lambda i: self._load(chosen[i]),
            labels=labels,
            classes=self.classes,
            objects=None if self.objects is None else self.objects[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            array=None if self._array is None else self._array[chosen],
            max_bad_share=self._max_bad_share,
            workers=self._workers,
        )


def same_object(values: Sequence[object] | np.ndarray, where: str, pairs: str) -> np.ndarray:
    """Source.objects from whatever names each image's object. UserError if no object has two images."""
    objects = np.unique(np.asarray(values), return_inverse=True)[1].reshape(-1)
    if np.bincount(objects).max() < 2:
        raise UserError(f"config.data.pairs={pairs!r}: {where} has no two images of one object")
    return objects


def printable(path: Path | str) -> str:
    """A path of the file system as text that can be printed and written, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def check_bad_share(bad: Sequence[str], total: int, allowed: float) -> None:
    none_left = len(bad) == total
    if len(bad) > allowed * total or none_left:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        limit = "fewer than all" if none_left and allowed >= 1 else f"config.data.max_bad_share={allowed:g}"
        raise UserError(
            f"{len(bad)} of {total} files unreadable ({len(bad) / total:.1%}): {'; '.join(bad[:3])}{more}; "
            f"allowed: {limit}"
        )


def pick_parts(parts: Mapping[str, T], split: str, where: str) -> list[T]:
    """The parts ("train", "val", "test") of the data that `split` means, all of them for "all"."""
    if split == "all":
        return list(parts.values())
    if split in parts:
        return [parts[split]]
    if split == "test" and "val" in parts:
        return [parts["val"]]
    if split in ("test", "val"):
        raise NoPartError(f"{where}: no {split} part; available: {', '.join([*parts, 'all'])}")
    raise unknown("config.data.split", split, [*parts, "all"])


def from_array(
    images: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str],
    data: Data,
    where: str,
    objects: np.ndarray | None = None,
) -> Source:
    """A source of images uint8 [N,H,W] or [N,H,W,C] in memory, with data.limit, data.size and data.channels applied."""
    images = images[..., None] if images.ndim == 3 else images
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{where}: {len(labels)} labels for {len(images)} images; allowed: one each")
    images, labels = images[: data.limit or None], None if labels is None else labels[: data.limit or None]
    if not len(images):
        raise UserError(f"{where}: no images")
    _, height, width, channels = images.shape
    wanted = data.channels or channels
    if wanted != channels and {wanted, channels} != {1, 3}:
        raise UserError(f"config.data.channels={wanted}: {where} has {channels}; allowed: 0 or {channels}")
    shape = (data.size or height, data.size or width, wanted)
    unchanged = shape == images.shape[1:]

    def load(index: int) -> np.ndarray:
        if unchanged:
            return images[index]
        from ssl_jax.data import image

        return image.convert(images[index], data.size, wanted)

    return Source(
        [str(i) for i in range(len(images))],
        shape,
        load,
        labels=None if labels is None else labels.astype(np.float32 if labels.ndim == 2 else np.int32),
        classes=classes,
        objects=None if objects is None else same_object(objects[: data.limit or None], where, data.pairs),
        array=images if unchanged else None,
        workers=data.workers,
    )
