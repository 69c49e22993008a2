"""Data sets in several large files, such as tars: which files, which part each belongs to, and what is known of them.

What is in a file is found out once: an index of arrays is kept in a folder and used as long as the file has the same
size and the same tag or time of last change.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.blocks import Blocks
from ssl_jax.data.central import check_side
from ssl_jax.data.decoding import FIRST, SIZE, check_background, decode, most_common, own_channels
from ssl_jax.data.layout import PARTS
from ssl_jax.data.remote import Files, MissingError, Stamp, base_name, has_magic, is_url, shown
from ssl_jax.data.source import Names, Source, check_bad_share, pick_parts, warn_once
from ssl_jax.errors import NoPartError, UserError
from ssl_jax.files import write_bytes
from ssl_jax.progress import counting

log = logging.getLogger("ssl_jax")
VERSION = 1  # raise it when an index holds something else, so that older ones are not used
MAX_CLASSES = 100_000  # labels that are numbers count classes from 0, so a larger one is hardly a class
LONGEST = 255  # bytes of a label; a longer one is a mistake
Index = Mapping[str, np.ndarray]


class Shard(NamedTuple):
    path: str  # or address
    name: str  # printable, the last name of the path
    stamp: Stamp

    def changed(self, files: Files) -> UserError:
        """The error for a file that is not what its index says."""
        now = files.stamp(self.path).size  # itself an error if the file is gone
        what = f"{now} bytes, {self.stamp.size} before" if now != self.stamp.size else "other content"
        return UserError(
            f"{shown(self.path)!r}: changed since the data were opened ({what}); restore the file, or start again"
        )


def find_shards(files: Files, data: Data, ending: str) -> list[Shard]:
    """The files with this ending that data.path and data.split mean, sorted where they are listed.

    data.path: a file, a folder, or a pattern with {000..146}, {a,b} or *. A file belongs to a part if its name has
    train, val or test in it as a word; if no name has train, all files are one part. Raises UserError without any.
    """
    where = f"config.data.path={shown(data.path)!r}"
    if not data.path:
        raise UserError(f"config.data.path='': missing; set it to a {ending} file, a folder of them or a pattern")
    if data.bands:
        raise UserError(f"config.data.bands={data.bands!r}: allowed with folder and csv, not with {data.name}")
    check_background(data.background)
    path, found = data.path if is_url(data.path) else str(Path(data.path).expanduser()), list[str]()
    for each in braces(path):
        if has_magic(each):
            found += files.glob(each)
        elif "." in base_name(each) if files.remote else not Path(each).is_dir():
            found.append(each)
        else:
            found += files.folder(each)
    if is_list := has_magic(path) or len(found) > 1:
        found = [each for each in found if base_name(each).lower().endswith(ending)]
    if not found:
        raise UserError(f"{where}: {'no' if is_list else 'is no'} {ending} file")
    paths = [path for paths in _in_parts(found, data, where) for path in paths]
    with ThreadPoolExecutor(max(8, data.workers)) as pool:
        stamps = list(pool.map(files.stamp, paths))
    return [Shard(path, base_name(path), stamp) for path, stamp in zip(paths, stamps, strict=True)]


def _in_parts(paths: Sequence[str], data: Data, where: str) -> list[list[str]]:
    parts: dict[str, list[str]] = {}
    for path in paths:
        words = re.split(r"[^a-z]+", base_name(path).lower())
        parts.setdefault(next((PARTS[word] for word in words if word in PARTS), ""), []).append(path)
    if "train" not in parts:
        parts = {"train": list(paths)}
    elif others := parts.pop("", None):
        warn_once(f"{where}: {base_name(others[0])!r} names no part (train, val, test); {len(others)} such left out")
    try:
        return pick_parts(parts, data.split, where)
    except NoPartError as error:
        raise NoPartError(f"{error.args[0]}; files with test or val in their names are such a part") from error


def braces(pattern: str) -> list[str]:
    """The paths that a pattern means, as a shell expands it.

    >>> braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    return ["".join(each) for each in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = numbers.groups()
        if int(last) < int(first):
            raise UserError(f"config.data.path: {{{text}}} counts down; allowed: such as {{000..146}}")
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return text.split(",") if "," in text else [f"{{{text}}}"]


def indexed(files: Files, shards: Sequence[Shard], make: Callable[[Shard], Index], data: Data) -> list[Index]:
    """What `make` says of each file, at most up to the one with image data.limit; "images" is their number.

    It is kept in data.cache, or in ~/.cache/ssl_jax, one file each.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssl_jax"
    folder = (Path(data.cache).expanduser() if data.cache else home) / "shards"

    def of(shard: Shard) -> tuple[Index, bool]:
        place = shard.path if files.remote else os.path.abspath(shard.path)  # noqa: PTH100
        key = repr((VERSION, data.name, data.image_column, data.labels, place, *shard.stamp))
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:  # none yet, or damaged
            return dict(file), False
        index, content = make(shard), io.BytesIO()
        np.savez(content, **index)  # type: ignore[arg-type]
        if shard.stamp.mark:
            try:
                write_bytes(path, content.getvalue(), durable=False)
            except UserError as error:
                if data.cache:
                    raise
                warn_once(f"{error}; config.data.cache names another folder for what is known of shards")
        return index, True

    found, images, threads = list[Index](), 0, max(8, data.workers) if files.remote else data.workers
    with ThreadPoolExecutor(threads) as pool, counting("index", "files") as progress:
        for start in range(0, len(shards), threads):
            for index, is_new in pool.map(of, shards[start : start + threads]):
                found.append(index)
                images += int(index["images"])
                if is_new:
                    progress(len(found), len(shards))
            if data.limit and images >= data.limit:
                break
    return found


def labels_of(columns: Sequence[np.ndarray], names: Sequence[str], where: str) -> tuple[np.ndarray | None, list[str]]:
    """(labels int32 [N], -1 if unknown, the classes) from a column per file: numbers, or text as bytes, b"" if unknown.

    names: of the classes, if something names them. Text that is not a number is the name of a class. (None, []) if all
    are unknown. Raises UserError for a number that names no class.
    """
    column = np.concatenate([each.astype("S21") if each.dtype.kind == "i" else each for each in columns])
    known = (column != b"") & (column != b"-1")
    if not known.any():
        return None, []
    labels = np.full(len(column), -1, np.int32)
    try:
        numbers = column[known].astype(np.int64)
    except ValueError:  # names of classes
        found, numbers = np.unique(column[known], return_inverse=True)
        texts = [text.decode(errors="backslashreplace") for text in found.tolist()]
        if names:
            if unexpected := [text for text in texts if text not in names]:
                raise UserError(f"{where}: label {unexpected[0]!r} is not among the names of its classes") from None
            numbers = np.array([names.index(text) for text in texts])[numbers]
        labels[known] = numbers
        return labels, list(names) or texts
    low, high, limit = int(numbers.min()), int(numbers.max()), len(names) or MAX_CLASSES
    if low < 0 or high >= limit:
        raise UserError(f"{where}: label {low if low < 0 else high}; allowed: 0 to {limit - 1}, or -1 (unknown)")
    labels[known] = numbers
    return labels, list(names) or [str(i) for i in range(high + 1)]


def class_names(files: Files, shards: Sequence[Shard]) -> list[str]:
    """The lines of classes.txt beside the files; [] if there is none."""
    folder = shards[0].path.rpartition("/")[0]
    try:
        content = files.bytes(f"{folder}/classes.txt" if folder else "classes.txt")
    except MissingError:
        return []
    return [line.strip() for line in content.decode(errors="backslashreplace").splitlines() if line.strip()]


def place(starts: np.ndarray, index: int) -> tuple[int, int]:
    """(the number of an image's shard or block, its own number there). starts: the first image of each."""
    number = int(np.searchsorted(starts, index, side="right")) - 1
    return number, index - int(starts[number])


def source_of(
    count: int,
    name: Callable[[int], str],
    encoded: Callable[[int], bytes],
    data: Data,
    *,
    labels: np.ndarray | None,
    classes: Sequence[str],
    skipped: Sequence[tuple[str, str]] = (),
    blocks: Blocks | None = None,
) -> Source:
    """A source of `count` images whose files are `encoded`. skipped: (name, reason) of images that cannot be read.

    Raises UserError if there are none, or too many are skipped.
    """
    where = f"config.data.path={shown(data.path)!r}"
    problems = [f"{name!r}: {reason}" for name, reason in skipped]
    if not count + len(skipped):
        raise UserError(f"{where}: no images")
    check_bad_share(problems, count + len(skipped), data.max_bad_share)
    for problem in problems:
        log.warning("%s; skipped", problem)
    found = list[int]()
    for i in range(0 if data.channels else min(FIRST, count)):
        try:
            found += own_channels(io.BytesIO(encoded(i)))
        except UserError:
            raise
        except Exception:  # decoding it says what is wrong
            continue
    size, channels = data.size or SIZE, data.channels or most_common(found)
    check_side(data, size)

    def load(index: int) -> np.ndarray:
        try:
            return decode(encoded(index), size, channels, data.window, data.background, side=data.test_side)
        except MemoryError as error:  # with a stand-in, results would depend on the machine
            raise UserError(f"{name(index)!r}: not enough memory to decode it") from error

    return Source(
        Names(count, name),
        (size, size, channels),
        load,
        labels=labels,
        classes=classes,
        skipped=problems,
        unreadable={name: ("", reason) for name, reason in skipped},
        max_bad_share=data.max_bad_share,
        workers=data.workers,
        content=encoded,
        blocks=blocks,
    )


def json_label(content: bytes) -> bytes:
    """The label in a JSON object, under "label" or "cls", as text; b"" if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        if isinstance(value, dict):
            label = next((value[key] for key in ("label", "cls") if key in value), "")
            return str(label).encode() if isinstance(label, int | str) and not isinstance(label, bool) else b""
    return b""
