"""Tables of image files: columns of text, labels and groups made of them, and errors that name the line."""

import csv
import io
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.errors import UserError, unknown

# What an uncertain label (-1) becomes, uniform in a range (of smooth: Pham et al., https://arxiv.org/abs/1911.06475).
UNCERTAIN = {
    "ignore": (np.nan, np.nan),
    "zeros": (0.0, 0.0),
    "ones": (1.0, 1.0),
    "smooth_zeros": (0.0, 0.3),
    "smooth_ones": (0.55, 0.85),
}


class Table(NamedTuple):
    """N rows of text by column, and where they stand. `where` names the table in messages."""

    where: str
    header: list[str]
    cells: Sequence[Sequence[str]]  # N of each name of the header
    lines: Sequence[int]  # of each row

    def find(self, *names: str) -> str | None:
        """The first of these columns that there is, as the header writes it; upper and lower case are the same."""
        known = {name.lower(): name for name in reversed(self.header)}
        return next((known[name.lower()] for name in names if name.lower() in known), None)

    def demand(self, key: str, name: str) -> str:
        """The column `name`, which config.data.`key` asks for. UserError if there is none."""
        found = self.find(name)
        if found is None:
            raise unknown(f"config.data.{key}", name, self.header)
        return found

    def column(self, name: str) -> list[str]:
        return [cell.strip() for cell in self.cells[self.header.index(name)]]

    def at(self, row: int) -> str:
        return f" (line {self.lines[row]})"

    def fail(self, row: int, message: str) -> UserError:
        return UserError(f"{self.where}{self.at(row)}: {message}")

    def filled(self, name: str, meaning: str) -> list[str]:
        """A column without an empty cell. UserError if it has one; meaning: what is allowed in it, for the message."""
        found = self.column(name)
        if "" in found:
            raise self.fail(found.index(""), f"{name} is empty; allowed: {meaning}")
        return found


def read_table(path: Path, where: str) -> Table:
    """The table in a file: comma, semicolon or tab, quotes, UTF-8 with or without a byte order mark, its first line a
    header; empty lines are passed over. UserError for a file that can't be read or a row of another length."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8") from error
    first = text.partition("\n")[:1]
    reader = csv.reader(io.StringIO(text), delimiter=max(",\t;", key=lambda mark: _width(first, mark)))
    try:
        header = [name.strip() for name in next(reader, [])]
        # A list of tuples, made at one go: the garbage collector need not look into them again, unlike into lists.
        rows = [(reader.line_num, *row) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(f"{where} (line {reader.line_num}): {error}") from error
    for row in rows:
        if len(row) != len(header) + 1:
            many = f"{len(row) - 1} values; the header has {len(header)} columns"
            raise UserError(f"{where} (line {row[0]}): {many}")
    columns: list[tuple] = list(zip(*rows, strict=True)) or [()] * (len(header) + 1)
    return Table(where, header, columns[1:], columns[0])


def several_labels(table: Table, names: Sequence[str], paths: Sequence[str], data: Data, blank: float) -> np.ndarray:
    """float32 [N, K] of the columns `names`: 1, 0 or a share between them, NaN where not known.

    -1 is uncertain, and becomes what data.uncertain says (`UNCERTAIN`); nothing, or nan, becomes `blank`. The place
    within a range is a function of the image's path and the column's name alone. UserError for any other value.
    """
    made = np.empty((len(table.lines), len(names)), np.float32)
    low, high = UNCERTAIN[data.uncertain]
    for k, name in enumerate(table.demand("labels", name) for name in names):
        cells = table.cells[table.header.index(name)]
        meaning = {cell: _share(cell.strip(), blank) for cell in set(cells)}
        strange = [cells.index(cell) for cell, value in meaning.items() if value is None]
        if strange:
            row = min(strange)
            raise table.fail(row, f"{name}={cells[row]!r}; allowed: 0 to 1, -1 (uncertain) or nothing")
        made[:, k] = np.fromiter(map(meaning.__getitem__, cells), np.float32, len(cells))
        uncertain = np.flatnonzero(made[:, k] == -1)
        made[uncertain, k] = low
        if low < high:
            made[uncertain, k] += (high - low) * np.array([_place(name, paths[row]) for row in uncertain.tolist()])
    return made


def group_numbers(values: Sequence[str]) -> np.ndarray:
    """int64 [N], equal where the text is: the numbers as they stand, if all are numbers, else by their order."""
    texts = sorted(set(values))
    numbers = all(text.isdecimal() and len(text) < 19 and str(int(text)) == text for text in texts)
    number = {text: int(text) if numbers else place for place, text in enumerate(texts)}
    return np.array([number[value] for value in values], np.int64)


def in_two_parts(groups: np.ndarray, parts: Sequence[str] | np.ndarray) -> tuple[int, int] | None:
    """The first row whose group was in another part before, and where it was first; None if no group is in two."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    part = np.unique(np.asarray(parts), return_inverse=True)[1]
    astray = np.flatnonzero(part != part[first[group]])
    return (int(astray[0]), int(first[group[astray[0]]])) if len(astray) else None


def _width(header: Sequence[str], mark: str) -> int:
    """Columns of a header (one line) if `mark` separates them; one within quotes does not."""
    return len(next(csv.reader(header, delimiter=mark), []))


def _share(cell: str, blank: float) -> float | None:
    """What a label says, -1 if that is uncertain; None if it is no label."""
    try:
        value = float(cell) if cell else np.nan
    except ValueError:
        return None
    return blank if np.isnan(value) else value if value == -1 or 0 <= value <= 1 else None


def _place(name: str, path: str) -> float:
    """In [0, 1), uniform over names and paths."""
    return int.from_bytes(blake2b(f"{name}\n{path}".encode(), digest_size=8).digest(), "big") / 2**64
