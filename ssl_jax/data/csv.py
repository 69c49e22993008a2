"""A table of image files: a column of paths and, if wanted, columns of labels, of groups and of parts."""

import os
from pathlib import Path

from ssl_jax.config import Data
from ssl_jax.data.files import PARTS, File, from_files, printable
from ssl_jax.data.source import Source, pick_parts
from ssl_jax.data.table import Table, as_groups, read_table, several_labels
from ssl_jax.errors import UserError

PATH, LABEL, SPLIT = ("path", "file", "filename", "image"), ("label", "class", "target"), ("split",)


def read(data: Data) -> Source:
    """The images that the table data.path lists, in its order; see `table.read_table` for its form.

    Columns, in any case: path, file, filename or image; split (train, val, test). One label an image: the column that
    data.labels names, else label, class or target; empty: not known. Several: the columns that data.labels names, see
    `table.several_labels`. data.group: the column that says whose image it is, which no two parts may share.
    Paths are absolute or relative to the table's folder; \\ counts as / where a path has no /. Errors name the line.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; allowed: a table (.csv, .tsv) of image files")
    where = f"config.data.path={data.path!r}"
    path = Path(data.path).expanduser()
    table = read_table(path, where)
    files = _files(table, path.parent, data)
    parts: dict[str, list[int]] = {"train": []}
    for n, file in enumerate(files):
        parts.setdefault(file.part, []).append(n)
    groups = _groups(table, files, data)
    several = len(data.labels) > 1
    if several:
        blank = "ignore" if data.blank == "auto" else data.blank
        labels, classes = several_labels(table, data.labels, table.find(PATH) or 0, data, blank), list(data.labels)
    else:
        labels, classes = None, sorted({file.label for file in files if file.label})
        if all(name.isdecimal() for name in classes):
            classes.sort(key=int)
    chosen = [n for part in pick_parts(parts, data.split, where) for n in part]
    return from_files(
        [files[n] for n in chosen],
        classes,
        data,
        where,
        labels=None if labels is None else labels[chosen],
        groups=None if groups is None else groups[chosen],
    )


def _files(table: Table, folder: Path, data: Data) -> list[File]:
    paths, split = table.find(PATH), table.find(SPLIT)
    if paths is None:
        needed = ", ".join(PATH)
        raise UserError(f"{table.where}: the columns are {', '.join(table.columns)}; one of these is needed: {needed}")
    label = table.column(data.labels[0], "labels") if data.labels else table.find(LABEL)
    pairs = table.column(data.pairs, "pairs") if data.pairs else None
    made = []
    for n, row in enumerate(table.rows):
        path = row[paths].strip()
        if not path:
            raise table.fail(n, f"{table.columns[paths]} is empty; allowed: the path of an image file")
        part = "train" if split is None else row[split].strip()
        if part.lower() not in PARTS:
            raise table.fail(n, f"split={part!r}; allowed: {', '.join(PARTS)}")
        if "\\" in path and "/" not in path:
            path = path.replace("\\", "/")
        named = None if label is None else row[label].strip() or None
        # An image without an object is one of its own.
        shown = "" if pairs is None else row[pairs].strip() or f"{path}{table.at(n)}"
        whole = os.path.join(folder, path)  # noqa: PTH118 - a Path takes five times as long
        made.append(File(whole, printable(path), named, PARTS[part.lower()], table.at(n), shown))
    return made


def _groups(table: Table, files: list[File], data: Data):
    """int64 [N] of the column data.group. UserError if one is empty or in two parts."""
    if not data.group:
        return None
    column, first = table.column(data.group, "group"), dict[str, int]()
    values = [row[column].strip() for row in table.rows]
    for n, value in enumerate(values):
        if not value:
            raise table.fail(n, f"{data.group} is empty; allowed: whose image it is")
        other = first.setdefault(value, n)
        if files[other].part != files[n].part:
            parts = f"in {files[n].part}, and{table.at(other)} in {files[other].part}"
            raise table.fail(
                n, f"{data.group} {value!r} is {parts}; allowed: one part for all images of a {data.group}"
            )
    return as_groups(values)
