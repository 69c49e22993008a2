"""A folder of image files as a source, or a list of files."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.cache import cached
from ssl_jax.data.central import check_side
from ssl_jax.data.channels import check_ratios, grouped, naming, number_of_bands
from ssl_jax.data.decoding import (
    EXTENSIONS,
    FIRST,
    KINDS,
    SIZE,
    check,
    check_background,
    most_common,
    own_channels,
    read_image,
)
from ssl_jax.data.exclude import wanted as chosen
from ssl_jax.data.layout import in_parts
from ssl_jax.data.source import (
    Source,
    check_bad_share,
    check_is_file,
    open_file,
    printable,
    reading,
    same_object,
)
from ssl_jax.errors import UnreadableError, UserError

log = logging.getLogger("ssl_jax")
MAX_HEADERS = 10_000  # with more files than this, the first look only checks that they exist, and reads no headers


def read(data: Data) -> Source:
    """The images below data.path, sorted by name. Hidden files and files that are not images are skipped.

    The top-level folders train/ and test/ (or val/, valid/) are parts of the data. Labels are the names of the
    top-level folders, or of those directly below the parts, if there are at least two and every image is in one.

    With data.bands, files of one folder that differ only in these endings are an image, which bears their common name.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; set it to a folder of images")
    if data.pairs not in ("", "folder"):
        raise UserError(f"config.data.pairs={data.pairs!r}: allowed with folder: folder (one object per folder)")
    if "://" in data.path:
        from ssl_jax.data.remote_folder import open_folder

        return open_folder(data)
    root = Path(data.path).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.path={data.path!r}: {'not a folder' if root.exists() else 'no such folder'}")
    paths = sorted(_image_paths(root))
    bands = grouped(root, paths, data.bands) if data.bands else {}
    paths = list(bands) or paths
    selected, classes = in_parts(paths, data)
    files = [
        File(str(root.joinpath(*path)), printable("/".join(path)), label, "", "/".join(path[:-1]), *bands.get(path, ()))
        for path, label in selected
    ]
    return from_files(files, classes, data, f"config.data.path={data.path!r}")


def _image_paths(root: Path) -> Iterator[tuple[str, ...]]:
    """The image files below root, as tuples of names. A folder that links lead to again is read once."""

    def fail(error: OSError) -> None:
        raise UserError(f"{printable(error.filename)!r}: {error.strerror}") from error

    seen = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parents = Path(folder).relative_to(root).parts
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield (*parents, name)


class File(NamedTuple):
    path: str  # not a Path: creating 200,000 of them takes a second
    name: str  # printable, as in Source.names
    label: str | None  # None: unknown
    at: str = ""  # where it is listed, for messages
    object: str = ""  # the object that it shows (config.data.pairs)
    bands: tuple[str, ...] = ()  # with config.data.bands, the files themselves, and `path` is what their names share
    problem: str = ""  # why they cannot be read: one is missing

    @property
    def files(self) -> tuple[str, ...]:
        return self.bands or (self.path,)


def from_files(
    files: Sequence[File],
    classes: Sequence[str],
    data: Data,
    where: str,
    *,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Source:
    """A source of these files, except those that a first look finds unreadable. data.limit counts files.

    labels: float32 [N, K], for multi-label data, instead of the files' labels. groups: int64 [N], as in Source.
    """
    files = files[: data.limit or None]
    if not files:
        raise UserError(f"{where}: no images; allowed: {KINDS}")
    check_background(data.background)
    wanted = chosen(data, [file.name for file in files], [file.path for file in files])
    shape = (data.size or SIZE, data.size or SIZE, channels_of([files[i] for i in wanted], data))
    check_side(data, shape[0])
    look = functools.partial(_check_file, size=shape[0], channels=shape[2], exact=bool(data.bands))
    problems = dict(zip(wanted, _first_look([files[i] for i in wanted], data.workers, look), strict=True))
    bad = {i: problem for i, problem in problems.items() if problem}
    skipped = [f"{files[i].name!r}{files[i].at}: {problem}" for i, problem in bad.items()]
    check_bad_share(skipped, len(wanted), data.max_bad_share)
    for problem in skipped:
        log.warning("%s; skipped", problem)
    kept, unreadable = [i for i in wanted if i not in bad], {files[i].name: (files[i].path, bad[i]) for i in bad}
    files = [files[i] for i in kept]

    def read(index: int) -> np.ndarray:
        with reading(files[index].path):
            return read_image(files[index].files, shape[0], shape[2], data)

    load: Callable[[int], np.ndarray] = read
    if data.cache:
        load = cached([file.files for file in files], read, shape, data)
    if labels is not None:
        labels = labels[kept]
    elif classes:
        numbers = {name: i for i, name in enumerate(classes)}
        labels = np.array([numbers.get(file.label or "", -1) for file in files], np.int32)
    return Source(
        [file.name for file in files],
        shape,
        load,
        labels=labels,
        classes=classes,
        groups=None if groups is None else groups[kept],
        objects=same_object([file.object for file in files], where, data.pairs) if data.pairs else None,
        paths=[file.path for file in files],
        files=[file.files for file in files] if data.bands else (),
        unreadable=unreadable,
        skipped=skipped,
        max_bad_share=data.max_bad_share,
        workers=data.workers,
        content=lambda index: files[index].bands or files[index].path,
    )


def channels_of(files: Sequence[File], data: Data) -> int:
    """data.channels, or the number of data.bands; if neither is set, what most of the first files have, 3 for gray."""
    if data.bands:
        return number_of_bands(data.bands, data.channels)
    if data.channels:
        return data.channels
    found = list[int]()
    for file in files[:FIRST]:
        with contextlib.suppress(Exception), open_file(file.path) as content:  # `check` says what is wrong
            found += own_channels(content)
    return most_common(found)


def _check_file(file: File, size: int, channels: int, exact: bool) -> None:
    sizes = []
    for path in file.files:
        with naming(path, exact):
            sizes.append(check(path, size, 1 if exact else channels, exact))
    check_ratios(sizes)


def _first_look(files: Sequence[File], workers: int, look: Callable[[File], None]) -> list[str]:
    """For each file, the reason why it cannot be read, or "" if nothing is wrong so far. look: reads its header."""
    few = len(files) <= MAX_HEADERS

    def problem(file: File) -> str:
        if file.problem:
            return file.problem
        try:
            if few:
                look(file)
            else:
                for path in file.files:
                    check_is_file(path)
        except UnreadableError as error:
            return str(error)
        return ""

    def problems_in(chunk: Sequence[File]) -> list[str]:
        return [problem(file) for file in chunk]

    first, *rest = [files[i : i + 256] for i in range(0, len(files), 256)]
    start = time.perf_counter()
    problems = problems_in(first)
    # Many threads help on a network drive. On a local disk, 200,000 files take 1.9 s with eight threads, 0.7 with two.
    fast = time.perf_counter() - start < 1e-4 * len(first)
    with ThreadPoolExecutor(2 if fast else max(8, workers)) as pool:
        for chunk_problems in pool.map(problems_in, rest):
            problems += chunk_problems
    return problems
