"""The run folder: what a training run leaves on disk, and what may be continued.

config.json        every option, resolved          environment.json   versions, devices, machine, commands
metrics.jsonl      one line a logged step          timing.jsonl       images/s and waiting, which no rerun repeats
checkpoints/       full state, for resuming        encoder/           safetensors + json, for using
views.png          what the transforms do          report.html        everything on one page
"""

import contextlib
import csv
import datetime
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.config import Config, differences, from_json, resolve, to_json
from ssl_jax.errors import BusyError, UserError

PACKAGES = ("ssl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")


def write_json(path: Path, value: Any) -> None:
    """Atomic: a reader, or a restart after a kill, sees the old file or the new one."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several hosts may write the same file: their numbers are the same now and then.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: not written ({error.strerror})") from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], end: str = "\n") -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([header, *rows])
    write_bytes(path, text.getvalue().encode())


def write_npz(path: Path, **arrays: Any) -> None:
    """Compressed and atomic."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_bytes(path, packed.getvalue())


def read_config(workdir: Path) -> dict[str, Any]:
    """The saved config of a run folder, as from `config.to_json`."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir}: no config.json; allowed: a folder made by `ssl-jax pretrain`")
    return json.loads(path.read_text())


def start(workdir: Path, config: Config) -> None:
    """Makes the run folder, or checks that an existing one belongs to the same config.

    A run that ended before its first step leaves nothing that another config could spoil: its config is replaced.
    Raises UserError if the folder holds something else or another config, naming the keys that differ.
    """
    made = json.loads(json.dumps(to_json(config)))
    if (workdir / "config.json").exists():
        # A run of an earlier version lacks the keys that came later: they are at their defaults.
        saved = to_json(resolve(from_json(read_config(workdir))))
        changed = differences(json.loads(json.dumps(saved)), made)
        # These say where a run's numbers lie: it goes on on other devices.
        changed = [what for what in changed if not what.startswith(("config.train.devices:", "config.train.shard:"))]
        begun = (workdir / "checkpoints").exists() or (workdir / "metrics.jsonl").exists()
        if changed and begun:
            raise UserError(
                f"--workdir={workdir}: holds a run of another config ({'; '.join(changed)}); "
                "allowed: the same config, which continues it, or another folder"
            )
        if changed:
            write_json(workdir / "config.json", made)
        return
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; allowed: a folder, new or of an earlier run")
    if workdir.is_dir() and any(not p.name.startswith(".") for p in workdir.iterdir()):
        raise UserError(f"--workdir={workdir}: not empty and no run folder; allowed: a new folder")
    write_json(workdir / "config.json", made)


@contextlib.contextmanager
def lock(workdir: Path, *, shared: bool = False) -> Iterator[None]:
    """Keeps a second process out of the folder; the operating system lifts the lock of a killed one.

    shared: others that share may enter, nobody else. Raises BusyError if the folder is taken.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be made ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"--workdir={workdir}: another process is working in this folder") from None
        yield


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def record_environment(workdir: Path, **more: Any) -> None:
    """Writes environment.json: versions, devices and each command that worked in this folder."""
    import jax

    now = {
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES if _installed(p)},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": [d.device_kind for d in jax.devices()],
        **more,
    }
    entry = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "argv": sys.argv}
    now["commands"] = [*read_json(workdir / "environment.json").get("commands", []), entry]
    write_json(workdir / "environment.json", now)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Lines:
    """A .jsonl file that survives kills: opened at a step, it forgets every line after that step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def append(self, line: dict[str, Any]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: not written ({error.strerror})") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a line torn by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
