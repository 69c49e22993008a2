"""Files that survive a kill, written whole or not at all, and that show whether one has been damaged since.

JSON and .safetensors files carry a digest, which every reader checks. Whoever edits such a JSON file by hand removes
its "digest"; a file without one, as other programs write them, is taken as it is. What a .npz file holds is covered by
the checksums of its format.
"""

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssl_jax.errors import DamagedError, UserError

log = logging.getLogger("ssl_jax")
DIGEST = "digest"  # the key of a JSON file's digest, and that in the metadata of a .safetensors file
COPY = "restore it from a copy"  # the way out where nothing can make a damaged file anew
HOUR = 3600  # s; no write of a single file takes longer


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Writes a file with this content, as `writing` does."""
    with writing(path, durable=durable) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to. Atomic: a reader, or a restart after a kill, sees either the old file or the new one.

    durable: returns when the file and its name are on the disk, so that a power failure cannot take them back. It costs
    milliseconds. Raises UserError if the file cannot be written.
    """
    # Processes on several hosts may write the same file, and their process ids can coincide.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        _make_folder(path.parent, durable)
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: not written ({error.strerror})") from error
        raise


def _make_folder(folder: Path, durable: bool) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent, durable)
        folder.mkdir(exist_ok=True)
        if durable:
            _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot, and need not
            os.fsync(handle)
    finally:
        os.close(handle)


def is_leftover(path: Path) -> bool:
    """Whether `write_bytes` was killed while it wrote this temporary file.

    On this host its process is gone. (Or it has this process's number: in containers, numbers repeat at every start.)
    On other hosts nothing has been written to it for an hour.
    """
    if found := re.fullmatch(rf"\..+\.{re.escape(platform.node())}\.([1-9]\d*)", path.name):
        return int(found[1]) == os.getpid() or not _is_running(int(found[1]))
    if not re.fullmatch(r"\..+\..+\.[1-9]\d*", path.name):
        return False
    try:
        return path.is_file() and path.stat().st_mtime < time.time() - HOUR
    except OSError:
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove_leftovers(*folders: Path) -> None:
    """Removes the temporary files that killed processes left in these folders, not in those below."""
    for folder in folders:
        for path in folder.glob(".*.*.*"):
            if is_leftover(path):
                path.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object with a digest of its content, whatever its layout, under the key "digest"."""
    value = {key: each for key, each in value.items() if key != DIGEST}
    text = json.dumps({**value, DIGEST: json_digest(value)}, indent=1, sort_keys=True)
    write_bytes(path, (text + "\n").encode())


def json_digest(value: Mapping[str, Any]) -> str:
    read_back = json.loads(json.dumps(value))  # numbers as keys become strings, which are sorted in another way
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], end: str = "\n") -> None:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front, as OWASP advises.

    Rows are written as they come; they are not held in memory.
    """
    with writing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        lines = itertools.chain([header], rows)
        csv.writer(text, lineterminator=end).writerows([_neutral(cell) for cell in row] for row in lines)
        text.flush()
        text.detach()


def _neutral(cell: Any) -> Any:
    """Source: https://owasp.org/www-community/attacks/CSV_Injection."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def write_npz(path: Path, /, **arrays: Any) -> None:
    """Writes the arrays compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file with a digest of its arrays. Raises UserError if a weight is NaN or infinite."""
    import safetensors.numpy

    weights = {name: np.require(value, requirements="C") for name, value in weights.items()}
    if broken := _not_finite(weights):
        raise UserError(f"{path}: not written ({broken} is NaN or infinite); the learning rate may be too high")
    write_bytes(path, safetensors.numpy.save(weights, metadata={DIGEST: digest(weights)}))


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, of the names, types, shapes and bytes of the arrays, in any order."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape} ".encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return total.hexdigest()


def _not_finite(weights: Mapping[str, np.ndarray]) -> str | None:
    """The name of an array with a value that is NaN or infinite."""
    numbers = ((name, w) for name, w in weights.items() if w.dtype.kind not in "iub")
    return next((name for name, w in numbers if not np.isfinite(np.asarray(w, np.float32)).all()), None)


# Readers. `cure`: what to do about a damaged file, in words. DamagedError names the file, the damage and the cure.


def read_json(path: Path, cure: str = COPY) -> dict[str, Any]:
    """The object in a JSON file, without its digest; {} if the file does not exist. Raises DamagedError."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, "not JSON" if path.stat().st_size else "empty", cure) from error
    if not isinstance(value, dict):
        raise DamagedError(path, "not an object", cure)
    if value.pop(DIGEST, None) not in (None, json_digest(value)):
        raise DamagedError(path, "differs from its digest", cure)
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, objects with a "step"; none if it does not exist.

    Damaged ones are left out, with a warning; a last line that a kill cut short is left out without.
    """
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    parsed = [_parse_line(line) for line in lines]
    if damaged := parsed.count(None):
        log.warning("%s: %d of %d lines are damaged and left out", path, damaged, len(lines))
    return [line for line in (*parsed, _parse_line(torn)) if line]


def _parse_line(text: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        line = json.loads(text)
        if isinstance(line, dict) and type(line.get("step")) is int:
            first = 1 if "loss" in line else 0  # before the first step there is no loss, but an evaluation
            return line if line["step"] >= first else None
    return None


def read_text(path: Path, cure: str = COPY) -> str:
    """Raises DamagedError if the file is empty or no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(path, "not text", cure) from error
    if not text.strip() or "\0" in text:
        raise DamagedError(path, "not text" if text.strip() else "empty", cure)
    return text


def read_csv(path: Path, cure: str = COPY) -> list[list[str]]:
    """The header and the rows. Raises DamagedError if there is no header or a row has more or fewer columns."""
    try:
        rows = list(csv.reader(io.StringIO(read_text(path, cure)), strict=True))
    except csv.Error as error:
        raise DamagedError(path, str(error), cure) from error
    if len({len(row) for row in rows}) != 1:
        raise DamagedError(path, "rows of different lengths", cure)
    return rows


def read_npz(path: Path, names: Iterable[str], cure: str = COPY) -> dict[str, np.ndarray]:
    """These arrays of a file that `write_npz` wrote. Raises DamagedError, also if there is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except Exception as error:  # whatever altered bytes make zipfile, zlib and NumPy raise
        raise _unreadable(path, ".npz", error, cure) from error


def read_weights(path: Path, cure: str = COPY) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file by name. Without a digest, a warning says that damage would go unnoticed.

    Raises DamagedError if there is no such file, if it differs from its digest or if a value is NaN or infinite.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            expected = (file.metadata() or {}).get(DIGEST)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except Exception as error:  # whatever altered bytes make the library raise
        raise _unreadable(path, ".safetensors", error, cure) from error
    if expected is None:
        _warn_unchecked(path)
    elif expected != digest(weights):
        raise DamagedError(path, "differs from its digest", cure)
    if broken := _not_finite(weights):
        raise DamagedError(path, f"{broken} is NaN or infinite", cure)
    return weights


def _unreadable(path: Path, kind: str, error: Exception, cure: str) -> DamagedError:
    if isinstance(error, FileNotFoundError):
        return DamagedError(path, "missing", cure)
    empty = path.is_file() and not path.stat().st_size
    return DamagedError(path, "empty" if empty else f"not readable as {kind}", cure)


@functools.cache  # once per file
def _warn_unchecked(path: Path) -> None:
    log.warning("%s: has no digest, so damage to it would go unnoticed", path)
