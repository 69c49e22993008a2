"""Tars in WebDataset's layout: the files of a tar that share their name up to its first dot are a sample.

A tar that is not compressed has random access once it is known where its files begin. So the order of images is as
free as that of files in a folder.
"""

import tarfile
import zlib
from typing import Any

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.decoding import EXTENSIONS
from ssl_jax.data.remote import Files, shown
from ssl_jax.data.shards import (
    LONGEST,
    Index,
    Shard,
    class_names,
    find_shards,
    indexed,
    json_label,
    labels_of,
    place,
    source_of,
)
from ssl_jax.data.source import MAX_BYTES, Source, printable, warn_once
from ssl_jax.errors import UnreadableError, UserError

BLOCK = 512  # bytes of a tar's header, and of what sizes are rounded up to
AHEAD = 8 * 2**20  # bytes that are read at a time from a remote tar when its index is made
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_JSON = 2**20  # bytes; a longer one holds no mere label


def read(data: Data) -> Source:
    """The images in the tars of data.path, in the order of tars and of the files in them.

    data.path: a tar, a folder of tars or a pattern, local or remote (`shards.find_shards`). A sample's label is in its
    file cls, as text, or in its file json under "label" or "cls". classes.txt beside the tars names the classes.
    """
    files = Files(data.path, data)
    shards = find_shards(files, data, ".tar")
    found = indexed(files, shards, lambda shard: index_of(files, shard), data)
    starts = np.cumsum([0, *(int(each["images"]) for each in found)])
    count = min(int(starts[-1]), data.limit or int(starts[-1]))
    labels, classes = labels_of([each["label"] for each in found], class_names(files, shards), shown(data.path))
    skipped = [
        (f"{shard.name}/{printable(name)}", reason.decode())
        for shard, each in zip(shards, found)
        for name, reason in each["bad"]
    ]

    def name(index: int) -> str:
        number, row = place(starts, index)
        return f"{shards[number].name}/{printable(found[number]['name'][row])}"

    def encoded(index: int) -> bytes:
        """The image's file. Its header in the tar, read along with it, shows whether the tar is still the same."""
        number, row = place(starts, index)
        at, size = int(found[number]["offset"][row]), int(found[number]["size"][row])
        if size > MAX_BYTES:
            raise UnreadableError(f"{size / 1e9:.1f} GB; allowed: {MAX_BYTES / 1e9:g} GB")
        content = files.bytes(shards[number].path, at - BLOCK, at + size)
        if len(content) < BLOCK + size or zlib.crc32(content[:BLOCK]) != found[number]["header"][row]:
            raise shards[number].changed(files)
        return content[BLOCK:]

    return source_of(
        count,
        name,
        encoded,
        data,
        labels=None if labels is None else labels[:count],
        classes=classes,
        skipped=skipped,
    )


def index_of(files: Files, shard: Shard) -> Index:
    """Where the images of a tar are: "images", their number, and for each "name", "offset" of its content and "size" in
    bytes, "header", the CRC-32 of its header, and "label" as text. "bad": (name, reason) of samples without an image or
    behind the end of the file.

    Raises UserError if it is no tar, or compressed.
    """
    size, samples, bad = shard.stamp.size, list[tuple[bytes, int, int, int, bytes]](), list[tuple[bytes, bytes]]()

    def finish(sample: _Sample | None) -> None:
        if sample and (problem := sample.problem(size)):
            bad.append((sample.name, problem))
        elif sample and sample.image:
            samples.append((sample.name, sample.image.offset_data, sample.image.size, sample.header, sample.label))

    with files.open(shard.path, size, AHEAD) as file:
        first = file.read(BLOCK)
        if kind := next((kind for magic, kind in COMPRESSED.items() if first.startswith(magic)), ""):
            raise UserError(f"{shown(shard.path)!r}: compressed ({kind}), which has no random access; unpack it first")
        file.seek(0)
        sample: _Sample | None = None
        try:
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # which would hold all of them
                    stem, _, kind = member.name.rpartition("/")[2].partition(".")
                    is_meta = stem.startswith("__") and stem.endswith("__")
                    if not member.isreg() or member.issparse() or not stem or not kind or is_meta:
                        continue
                    key = member.name[: -len(kind) - 1]
                    if sample is None or sample.key != key or kind.lower() in sample.kinds:
                        finish(sample)
                        sample = _Sample(key, member.name)
                    sample.add(kind.lower(), member, file)
                _check_end(file, tar.offset, shard, size)
        except tarfile.ReadError as error:
            if sample is None:
                raise UserError(f"{shown(shard.path)!r}: {f'not a tar ({error})' if size else 'empty'}") from error
            _warn_of_end(shard)
        finish(sample)
    columns = list(zip(*samples, strict=True)) or [()] * 5
    return {
        "images": np.array(len(samples)),
        "name": np.array(columns[0], np.bytes_),
        "offset": np.array(columns[1], np.int64),
        "size": np.array(columns[2], np.int64),
        "header": np.array(columns[3], np.uint32),
        "label": np.array(columns[4], np.bytes_),
        "bad": np.array(bad, np.bytes_).reshape(-1, 2),
    }


class _Sample:
    """The files of a tar that share a key. Of each, what is needed is read at once: a remote tar is read forwards."""

    def __init__(self, key: str, first: str):
        self.key, self.kinds, self._first, self._json = key, set[str](), first, b""
        self.image: tarfile.TarInfo | None = None
        self.header, self._cls, self._end = 0, b"", 0

    def add(self, kind: str, member: tarfile.TarInfo, file: Any) -> None:
        self.kinds.add(kind)
        self._end = member.offset_data + member.size
        if self.image is None and f".{kind}" in EXTENSIONS:
            file.seek(member.offset_data - BLOCK)
            self.image, self.header = member, zlib.crc32(file.read(BLOCK))
        elif (kind == "cls" and member.size <= LONGEST) or (kind == "json" and member.size <= MAX_JSON):
            file.seek(member.offset_data)
            content = file.read(member.size)
            if kind == "cls":
                self._cls = content.strip()
            else:
                self._json = json_label(content)[:LONGEST]

    @property
    def name(self) -> bytes:
        name = self.image.name if self.image else self._first
        return name.removeprefix("./").encode(errors="surrogateescape")

    @property
    def label(self) -> bytes:
        return self._cls or self._json

    def problem(self, size: int) -> bytes:
        """Why it cannot be read from a tar of `size` bytes; b"" if it can."""
        if self.image is None:
            return b"no image among its files"
        return b"cut off: the tar ends before it" if self._end > size else b""


def _check_end(file: Any, offset: int, shard: Shard, size: int) -> None:
    """A tar ends with zeros. tarfile takes any other end, such as a damaged header in the middle, without a word."""
    file.seek(offset)
    end = file.read(min(BLOCK, max(0, size - offset)))
    if len(end) < BLOCK or end.strip(b"\0"):
        _warn_of_end(shard)


def _warn_of_end(shard: Shard) -> None:
    end = "does not end like a tar; it is cut short or damaged, and images that should follow are left out"
    warn_once(f"{shown(shard.path)!r}: {end}")
