"""Reads tables of image files: columns of text, and the labels and groups in them. Errors name the line."""

import csv
import io
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.source import require_file, warn_once
from ssl_jax.errors import UserError, unknown

LONGEST = 255  # characters of a label; a longer one is a mistake, and would fill the screen
# The range from which an uncertain label (-1) is drawn, uniformly (smooth: Pham et al., https://arxiv.org/abs/1911.06475).
UNCERTAIN = {
    "ignore": (np.nan, np.nan),
    "zeros": (0.0, 0.0),
    "ones": (1.0, 1.0),
    "smooth_zeros": (0.0, 0.3),
    "smooth_ones": (0.55, 0.85),
}


class Table(NamedTuple):
    """N rows of text as columns, with their line numbers. `where` names the table in messages."""

    where: str
    header: list[str]
    cells: Sequence[Sequence[str]]  # for each name in the header, a column of N cells
    lines: Sequence[int]  # the line number of each row

    def find(self, *names: str) -> str | None:
        """The first of these columns that exists, as the header spells it; case is ignored."""
        columns = {name.lower(): name for name in reversed(self.header)}
        return next((columns[name.lower()] for name in names if name.lower() in columns), None)

    def demand(self, key: str, name: str) -> str:
        """The column `name` that config.data.`key` asks for, as the header spells it. UserError if there is none."""
        column = self.find(name)
        if column is None:
            raise unknown(f"config.data.{key}", name, self.header)
        return column

    def column(self, name: str) -> list[str]:
        return [cell.strip() for cell in self.cells[self.header.index(name)]]

    def at(self, row: int) -> str:
        return f" (line {self.lines[row]})"

    def fail(self, row: int, message: str) -> UserError:
        return UserError(f"{self.where}{self.at(row)}: {message}")

    def filled(self, name: str, meaning: str) -> list[str]:
        """A column. Raises UserError if a cell is empty or nan. meaning: what should be there, for the message."""
        cells = self.column(name)
        missing = {cell for cell in set(cells) if is_missing(cell)}
        if missing:
            row = min(map(cells.index, missing))
            raise self.fail(row, f"{name} is {repr(cells[row]) if cells[row] else 'empty'}; expected {meaning}")
        return cells

    def known(self, name: str) -> list[str]:
        """A column in which nan counts as an empty cell; a warning says so."""
        cells = self.column(name)
        self.warn_of_nan(name, cells)
        return ["" if is_missing(cell) else cell for cell in cells]

    def warn_of_nan(self, name: str, cells: Sequence[str]) -> None:
        """cells: of the column `name`."""
        nan = {cell for cell in set(cells) if cell.strip() and is_missing(cell.strip())}
        if nan:
            rows = [row for row, cell in enumerate(cells) if cell in nan]
            number = f"{len(rows)} row{'s' * (len(rows) > 1)}, first{self.at(rows[0])}"
            warn_once(f"{self.where}: {name}={cells[rows[0]]!r} in {number}: counts as an empty cell")


def read_table(path: Path, where: str) -> Table:
    """Reads a table in UTF-8, separated by commas, semicolons or tabs. Quotes and a byte order mark are optional.

    The first line is the header; empty lines are skipped. Raises UserError if the file cannot be read, or if the number
    of cells in a row differs from the header's.
    """
    require_file(path, where)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8") from error
    first = text.partition("\n")[:1]
    reader, limit = csv.reader([]), csv.field_size_limit()
    try:
        reader = csv.reader(io.StringIO(text), delimiter=max(",\t;", key=lambda mark: _width(first, mark)))
        header = [name.strip() for name in next(reader, [])]
        # Tuples, because the garbage collector skips tuples of strings, but visits lists again and again.
        rows = [(reader.line_num, *row) for row in reader if any(row)]
    except csv.Error as error:
        too_long = f"a cell of more than {limit} characters; is a quotation mark missing?"
        reason = too_long if "field limit" in str(error) else error
        raise UserError(f"{where} (line {max(1, reader.line_num)}): {reason}") from error
    for row in rows:
        if len(row) != len(header) + 1:
            problem = f"{len(row) - 1} values, but the header has {len(header)} columns"
            raise UserError(f"{where} (line {row[0]}): {problem}")
    columns: list[tuple] = list(zip(*rows, strict=True)) or [()] * (len(header) + 1)
    return Table(where, header, columns[1:], columns[0])


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value: empty, or nan, as other programs write it."""
    return cell.lower() in ("", "nan")


def single_label(table: Table, name: str) -> list[str]:
    """The label of each row, "" where unknown. Raises UserError if one has more than LONGEST characters."""
    cells = table.known(name)
    for row, cell in enumerate(cells):
        if len(cell) > LONGEST:
            raise table.fail(row, f"{name}={cell[:20]!r}...: {len(cell)} characters; allowed: at most {LONGEST}")
    return cells


def warn_of_repeats(table: Table, paths: Sequence[str], columns: Sequence[str]) -> None:
    """Says in one line which images are listed again, and which of them with other cells in `columns`.

    paths: of the rows. Those that differ only by "." and ".." are the same.
    """
    if len(set(paths)) == len(paths) and not any("./" in path or "//" in path for path in paths):
        return
    cells = [table.column(name) for name in columns]
    first: dict[str, int] = {}
    repeats, conflicts = list[int](), list[int]()
    for row, path in enumerate(map(os.path.normpath, paths)):
        before = first.setdefault(path, row)
        if before < row:
            repeats.append(row)
            if any(column[row] != column[before] for column in cells):
                conflicts.append(row)

    def example(row: int) -> str:
        return f"{paths[row]!r} in lines {table.lines[first[os.path.normpath(paths[row])]]} and {table.lines[row]}"

    if repeats:
        text = f"{len(repeats)} row{'s' * (len(repeats) > 1)} with an image that is listed already, "
        text += f"such as {example(repeats[0])}"
        if conflicts:
            text += f"; {len(conflicts)} with another {' or '.join(map(repr, columns))}, "
            text += f"such as {example(conflicts[0])}"
        warn_once(f"{table.where}: {text}")


def several_labels(table: Table, names: Sequence[str], paths: Sequence[str], data: Data, blank: float) -> np.ndarray:
    """The columns `names` as float32 [N, K]: 1, 0 or a value in between; NaN where unknown.

    -1 means uncertain and is replaced according to data.uncertain (`UNCERTAIN`). A value drawn from a range depends
    only on the image's path and the column's name. An empty cell, or nan, becomes `blank`; a warning says so of nan.
    Raises UserError for any other value.
    """
    labels = np.empty((len(table.lines), len(names)), np.float32)
    low, high = UNCERTAIN[data.uncertain]
    for k, name in enumerate(table.demand("labels", name) for name in names):
        cells = table.cells[table.header.index(name)]
        values = {cell: _parse_label(cell.strip(), blank) for cell in set(cells)}
        table.warn_of_nan(name, cells)
        invalid = [cells.index(cell) for cell, value in values.items() if value is None]
        if invalid:
            row = min(invalid)
            raise table.fail(row, f"{name}={cells[row]!r}; allowed: 0 to 1, -1 (uncertain) or an empty cell")
        labels[:, k] = np.fromiter(map(values.__getitem__, cells), np.float32, len(cells))
        uncertain = np.flatnonzero(labels[:, k] == -1)
        labels[uncertain, k] = low
        if low < high:
            labels[uncertain, k] += (high - low) * np.array([_uniform(name, paths[row]) for row in uncertain.tolist()])
    return labels


def group_numbers(values: Sequence[str]) -> np.ndarray:
    """Groups as int64 [N]: the values themselves if all are whole numbers, or else their ranks in sorted order."""
    texts = sorted(set(values))
    are_numbers = all(text.isdecimal() and len(text) < 19 and str(int(text)) == text for text in texts)
    numbers = {text: int(text) if are_numbers else rank for rank, text in enumerate(texts)}
    return np.array([numbers[value] for value in values], np.int64)


def in_two_parts(groups: np.ndarray, parts: Sequence[str] | np.ndarray) -> tuple[int, int] | None:
    """The first row whose group is also in another part, and an earlier row that shows it; None if there is none."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    part = np.unique(np.asarray(parts), return_inverse=True)[1]
    conflicts = np.flatnonzero(part != part[first[group]])
    return (int(conflicts[0]), int(first[group[conflicts[0]]])) if len(conflicts) else None


def _width(header: Sequence[str], mark: str) -> int:
    """The number of columns in a header (one line) if `mark`, outside of quotes, separates them."""
    return len(next(csv.reader(header, delimiter=mark), []))


def _parse_label(cell: str, blank: float) -> float | None:
    """The value of a label, -1 if it is uncertain; None if the cell is not a label."""
    try:
        value = float(cell) if cell else np.nan
    except ValueError:
        return None
    return blank if np.isnan(value) else value if value == -1 or 0 <= value <= 1 else None


def _uniform(name: str, path: str) -> float:
    """A number in [0, 1) that depends only on name and path, and is uniform over them."""
    return int.from_bytes(blake2b(f"{name}\n{path}".encode(), digest_size=8).digest(), "big") / 2**64
