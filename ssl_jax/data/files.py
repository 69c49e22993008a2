"""Sources made of image files: what the folder and the table reader share."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.source import Source, UnreadableError, check_bad_share, same_object
from ssl_jax.errors import UserError

log = logging.getLogger("ssl_jax")
SIZE = 224  # side of images from files, px, unless data.size says otherwise
PARTS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


class File(NamedTuple):
    path: Path
    name: str  # printable, as in Source.names
    label: str | None  # None: not known
    part: str  # train, val or test
    at: str = ""  # where it is listed, for messages
    object: str = ""  # what it shows (config.data.pairs)


def printable(path: Path | str) -> str:
    """A path as text that can be printed and written, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def from_files(files: Sequence[File], classes: Sequence[str], data: Data, where: str) -> Source:
    """The source of these files, after a look at each one's header; data.limit counts files."""
    from ssl_jax.data import image

    files = files[: data.limit or None]
    if not files:
        raise UserError(f"{where}: no images; allowed: {image.KINDS}")

    def trouble(file: File) -> str | None:
        try:
            image.check(file.path)
        except UnreadableError as error:
            return f"{file.name!r}{file.at}: {error}"
        return None

    with ThreadPoolExecutor(max(8, data.workers)) as pool:  # waits for the disk more than it computes
        reasons = list(pool.map(trouble, files))
    skipped = [reason for reason in reasons if reason]
    check_bad_share(skipped, len(files), data.max_bad_share)
    for reason in skipped:
        log.warning("%s; skipped", reason)
    good = [file for file, reason in zip(files, reasons, strict=True) if not reason]
    size, channels = data.size or SIZE, data.channels or 3

    def load(index: int) -> np.ndarray:
        try:
            content = good[index].path.read_bytes()
        except OSError as error:  # the disk's fault, not the file's: a stand-in would make the run depend on the disk
            raise UserError(f"{printable(good[index].path)!r}: {error.strerror}; it was there at the start") from error
        return image.decode(content, size, channels, data.window)

    if data.cache:
        from ssl_jax.data.cache import cached

        read = cached([file.path for file in good], load, (size, size, channels), data)
    else:
        read = load
    number = {name: i for i, name in enumerate(classes)}
    return Source(
        [file.name for file in good],
        (size, size, channels),
        read,
        labels=np.array([number.get(file.label or "", -1) for file in good], np.int32) if classes else None,
        classes=classes,
        objects=same_object([file.object for file in good], where, data.pairs) if data.pairs else None,
        skipped=skipped,
        max_bad_share=data.max_bad_share,
        workers=data.workers,
    )
