"""What the folders of a data set mean: its parts, and the classes of its images."""

from collections.abc import Sequence

from ssl_jax.config import Data
from ssl_jax.data.source import pick_parts, printable, warn_once

PARTS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


Place = tuple[str, ...]  # of a file: the names of the folders on the way to it, and its own


def in_parts(paths: Sequence[Place], data: Data) -> tuple[list[tuple[Place, str | None]], list[str]]:
    """([(path, its label)] of those that data.split means, the classes), for sorted files."""
    has_parts = any(PARTS.get(path[0].lower()) == "train" for path in paths if len(path) > 1)
    if has_parts:
        paths = [path for path in paths if len(path) > 1 and path[0].lower() in PARTS]
    depth = 1 if has_parts else 0  # of the class folder in a path
    names = {path[depth] if len(path) > depth + 1 else None for path in paths}
    # A folder test/ or val/ without train/ is probably a part of some data set rather than a class.
    labelled = len(names) > 1 and None not in names and (has_parts or not any(n and n.lower() in PARTS for n in names))
    if None in names and len(names) > 2:
        _warn_of_strays(paths, depth, data)
    parts: dict[str, list[tuple[Place, str | None]]] = {"train": []}
    for path in paths:
        part = PARTS[path[0].lower()] if has_parts else "train"
        parts.setdefault(part, []).append((path, printable(path[depth]) if labelled else None))
    selected = [each for part in pick_parts(parts, data.split, f"folder {data.path!r}") for each in part]
    return selected, sorted(printable(name) for name in names if name) if labelled else []


def _warn_of_strays(paths: Sequence[tuple[str, ...]], depth: int, data: Data) -> None:
    """Says which images keep folders from being classes: one stray picture would remove all labels in silence."""
    stray = [printable("/".join(path)) for path in paths if len(path) == depth + 1]
    folders = sorted({printable(path[depth]) for path in paths if len(path) > depth + 1})
    these = f"{stray[0]!r}{f' and {len(stray) - 1} more images lie' if len(stray) > 1 else ' lies'}"
    shown = f"{', '.join(map(repr, folders[:3]))}{', ...' * (len(folders) > 3)}"
    warn_once(
        f"config.data.path={data.path!r}: {these} beside the folders {shown}: so these are no classes, and no image "
        f"has a label; move {'them' if len(stray) > 1 else 'it'} into a folder, or elsewhere"
    )
