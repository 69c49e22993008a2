"""Images that a table lists are left out of a source (config.data.exclude)."""

import os
from collections.abc import Sequence
from pathlib import Path

from ssl_jax.config import Data
from ssl_jax.data.source import warn_once
from ssl_jax.data.table import read_table
from ssl_jax.errors import UserError, unknown


def key_of(data: Data, name: str, path: str) -> str:
    """What tells an image of `data` from those of all other data: its file or, if it is none (path=""), its place."""
    return os.path.abspath(path) if path else f"{data.path or data.name}:{data.split}/{name}"  # noqa: PTH100


def not_excluded(data: Data, names: Sequence[str], paths: Sequence[str]) -> list[int]:
    """Indices of the images that the table data.exclude does not list; a line says how many it lists.

    With the columns `path` and `file`, as in check.csv, `file` holds keys, as of `key_of`. A table with one of them, as
    people write it, lists names or files. Empty cells are skipped. Raises UserError if there is neither column, or no
    image is left.
    """
    if not data.exclude:
        return list(range(len(names)))
    table = read_table(Path(data.exclude).expanduser(), f"config.data.exclude={data.exclude!r}")
    columns = [column for column in map(table.find, ("file", "path")) if column]
    if not columns:
        raise unknown(f"{table.where}: column", "path", table.header)
    listed = set(table.column(columns[0])) - {""}

    def is_listed(name: str, path: str) -> bool:
        return key_of(data, name, path) in listed or (len(columns) == 1 and (name in listed or path in listed))

    kept = [i for i, name in enumerate(names) if not is_listed(name, paths[i] if paths else "")]
    if names and not kept:
        raise UserError(f"{table.where}: lists all {len(names)} images of {data.path or data.name}; allowed: fewer")
    if len(kept) < len(names):
        warn_once(f"{table.where}: leaves out {len(names) - len(kept)} of {len(names)} images")
    return kept
