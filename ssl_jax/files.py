"""Files that survive a kill: written atomically, or one line at a time."""

import contextlib
import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic: a reader, or a restart after a kill, sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several hosts may write the same file, and their process ids can coincide.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: not written ({error.strerror})") from error


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], end: str = "\n") -> None:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front, as OWASP advises."""
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([_neutral(cell) for cell in row] for row in (header, *rows))
    write_bytes(path, text.getvalue().encode())


def _neutral(cell: Any) -> Any:
    """Source: https://owasp.org/www-community/attacks/CSV_Injection."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def write_npz(path: Path, **arrays: Any) -> None:
    """Writes the arrays compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file does not exist."""
    return json.loads(path.read_text()) if path.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a .jsonl file; a line that a kill cut short is skipped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
