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
LOOK = 10_000  # files that are looked at when the data are opened: all of so many, of more a thousand
SIZE = 224  # side of images from files, px, unless data.size says otherwise
PARTS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


class File(NamedTuple):
    path: str  # text: two hundred thousand Paths take a second to make
    name: str  # printable, as in Source.names
    label: str | None  # None: not known
    part: str  # train, val or test
    at: str = ""  # where it is listed, for messages
    object: str = ""  # what it shows (config.data.pairs)


def printable(path: Path | str) -> str:
    """A path as text that can be printed and written, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def from_files(
    files: Sequence[File],
    classes: Sequence[str],
    data: Data,
    where: str,
    *,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Source:
    """The source of these files, after a look at headers; data.limit counts files.

    labels: float32 [N, K], several an image, instead of the label of each file. groups: int64 [N], as in Source.
    Of up to LOOK files each header is looked at, and what is no image is left out. Of more only a thousand: the others
    are found out when they are decoded.
    """
    from ssl_jax.data import image

    files = files[: data.limit or None]
    if not files:
        raise UserError(f"{where}: no images; allowed: {image.KINDS}")

    def trouble(file: File) -> str | None:
        try:
            image.check(Path(file.path))
        except UnreadableError as error:
            return f"{file.name!r}{file.at}: {error}"
        return None

    every = 1 if len(files) <= LOOK else len(files) // 1000
    with ThreadPoolExecutor(max(8, data.workers)) as pool:  # waits for the disk more than it computes
        reasons = list(pool.map(trouble, files[::every]))
    skipped = [reason for reason in reasons if reason]
    check_bad_share(skipped, len(reasons), data.max_bad_share)
    if every > 1:
        reasons, skipped = [None] * len(files), []
    for reason in skipped:
        log.warning("%s; skipped", reason)
    kept = [n for n, reason in enumerate(reasons) if not reason]
    good = [files[n] for n in kept]
    size, channels = data.size or SIZE, data.channels or 3

    def load(index: int) -> np.ndarray:
        try:
            content = Path(good[index].path).read_bytes()
        except FileNotFoundError as error:
            if every > 1:  # never seen
                raise UnreadableError(f"{error.strerror}{good[index].at}") from error
            raise UserError(f"{printable(good[index].path)!r}: {error.strerror}; it was there at the start") from error
        except OSError as error:  # the disk's fault, not the file's: a stand-in would make the run depend on the disk
            raise UserError(f"{printable(good[index].path)!r}: {error.strerror}; it was there at the start") from error
        return image.decode(content, size, channels)

    number = {name: i for i, name in enumerate(classes)}
    numbers = np.array([number.get(file.label or "", -1) for file in good], np.int32) if classes else None
    return Source(
        [file.name for file in good],
        (size, size, channels),
        load,
        labels=numbers if labels is None else labels[kept],
        classes=classes,
        groups=None if groups is None else groups[kept],
        objects=same_object([file.object for file in good], where, data.pairs) if data.pairs else None,
        skipped=skipped,
        max_bad_share=data.max_bad_share,
        workers=data.workers,
    )
