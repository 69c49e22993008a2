"""Which images of a source are used: those that config.data.include lists, without those of config.data.exclude."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ssl_jax.config import Data
from ssl_jax.data.source import require_file, warn_once
from ssl_jax.data.table import read_table
from ssl_jax.errors import UserError, unknown


def key_of(data: Data, name: str, path: str) -> str:
    """What tells an image of `data` from those of all other data: its file or, if it is none (path=""), its place."""
    return os.path.abspath(path) if path else f"{data.path or data.name}:{data.split}/{name}"  # noqa: PTH100


def wanted(data: Data, names: Sequence[str], paths: Sequence[str]) -> list[int]:
    """Indices of the images to use, with a line about each table that leaves some out.

    With the columns `path` and `file`, as in check.csv, `file` holds keys, as of `key_of`. A table with one of them, as
    people write it, lists names or files. Empty cells are skipped. An image is also known by the last part of its name
    in data.include, where that says which it is; a .txt file is a list of names, one a line.

    Raises UserError if there is neither column, if no image is left, or if data.include has names of several images.
    """
    chosen = list(range(len(names)))
    if data.include:
        chosen = _included(data, names, paths)
    return _not_excluded(data, names, paths, chosen) if data.exclude else chosen


def _included(data: Data, names: Sequence[str], paths: Sequence[str]) -> list[int]:
    where = f"config.data.include={data.include!r}"
    listed, places = (
        (_lines(data.include, where), False) if data.include.endswith(".txt") else _listed(data.include, where)
    )
    endings = Counter(os.path.basename(name) for name in names)  # noqa: PTH119
    found, kept = set[str](), list[int]()
    for i, name in enumerate(names):
        path, ending = paths[i] if paths else "", os.path.basename(name)  # noqa: PTH119
        hits = {
            text for text in (key_of(data, name, path), *([] if places else (name, path, ending))) if text in listed
        }
        if not hits:
            continue
        if hits == {ending} and ending != name and endings[ending] > 1:
            raise UserError(
                f"{where}: {ending!r}: the name of {endings[ending]} images; allowed: a part of their paths"
            )
        found |= hits
        kept.append(i)
    missing = sorted(listed - found)
    if names and not kept:
        raise UserError(f"{where}: none of the {len(listed):,} listed images is in {data.path or data.name}")
    rest = f"; {len(missing):,} of those listed are not there, such as {missing[0]!r}" if missing else ""
    warn_once(f"{where}: {len(kept):,} images are used{rest}")  # the same words if it is looked at again
    return kept


def _not_excluded(data: Data, names: Sequence[str], paths: Sequence[str], chosen: Sequence[int]) -> list[int]:
    where = f"config.data.exclude={data.exclude!r}"
    listed, places = _listed(data.exclude, where)

    def is_listed(name: str, path: str) -> bool:
        return key_of(data, name, path) in listed or (not places and (name in listed or path in listed))

    kept = [i for i in chosen if not is_listed(names[i], paths[i] if paths else "")]
    if chosen and not kept:
        raise UserError(f"{where}: lists all {len(chosen)} images of {data.path or data.name}; allowed: fewer")
    if len(kept) < len(chosen):
        warn_once(f"{where}: leaves out {len(chosen) - len(kept)} of {len(chosen)} images")
    return kept


def _lines(file: str, where: str) -> set[str]:
    path = Path(file).expanduser()
    require_file(path, where)
    try:
        return {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8") from error


def _listed(file: str, where: str) -> tuple[set[str], bool]:
    """What a table lists, and whether these are keys alone, as of `key_of`."""
    table = read_table(Path(file).expanduser(), where)
    columns = [column for column in map(table.find, ("file", "path")) if column]
    if not columns:
        raise unknown(f"{table.where}: column", "path", table.header)
    return set(table.column(columns[0])) - {""}, len(columns) > 1
