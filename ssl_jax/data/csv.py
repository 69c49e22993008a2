"""A table of image files: a column of paths and, if wanted, columns of labels and of parts."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_jax.config import Data
from ssl_jax.data.files import PARTS, File, from_files, printable
from ssl_jax.data.source import Source, pick_parts
from ssl_jax.errors import UserError, unknown

PATH, LABEL, SPLIT = ("path", "file", "filename", "image"), ("label", "class", "target"), ("split",)


def read(data: Data) -> Source:
    """The images that the table data.path lists, in its order: comma, semicolon or tab, UTF-8, the first line a header.

    Columns, in any case: path, file, filename or image; label, class or target; split (train, val, test). Paths are
    absolute or relative to the table's folder. An empty label is one that is not known. Errors name the line.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; allowed: a table (.csv, .tsv) of image files")
    where = f"config.data.path={data.path!r}"
    table = Path(data.path).expanduser()
    try:
        text = table.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8") from error
    header = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text), delimiter=max(",\t;", key=header.count))
    try:
        parts = _parts(rows, table.parent, where, data.pairs)
    except csv.Error as error:
        raise UserError(f"{where} (line {rows.line_num}): {error}") from error
    labels = {file.label for files in parts.values() for file in files}
    classes = sorted(label for label in labels if label)
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    chosen = [file for files in pick_parts(parts, data.split, where) for file in files]
    return from_files(chosen, classes, data, where)


def _parts(rows: Any, folder: Path, where: str, pairs: str) -> dict[str, list[File]]:
    """The lines of the table as files, by part."""
    columns = [name.strip().lower() for name in next(rows, [])]

    def column(names: Sequence[str]) -> int | None:
        return next((columns.index(name) for name in names if name in columns), None)

    path_column, label_column, split_column = column(PATH), column(LABEL), column(SPLIT)
    if path_column is None:
        raise UserError(f"{where}: the columns are {', '.join(columns)}; one of these is needed: {', '.join(PATH)}")
    if pairs and pairs.lower() not in columns:
        raise unknown("config.data.pairs", pairs, columns)
    parts: dict[str, list[File]] = {"train": []}
    for row in rows:
        at = f" (line {rows.line_num})"
        if not any(row):
            continue
        if len(row) != len(columns):
            raise UserError(f"{where}{at}: {len(row)} values; the header has {len(columns)} columns")
        path = row[path_column].strip()
        label = row[label_column].strip() if label_column is not None else ""
        part = row[split_column].strip() if split_column is not None else "train"
        if not path:
            raise UserError(f"{where}{at}: {columns[path_column]} is empty; allowed: the path of an image file")
        if part.lower() not in PARTS:
            raise UserError(f"{where}{at}: split={part!r}; allowed: {', '.join(PARTS)}")
        part = PARTS[part.lower()]
        # An image without an object is one of its own.
        shown = row[columns.index(pairs.lower())].strip() if pairs else ""
        file = File(folder / path, printable(path), label or None, part, at, shown or f"{path}{at}")
        parts.setdefault(part, []).append(file)
    return parts
