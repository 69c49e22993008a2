"""Checkpoints: Orbax behind `save` and `restore_latest`, with a digest of every array.

Orbax writes a checkpoint under a temporary name and renames it, so a killed save leaves the earlier ones whole. It does
not notice changed bytes inside an array file; the digests, kept in the checkpoint's metadata, do.
"""

import errno
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax import parallel
from ssl_jax.errors import UserError


def save(folder: Path, step: int, state: Any, keep: int) -> None:
    """Writes `state` to folder/<step>, then removes all but the newest `keep` checkpoints.

    Raises UserError if it cannot be written (a full disk, say); earlier checkpoints stay.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    path = folder.absolute() / f"{step:09d}"
    try:
        parallel.run_on_main(functools.partial(_make_room, folder, state))
        about = {"arrays": _describe(state), "structure": _structure(state)}
        ocp.save(path, state, custom_metadata=about, overwrite=True)
    except Exception as error:  # tensorstore, orbax and the operating system each raise their own kind
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: checkpoint not written ({reason}); earlier checkpoints stay, free space and rerun"
        ) from error
    for old in steps(folder)[:-keep] if parallel.is_main_process() else ():
        doomed = folder / f"{old:09d}"
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a step's name.
        shutil.rmtree(doomed.rename(folder / f"removed-{old}"), ignore_errors=True)


def _make_room(folder: Path, state: Any) -> None:
    """Raises OSError if the disk has no room: told here it is one line, told by the threads of orbax it is many."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(needed, 1))
    elif shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()) if folder.is_dir() else []


def restore_latest(folder: Path, like: Any, warn: Callable[[str], None]) -> Any | None:
    """The newest sound checkpoint, placed like `like` (a tree of arrays), or None where there is none.

    A damaged one is named through `warn` and the next older is tried. Raises UserError if the arrays are of another
    shape than `like`'s, or if no checkpoint is sound.
    """
    found = steps(folder)
    for step in reversed(found):
        path = folder.absolute() / f"{step:09d}"
        state, problem = _restore(path, like)
        if not parallel.any_process(problem is not None):
            return state
        warn(f"{path}: damaged checkpoint ({problem or 'another process cannot read it'}); trying the one before it")
    if found:
        raise UserError(f"{folder}: all {len(found)} checkpoints are damaged; remove the folder to start again")
    return None


def _restore(path: Path, like: Any) -> tuple[Any, str | None]:
    import orbax.checkpoint.experimental.v1 as ocp

    try:
        about = ocp.metadata(path).custom_metadata
        saved = about["arrays"]
    except Exception as error:  # whatever a torn or altered metadata file makes the readers raise
        return None, f"metadata unreadable: {type(error).__name__}"
    wanted = {name: _shape(x) for name, x in _named(like)}
    for name in sorted({*wanted, *saved}):
        here, there = wanted.get(name, "absent"), saved[name]["shape"] if name in saved else "absent"
        if here != there:
            raise UserError(f"{path}: checkpoint from another architecture: {name} is {there}, this run needs {here}")
    if about.get("structure", _structure(like)) != _structure(like):
        raise UserError(f"{path}: checkpoint of another version of ssl_jax; allowed: that version, or a new folder")
    try:
        state = ocp.load(path, jax.tree.map(_abstract, like))
    except Exception as error:
        return None, f"unreadable: {type(error).__name__}"
    for name, x in _named(state):
        if _digest(x) != saved[name]["digest"]:
            return None, f"{name} differs from its digest"
    return state, None


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _describe(state: Any) -> dict[str, dict[str, str]]:
    return {name: {"shape": _shape(x), "digest": _digest(x)} for name, x in _named(state)}


def _structure(state: Any) -> str:
    return hashlib.sha256(str(jax.tree.structure(state)).encode()).hexdigest()


def _shape(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _digest(x: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(parallel.gather(x)).tobytes()).hexdigest()


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
