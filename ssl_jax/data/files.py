"""Sources made of image files: what the folder and the table reader share."""

import logging
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.source import Source, check_bad_share, printable, same_object
from ssl_jax.errors import UnreadableError, UserError

log = logging.getLogger("ssl_jax")
LOOK = 10_000  # up to so many files are opened at the start; of more it is only seen whether they are there
SIZE = 224  # side of images from files, px, unless data.size says otherwise
PARTS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


class File(NamedTuple):
    path: str  # text: two hundred thousand Paths take a second to make
    name: str  # printable, as in Source.names
    label: str | None  # None: not known
    at: str = ""  # where it is listed, for messages
    object: str = ""  # what it shows (config.data.pairs)


def _check_there(path: str) -> None:
    """Raises UnreadableError unless there is such a file."""
    try:
        kind = os.stat(path).st_mode  # noqa: PTH116 - a Path takes as long again
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(kind):
        raise UnreadableError("not a file")


def from_files(
    files: Sequence[File],
    classes: Sequence[str],
    data: Data,
    where: str,
    *,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Source:
    """The source of these files, without those in which a first look finds fault; data.limit counts files.

    labels: float32 [N, K], several an image, instead of the label of each file. groups: int64 [N], as in Source.
    Of up to LOOK files each header is read; of more, one that is no image is found when it is decoded.
    """
    from ssl_jax.data import image

    files = files[: data.limit or None]
    if not files:
        raise UserError(f"{where}: no images; allowed: {image.KINDS}")
    look = (lambda path: image.check(Path(path))) if len(files) <= LOOK else _check_there

    def troubles(chunk: Sequence[File]) -> list[str]:
        return [trouble(file) for file in chunk]

    def trouble(file: File) -> str:
        try:
            look(file.path)
        except UnreadableError as error:
            return f"{file.name!r}{file.at}: {error}"
        return ""

    chunks = [files[i : i + 256] for i in range(0, len(files), 256)]
    began = time.perf_counter()
    reasons = troubles(chunks[0])
    # Many threads help where one waits for a network; for 200,000 files of a local disk eight take 1.9 s, two 0.7 s.
    fast = time.perf_counter() - began < 1e-4 * len(chunks[0])
    with ThreadPoolExecutor(2 if fast else max(8, data.workers)) as pool:
        reasons += [reason for found in pool.map(troubles, chunks[1:]) for reason in found]
    skipped = [reason for reason in reasons if reason]
    check_bad_share(skipped, len(files), data.max_bad_share)
    for reason in skipped:
        log.warning("%s; skipped", reason)
    kept = [n for n, reason in enumerate(reasons) if not reason]
    good = [files[n] for n in kept]
    size, channels = data.size or SIZE, data.channels or 3

    def load(index: int) -> np.ndarray:
        try:
            content = Path(good[index].path).read_bytes()
        except OSError as error:  # the disk's fault, not the file's: a stand-in would make the run depend on the disk
            raise UserError(f"{printable(good[index].path)!r}: {error.strerror}; it was there at the start") from error
        return image.decode(content, size, channels, data.window)

    if data.cache:
        from ssl_jax.data.cache import cached

        read = cached([file.path for file in good], load, (size, size, channels), data)
    else:
        read = load
    if labels is not None:
        labels = labels[kept]
    elif classes:
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number.get(file.label or "", -1) for file in good], np.int32)
    return Source(
        [file.name for file in good],
        (size, size, channels),
        read,
        labels=labels,
        classes=classes,
        groups=None if groups is None else groups[kept],
        objects=same_object([file.object for file in good], where, data.pairs) if data.pairs else None,
        skipped=skipped,
        max_bad_share=data.max_bad_share,
        workers=data.workers,
    )
