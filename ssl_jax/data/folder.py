"""Any folder of images, at any depth, with or without a sub-folder for each class."""

import os
from collections.abc import Iterator
from pathlib import Path

from ssl_jax.config import Data
from ssl_jax.data.images import EXTENSIONS, PARTS, File, from_files
from ssl_jax.data.source import Source, pick_parts, printable
from ssl_jax.errors import UserError


def read(data: Data) -> Source:
    """The images under data.path, sorted by name; hidden files and files that are not images are skipped.

    First-level folders train/ and test/ (or val/, valid/) are parts of the data. Labels are the names of the
    first-level folders (below train/ ..., if there are parts), provided there are at least two and no image is outside
    them.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; allowed: a folder of images")
    if data.pairs not in ("", "folder"):
        raise UserError(f"config.data.pairs={data.pairs!r}: allowed for a folder: folder (one object per folder)")
    root = Path(data.path).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.path={data.path!r}: {'not a folder' if root.exists() else 'no such folder'}")
    paths = sorted(_image_paths(root))
    has_parts = any(PARTS.get(path[0].lower()) == "train" for path in paths if len(path) > 1)
    if has_parts:
        paths = [path for path in paths if len(path) > 1 and path[0].lower() in PARTS]
    depth = 1 if has_parts else 0  # of the class's folder in a path
    names = {path[depth] if len(path) > depth + 1 else None for path in paths}
    # A lone test/ or val/ beside other folders is probably a part of some data set rather than a class.
    labelled = len(names) > 1 and None not in names and (has_parts or not any(n and n.lower() in PARTS for n in names))
    parts: dict[str, list[File]] = {"train": []}
    for path in paths:
        part = PARTS[path[0].lower()] if has_parts else "train"
        label = printable(path[depth]) if labelled else None
        file = File(str(root.joinpath(*path)), printable("/".join(path)), label, object="/".join(path[:-1]))
        parts.setdefault(part, []).append(file)
    selected = [file for files in pick_parts(parts, data.split, f"folder {data.path!r}") for file in files]
    classes = sorted(printable(name) for name in names if name) if labelled else []
    return from_files(selected, classes, data, f"config.data.path={data.path!r}")


def _image_paths(root: Path) -> Iterator[tuple[str, ...]]:
    """Image files below root as tuples of names. A folder that links reach twice is read once."""

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
