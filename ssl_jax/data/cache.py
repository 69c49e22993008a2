"""A cache of decoded images on disk: each file is decoded and resized once, and later only its pixels are read.

A store is a folder for one shape and window, shared by all data sets. images.u8 contains the images one after another.
index.jsonl has one line per image: path, size in bytes, time of last change (ns), position in images.u8, CRC-32 of the
image, CRC-32 of what stands before it in the line; the last line of a path counts. Images are written before their
lines, so a killed process loses only the images that it decoded last. Images whose line is damaged are decoded again.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageColor

from ssl_jax.config import Data
from ssl_jax.data.source import printable
from ssl_jax.errors import UnreadableError, UserError
from ssl_jax.files import remove_leftovers, write_bytes
from ssl_jax.progress import counting

log = logging.getLogger("ssl_jax")
VERSION = 3  # raise it when decoding gives different pixels or a line another form, so that older caches are not used
GROUP = 64  # images per thread that are decoded between two writes


class Entry(NamedTuple):
    """The index entry of a file."""

    size: int  # bytes
    changed: int  # ns
    position: int  # of the image in images.u8; -1 if the file cannot be decoded
    checksum: int | str  # CRC-32 of the image, or why the file cannot be decoded


def cached(
    files: Sequence[Sequence[Path | str]], decode: Callable[[int], np.ndarray], shape: tuple[int, int, int], data: Data
) -> Callable[[int], np.ndarray]:
    """`decode` (index of an image -> uint8 [H,W,C], or UnreadableError) with a cache in the folder data.cache.

    files: of each image; several with data.bands. Images that are missing from the cache, or of which the size or time
    of a file has changed, are decoded now by data.workers threads, with a progress line. An image with a wrong checksum
    is decoded again when it is read. Raises UserError if the folder cannot be written.
    """
    colour = ImageColor.getrgb(data.background)[
        :3
    ]  # in the name unless it is white, as it was when there was no choice
    background = f"-{bytes(colour).hex()}" * (colour != (255, 255, 255))
    side = f"-of{data.test_side}" * (data.test_side > 0)
    folder = Path(data.cache).expanduser() / f"{'x'.join(map(str, shape))}{side}-{data.window}{background}-v{VERSION}"
    # One after another where they are several. Path.absolute takes five times as long.
    names = ["\n".join(os.path.abspath(path) for path in paths) for paths in files]  # noqa: PTH100
    stamps = [_stamp(paths) for paths in files]
    try:
        store = Store(folder, shape)
        missing = [i for i, stamp in enumerate(stamps) if stamp and not store.has(names[i], stamp)]
        if missing or store.damaged:
            with store.filling():
                # Another process may have added some of them.
                missing = [i for i in missing if not store.has(names[i], stamps[i])]
                _fill(store, missing, names, stamps, decode, data.workers)
    except OSError as error:
        raise UserError(f"config.data.cache={data.cache!r}: {error.strerror or error}") from error
    entries = [store.index.get(name) if stamp else None for name, stamp in zip(names, stamps, strict=True)]

    def load(index: int) -> np.ndarray:
        entry = entries[index]
        if entry is None:  # no such file: the same error as without a cache
            return decode(index)
        if entry.position < 0:
            raise UnreadableError(str(entry.checksum))
        image = store.read(entry)
        if image is None:
            log.warning("%r: damaged in the cache; decoding it again", printable(names[index].partition("\n")[0]))
            image = decode(index)
            if _checksum(image) == entry.checksum:  # otherwise the file has changed
                store.write(image, entry.position)
        return image

    return load


def _fill(
    store: "Store",
    missing: Sequence[int],
    names: Sequence[str],
    stamps: Sequence[tuple[int, int] | None],
    decode: Callable[[int], np.ndarray],
    workers: int,
) -> None:
    def attempt(index: int) -> np.ndarray | str:
        try:
            return decode(index)
        except UnreadableError as error:
            return str(error)

    needed, free = len(missing) * store.nbytes, shutil.disk_usage(store.folder).free
    if needed > free:
        raise UserError(
            f"config.data.cache={str(store.folder)!r}: {len(missing)} images need {needed / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB are free; reduce config.data.size or choose a folder on a larger disk"
        )
    with ThreadPoolExecutor(workers) as pool, counting("cache", "images") as progress:
        for start in range(0, len(missing), GROUP * workers):
            group = missing[start : start + GROUP * workers]
            images = pool.map(attempt, group)
            store.add([(names[i], *(stamps[i] or (0, 0)), image) for i, image in zip(group, images, strict=True)])
            progress(start + len(group), len(missing))


def _checksum(image: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(image))


def _stamp(paths: Sequence[Path | str]) -> tuple[int, int] | None:
    """Size and time of last change of the files of an image, summed; None if one does not exist."""
    try:
        found = [os.stat(path) for path in paths]  # noqa: PTH116 - Path.stat takes twice as long
    except OSError:
        return None
    return sum(status.st_size for status in found), sum(status.st_mtime_ns for status in found)


def _line(name: str, entry: Entry) -> str:
    text = json.dumps([name, *entry])
    return f"{text[:-1]}, {zlib.crc32(text[:-1].encode())}]\n"


def _parse(line: bytes) -> tuple[str, Entry] | None:
    """(path, entry) of a line of the index; None if it is damaged."""
    text, _, checksum = line.rpartition(b", ")
    if checksum != b"%d]" % zlib.crc32(text):
        return None
    name, *entry = json.loads(text + b"]")
    return name, Entry(*entry)


class Store:
    """The images of one shape. Any number of processes may read, but only one at a time may add (`filling`)."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.folder, self.shape, self.nbytes = folder, shape, int(np.prod(shape))
        folder.mkdir(parents=True, exist_ok=True)
        images = folder / "images.u8"
        images.touch()
        self._images = images.open("r+b", buffering=0)  # stays open
        self._lines = folder / "index.jsonl"
        self.index: dict[str, Entry] = {}
        self._next_position = 0
        self.damaged = 0  # lines of the index
        if lines := self._read_index():
            log.warning("%s: %d lines are damaged; their images are decoded again", self._lines, lines)
        elif not self.index and images.stat().st_size:
            log.warning("%s: empty or missing; all images are decoded again", self._lines)

    def _read_index(self) -> int:
        """Reads all sound lines and returns how many are damaged. A last line that a kill cut off does not count."""
        content = self._lines.read_bytes() if self._lines.exists() else b""
        *lines, self._torn = content.split(b"\n")
        parsed = [_parse(line) for line in lines]
        for entry in filter(None, parsed):
            self._insert(*entry)
        self.damaged = parsed.count(None)
        return self.damaged

    def _insert(self, name: str, entry: Entry) -> None:
        self.index[name] = entry
        self._next_position = max(self._next_position, entry.position + 1)

    def has(self, name: str, stamp: tuple[int, int] | None) -> bool:
        entry = self.index.get(name)
        return entry is not None and (entry.size, entry.changed) == stamp

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Keeps other processes from adding images; they wait. First reads the entries that others have added."""
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("%s: another process is filling this cache; waiting for it", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            remove_leftovers(self.folder)
            if self._read_index() or self._torn:
                lines = (_line(name, entry) for name, entry in self.index.items())
                write_bytes(self._lines, "".join(lines).encode(), durable=False)
            yield

    def add(self, images: Sequence[tuple[str, int, int, np.ndarray | str]]) -> None:
        """Adds images, or the reasons why files cannot be decoded, each with the path, size and time of its file."""
        lines = []
        for name, size, changed, image in images:
            old = self.index.get(name)
            if isinstance(image, str):
                entry = Entry(size, changed, -1, image)
            else:
                position = old.position if old and old.position >= 0 else self._next_position
                self.write(image, position)
                entry = Entry(size, changed, position, _checksum(image))
            self._insert(name, entry)
            lines.append(_line(name, entry))
        with self._lines.open("a") as file:
            file.write("".join(lines))

    def write(self, image: np.ndarray, position: int) -> None:
        content = memoryview(np.ascontiguousarray(image)).cast("B")
        if os.pwrite(self._images.fileno(), content, position * self.nbytes) < self.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, entry: Entry) -> np.ndarray | None:
        """The image uint8 [H,W,C], read-only; None if it does not match its checksum."""
        content = os.pread(self._images.fileno(), self.nbytes, entry.position * self.nbytes)
        if len(content) < self.nbytes or zlib.crc32(content) != entry.checksum:
            return None
        return np.frombuffer(content, np.uint8).reshape(self.shape)
