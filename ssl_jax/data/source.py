"""`Source`, which every reader returns: images by index.

If an image turns out to be unreadable, another one stands in for it; results never depend on the order of reading.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import stat
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from ssl_jax.data.blocks import Blocks
from ssl_jax.errors import NoPartError, UnreadableError, UserError, unknown, visible

log = logging.getLogger("ssl_jax")
FEW = 16  # images that are read one after another
MAX_BYTES = 2 * 10**9  # memory that decoding one image may take; a thread (data.workers) decodes one at a time
T = TypeVar("T")
# What an image is decoded from: its file, its files (config.data.bands), their bytes, or pixels uint8 [H,W,C].
Content = str | tuple[str, ...] | bytes | np.ndarray


class Names(Sequence[str]):
    """N names that are made when they are asked for: as a list, those of a million images take 100 MB."""

    def __init__(self, count: int, name: Callable[[int], str]):
        self._count, self._name = count, name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        places = range(self._count)[index]
        return [self._name(i) for i in places] if isinstance(index, slice) else self._name(places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names | list) and list(self) == list(other)


class Source:
    """N images of one shape, decoded on demand; safe to use from several threads.

    names:    printable file names relative to the root, or the index as text; a list, or `Names`
    labels:   int32 [N], -1 if unknown; multi-label: float32 [N, K] in [0, 1], NaN if unknown; None without labels
    classes:  the name of each label, fit to be printed; [] without labels
    groups:   int64 [N], equal for images of one patient, or of another group that must not be split; or None
    objects:  int [N], equal for images of the same object (config.data.pairs); or None
    shape:    (H, W, C) of every image
    blocks:   which images can only be read together; None: each one alone
    paths:    the file of each image; [] if the images are not files
    files:    the same, as a tuple for each; with config.data.bands its files, and `path` is what their names share
    skipped:  the unreadable files, each with the reason: those left out when the source was opened, and those that
              failed later
    unreadable: the same as name -> (path, reason), path "" if it is no file; also those that failed in `chunks`
    replaced: index -> index of the image that stands in for it

    For an image that cannot be decoded, the next readable one stands in: one with the same label or, for multi-label
    data, the one with the fewest labels that differ. This depends only on the files, so every order of reading gives
    the same images. UserError if more than `max_bad_share` of all files are unreadable.
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
        paths: Sequence[str] = (),
        files: Sequence[tuple[str, ...]] = (),
        unreadable: Mapping[str, tuple[str, str]] | None = None,
        skipped: Sequence[str] = (),
        max_bad_share: float = 0.0,
        workers: int = 2,
        memory_gb: float = 2.0,
        content: Callable[[int], Content] | None = None,
        blocks: Blocks | None = None,
    ):
        """load: index -> uint8 [H,W,C]; may raise UnreadableError. labels: a function is called on first use.
        array: all images, if they are in memory already. memory_gb: see `all_images`. content: index -> what an image
        is decoded from, if there is something; needed to cut crops from its own pixels (config.data.crops)."""
        self.names = names if isinstance(names, Names) else list(names)
        self.shape, self.objects, self.blocks = shape, objects, blocks
        self.classes = [visible(name) for name in classes]
        self.groups, self.paths, self.unreadable = groups, list(paths), dict(unreadable or {})
        self.replaced: dict[int, int] = {}
        self.content = content
        self._load, self._labels, self._array, self._files = load, labels, array, list(files)
        self._skipped, self._bad = list(skipped), dict[int, str]()
        self._max_bad_share, self._workers, self.memory_gb = max_bad_share, workers, memory_gb
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def files(self) -> list[tuple[str, ...]]:
        return self._files or [(path,) for path in self.paths]

    @property
    def nbytes(self) -> int:
        """The memory that `arrays()` takes, in bytes."""
        return len(self) * int(np.prod(self.shape))

    @property
    def labels(self) -> np.ndarray | None:
        if callable(self._labels):
            self._labels = self._labels()
        return self._labels

    def forget_labels(self) -> None:
        """Drops the labels, so that any image may stand in for a damaged one."""
        self._labels = None

    @property
    def multilabel(self) -> bool:
        return self.labels is not None and self.labels.ndim == 2

    def labels_as(self, classes: Sequence[str], where: str) -> np.ndarray:
        """The labels as indices of `classes`, int32 [N], -1 if unknown; multi-label: one column for each of `classes`,
        float32 [N, K], NaN if unknown. UserError if there are no labels, or a class is not among `classes`."""
        if self.labels is None:
            raise UserError(f"{where}: has no labels; use data with class folders, a label column or a labels array")
        unexpected = [name for name in self.classes if name not in classes]
        if unexpected:
            raise unknown(f"{where}: class", unexpected[0], classes)
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
        """Image `index`, uint8 [H,W,C], or its stand-in. UserError if too many images are unreadable."""
        return self.first_readable(index, self._load)

    def first_readable(self, index: int, read: Callable[[int], T]) -> T:
        """read(index), or that of its stand-in if `read` raises UnreadableError. UserError if too many images do so."""
        for candidate in self._candidates(index):
            if candidate in self._bad:
                continue
            try:
                result = read(candidate)
            except UnreadableError as error:
                self._add_bad(candidate, str(error))
                continue
            if candidate != index:
                self.replaced[index] = candidate
            return result
        raise UserError(f"{self.names[index]!r}: unreadable, and no other image with its label can stand in for it")

    def load_many(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images at `indices`, uint8 [N,H,W,C], each as `load` returns it. Threads read more than a few of them."""
        if len(indices) <= FEW:
            return np.stack([self.load(int(i)) for i in indices])
        images = np.empty((len(indices), *self.shape), np.uint8)

        def fill(rows: np.ndarray) -> None:
            for row in rows:
                images[row] = self.load(int(indices[row]))

        places = np.argsort(np.asarray(indices), kind="stable")  # those of one file or block one after another
        with ThreadPoolExecutor(self._workers) as pool:
            list(pool.map(fill, np.array_split(places, -(-len(places) // FEW))))
        return images

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        others = np.roll(np.arange(len(self)), -index)[1:]
        if self.labels is not None:
            labels = self.labels if self.labels.ndim == 1 else np.where(np.isnan(self.labels), -1, self.labels >= 0.5)
            differing = (labels[others] != labels[index]).reshape(len(others), -1).sum(axis=1)
            # Hardly any two images agree in, say, fourteen labels, so those with the fewest differences come first.
            others = others[differing == 0] if labels.ndim == 1 else others[np.argsort(differing, kind="stable")]
        yield from map(int, others)

    def _add_bad(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = f"{self.names[index]!r}: {reason}"
            log.warning("%s; another image stands in for it", self._bad[index])
            check_bad_share(self.skipped, len(self) + len(self._skipped), self._max_bad_share)

    def arrays(self, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """All images, uint8 [N,H,W,C], decoded by threads. progress(done, total) is called in the calling thread."""
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

    def all_images(self) -> "Images":
        """All images: an array, if they are in memory or take at most `memory_gb` (`config.data.memory_gb`); else a
        sequence that decodes what is asked for."""
        if self._array is not None or self.nbytes <= self.memory_gb * 1e9:
            return self.arrays()
        return LazyImages(self)

    def chunks(self, size: int = 256) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(indices int64 [n], uint8 [n,H,W,C]) of all images, in order, at most `size` at a time; threads decode one
        chunk ahead. Images that cannot be decoded have no stand-in here: they are left out, and noted in `unreadable`.
        """

        def decode(index: int) -> np.ndarray | None:
            try:
                return self._load(index)
            except UnreadableError as error:
                self.unreadable[self.names[index]] = self.paths[index] if self.paths else "", str(error)
                return None

        starts = range(0, len(self), size)
        with ThreadPoolExecutor(self._workers) as pool:
            ahead = [[pool.submit(decode, i) for i in range(size)[: len(self)]]]
            for start in starts:
                following = range(start + size, min(start + 2 * size, len(self)))
                ahead.append([pool.submit(decode, i) for i in following])
                images = [future.result() for future in ahead.pop(0)]
                read = [i for i, image in enumerate(images) if image is not None]
                if read:
                    yield start + np.array(read), np.stack([image for image in images if image is not None])

    def take(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """A source of only these images, in this order. Their stand-ins come from among them."""
        kept = np.asarray(indices, np.int64).reshape(-1)
        names, content, blocks = self.names, self.content, self.blocks.take(kept) if self.blocks and len(kept) else None

        def labels() -> np.ndarray | None:
            return None if self.labels is None else self.labels[kept]

        return Source(
            Names(len(kept), lambda i: names[int(kept[i])]) if isinstance(names, Names) else [names[i] for i in kept],
            self.shape,
            lambda i: self._load(int(kept[i])),
            labels=labels,
            classes=self.classes,
            objects=None if self.objects is None else self.objects[kept],
            groups=None if self.groups is None else self.groups[kept],
            array=None if self._array is None else self._array[kept],
            paths=[self.paths[i] for i in kept] if self.paths else (),
            files=[self._files[i] for i in kept] if self._files else (),
            max_bad_share=self._max_bad_share,
            workers=self._workers,
            memory_gb=self.memory_gb,
            content=None if content is None else lambda i: content(int(kept[i])),
            blocks=blocks,
        )


class LazyImages:
    """The N images of a source, to be read like an array uint8 [N, H, W, C]; nothing is kept.

    images[a:b] and images[indices] are arrays uint8 [n, H, W, C], images[i] is one image [H, W, C]. Threads decode
    (`config.data.workers`). If slices come in order, the next one is read ahead, so memory holds two of them. An image
    that cannot be decoded has a stand-in, as of `Source.load`; UserError if there are too many.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, source: Source):
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


def same_object(values: Sequence[object] | np.ndarray, where: str, pairs: str) -> np.ndarray:
    """`Source.objects` from values that identify the object of each image. UserError if no object has two images."""
    objects = np.unique(np.asarray(values), return_inverse=True)[1].reshape(-1)
    if np.bincount(objects).max() < 2:
        raise UserError(f"config.data.pairs={pairs!r}: {where} has no two images of one object")
    return objects


def printable(path: Path | str) -> str:
    """A file path as text that can be printed and saved even if its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def open_file(path: Path | str) -> BinaryIO:
    """An image file, to read from. UnreadableError for what is not a file: opening a pipe would wait for ever."""
    check_is_file(path)
    return Path(path).open("rb")


@contextlib.contextmanager
def reading(path: Path | str) -> Generator[None, None, None]:
    """Ends the run if a file cannot be read any more. With a stand-in, results would depend on the disk or machine."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(path)!r}: {error.strerror}; it was readable at the start") from error
    except MemoryError as error:
        raise UserError(f"{printable(path)!r}: not enough memory to decode it") from error


def check_is_file(path: Path | str) -> None:
    """Raises UnreadableError if there is no such file, if it is no file, or if it takes more than MAX_BYTES."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path takes twice as long
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError("not a file")
    if status.st_size > MAX_BYTES:
        raise UnreadableError(f"{status.st_size / 1e9:.1f} GB; allowed: {MAX_BYTES / 1e9:g} GB")


def check_memory(width: int, height: int, needed: int) -> None:
    """Raises UnreadableError if decoding an image takes more than MAX_BYTES. needed: bytes, according to its header."""
    if needed > MAX_BYTES:
        limit = f"allowed: {MAX_BYTES / 1e9:g} GB"
        raise UnreadableError(f"{width} x {height} px, which take {needed / 1e9:.1f} GB to decode; {limit}")


@functools.lru_cache(maxsize=1000)
def warn_once(line: str) -> None:
    """A warning about the data as a whole: a command opens them several times, once for each part."""
    log.warning("%s", visible(line))


def require_file(path: Path, where: str) -> None:
    """Raises UserError if the table or archive at `path` does not exist or is no file, such as a pipe."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{where}: not a file")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from error


def check_bad_share(bad: Sequence[str], total: int, allowed: float) -> None:
    none_left = len(bad) == total
    if len(bad) > allowed * total or none_left:
        others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        limit = "fewer than all" if none_left and allowed >= 1 else f"config.data.max_bad_share={allowed:g}"
        raise UserError(
            f"{len(bad)} of {total} files unreadable ({len(bad) / total:.1%}): {'; '.join(bad[:3])}{others}; "
            f"allowed: {limit}"
        )


def pick_parts(parts: Mapping[str, T], split: str, where: str) -> list[T]:
    """The parts of the data ("train", "val", "test") that `split` means; "all" means all of them."""
    if split == "all":
        return list(parts.values())
    if split in parts:
        return [parts[split]]
    if split == "test" and "val" in parts:
        return [parts["val"]]
    if split in ("test", "val"):
        raise NoPartError(f"{where}: no {split} part; available: {', '.join([*parts, 'all'])}")
    raise unknown("config.data.split", split, [*parts, "all"])
