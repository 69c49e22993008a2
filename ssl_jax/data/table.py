"""Tables of image files: reading one, its columns, and columns of 0 and 1 as several labels an image."""

import csv
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.errors import UserError, unknown

# What an uncertain label (-1) becomes. Ranges: Pham et al., arXiv 1911.06475, section 2.3 (LSR).
UNCERTAIN = {"zeros": (0.0, 0.0), "ones": (1.0, 1.0), "smooth_zeros": (0.0, 0.3), "smooth_ones": (0.55, 0.85)}


class Table(NamedTuple):
    """Rows of text, with where they stand. `where` names the table in messages."""

    where: str
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]  # of each row in the file

    def find(self, names: Sequence[str]) -> int | None:
        """The number of the first of `names` that is a column, in any case."""
        known = [column.lower() for column in self.columns]
        return next((known.index(name.lower()) for name in names if name.lower() in known), None)

    def column(self, name: str, key: str) -> int:
        """The number of the column `name`, which config.data.`key` asks for."""
        found = self.find([name])
        if found is None:
            raise unknown(f"config.data.{key}", name, self.columns)
        return found

    def at(self, row: int) -> str:
        return f" (line {self.lines[row]})"

    def fail(self, row: int, message: str) -> UserError:
        return UserError(f"{self.where}{self.at(row)}: {message}")


def read_table(path: Path, where: str) -> Table:
    """The table in a file: comma, semicolon or tab, quotes, UTF-8 with or without a byte order mark; empty lines are
    passed over. UserError for a file that can't be read, a row of another length, or no row at all."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8") from error
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",\t;", key=header.count))
    rows, lines = [], []
    try:
        columns = [name.strip() for name in next(reader, [])]
        for row in reader:
            if not any(row):
                continue
            if len(row) != len(columns):
                at = f" (line {reader.line_num})"
                raise UserError(f"{where}{at}: {len(row)} values; the header has {len(columns)} columns")
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{where} (line {reader.line_num}): {error}") from error
    return Table(where, columns, rows, lines)


def several_labels(table: Table, names: Sequence[str], path: int, data: Data, blank: str) -> np.ndarray:
    """float32 [N, K] of the columns `names`: 0, 1 or a share between them; NaN where not known.

    -1 is uncertain, and becomes what data.uncertain says (`UNCERTAIN`; ignore: not known). Empty becomes what `blank`
    says: zeros or ignore. Within a range, the place is a function of the row's path (column `path`) and the name.
    """
    empty = 0.0 if blank == "zeros" else np.nan
    low, high = UNCERTAIN.get(data.uncertain, (np.nan, np.nan))
    made = np.empty((len(table.rows), len(names)), np.float32)
    for k, name in enumerate(names):
        column = table.column(name, "labels")
        texts = [row[column] for row in table.rows]
        meaning = {text: _share(table, name, texts, text, empty) for text in set(texts)}
        made[:, k] = [meaning[text] for text in texts]
        for n in np.flatnonzero(made[:, k] == -1):
            place = zlib.crc32(f"{table.rows[n][path]}\0{name}".encode()) / 2**32 if low < high else 0.0
            made[n, k] = low + place * (high - low)
    return made


def _share(table: Table, name: str, texts: list[str], text: str, empty: float) -> float:
    try:
        value = float(text) if text.strip() else empty
    except ValueError:
        value = np.inf
    value = empty if np.isnan(value) else value
    if value == -1 or 0 <= value <= 1 or np.isnan(value):
        return value
    raise table.fail(texts.index(text), f"{name}={text!r}; allowed: 0 to 1, -1 (uncertain) or nothing")


def as_groups(values: Sequence[str]) -> np.ndarray:
    """int64 [N], equal where the text is equal: the numbers themselves if all are numbers."""
    if all(value.isdecimal() and len(value) < 19 for value in values):
        return np.array([int(value) for value in values], np.int64)
    return np.unique(np.asarray(values), return_inverse=True)[1].astype(np.int64)
