"""Checkpoints: Orbax writes them beside the training, and a fingerprint of every array shows whether one is damaged.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a killed save leaves the earlier
ones whole. It does not notice bytes that changed inside an array file; the fingerprints in the metadata do.
"""

import errno
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import parallel
from ssl_jax.errors import UserError, first_line

FORMAT = 2  # of the metadata; 1, without this number, had another train state and SHA-256 digests
TEMPORARY, REMOVED = ".orbax-checkpoint-tmp", ".removed"  # in the names of what a killed run may leave behind


def orbax() -> Any:
    """Orbax's V1 API, imported on first use. It is to leave `experimental`; this name is good before and after."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").addFilter(_is_news)
    return v1


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax logs, one per thread, of an error that it then raises as well."""
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


class Checkpoints:
    """The checkpoints of one run: folder/<step>, of which the newest `keep` stay.

    All processes of a job make the same calls at the same steps. A save that failed in the background is reported by
    the next `save` or `wait`; leaving the `with` block waits as well. `warn` gets one-line warnings.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None]):
        self.folder, self.keep, self.warn = folder.absolute(), keep, warn
        self._writing: tuple[Path, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except UserError as problem:
            if error is None:
                raise
            self.warn(str(problem))  # the first error is the one to raise

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return steps(self.folder)

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state`. Returns once its buffers may be donated; the files are written in the background.

        Waits for the save before, if that is still under way. Raises UserError if there is no room.
        """
        self.wait()
        path = self.path(step)
        try:
            parallel.run_on_main(functools.partial(self._prepare, state))
            metadata = {"format": FORMAT, "arrays": _describe(state), "structure": _structure(state)}
            self._writing = path, _start(path, state, metadata)
        except Exception as error:  # tensorstore, Orbax and the operating system each raise their own kind
            raise _not_written(path, error) from error

    def wait(self) -> None:
        """Returns when the last save is complete on disk, and removes all but the newest `keep` checkpoints.

        Raises UserError if the save failed. Earlier checkpoints stay.
        """
        if self._writing is None:
            return
        (path, response), self._writing = self._writing, None
        failed: Exception | None = None
        try:
            response.result()
        except Exception as error:
            failed = error
        if parallel.is_main_process():
            self._tidy()
        if failed:
            raise _not_written(path, failed) from failed

    def restore_latest(self, like: Any) -> Any | None:
        """The newest sound checkpoint, placed like `like` (a tree of arrays), or None if there is no checkpoint.

        A damaged one is named through `warn`, and the one before it is tried. Raises UserError if the arrays have other
        shapes than those of `like`, or if no checkpoint is sound.
        """
        self.wait()
        parallel.run_on_main(self._remove_leftovers)
        found = parallel.run_on_main(self.steps)
        for step in reversed(found):
            path = self.path(step)
            state, problem = _restore(path, like)
            if not parallel.any_process(problem is not None):
                return state
            problem = problem or "another process cannot read it"
            self.warn(f"{path}: damaged checkpoint ({problem}); trying the one before it")
        if found:
            raise UserError(
                f"{self.folder}: all {len(found)} checkpoints are damaged; remove the folder to start again"
            )
        return None

    def path(self, step: int) -> Path:
        return self.folder / f"{step:09d}"

    def _prepare(self, state: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        _check_room(self.folder, sum(x.nbytes for x in jax.tree.leaves(state)))

    def _tidy(self) -> None:
        """Removes old checkpoints and what a killed run left. No save is under way."""
        for step in self.steps()[: -self.keep]:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a step's name.
            # The new name is new indeed: an earlier removal of the same step may have failed halfway.
            path = self.path(step)
            path.rename(tempfile.mkdtemp(prefix=f"{path.name}{REMOVED}", dir=self.folder))
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for pattern in (f"*{REMOVED}*", f"*{TEMPORARY}*"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()) if folder.is_dir() else []


def save(folder: Path, step: int, state: Any, keep: int) -> None:
    """Writes `state` to folder/<step> and returns when it is on disk; see Checkpoints."""
    with Checkpoints(folder, keep, _ignore) as checkpoints:
        checkpoints.save(step, state)


def restore_latest(folder: Path, like: Any, warn: Callable[[str], None]) -> Any | None:
    """The newest sound checkpoint in `folder`; see Checkpoints.restore_latest."""
    return Checkpoints(folder, 1, warn).restore_latest(like)


def restore(folder: Path, step: int, like: Any) -> Any:
    """The checkpoint of this step, placed like `like`: a tree of arrays, or of their shapes, types and shardings.

    It only reads, so a run may go on writing here. Raises UserError if the checkpoint is damaged, or another's.
    """
    path = Checkpoints(folder, 1, _ignore).path(step)
    state, problem = _restore(path, like)
    if problem:
        raise UserError(f"{path}: damaged checkpoint ({problem}); allowed: another step")
    return state


def _ignore(message: str) -> None:
    del message


def _check_room(folder: Path, needed: int) -> None:
    """Raises OSError if the disk has no room. Asked beforehand, it costs milliseconds and loses no step."""
    if hasattr(os, "posix_fallocate"):  # knows quotas and limits, too
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(needed, 1))
    elif shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _start(path: Path, state: Any, metadata: dict[str, Any]) -> Any:
    """Orbax's response to a save that goes on in its threads."""
    context = orbax().Context()
    context.array.saving.use_compression = False  # of weights it saves 8 % of the bytes and doubles the work
    with context:
        return orbax().save_async(path, state, custom_metadata=metadata, overwrite=True)


def _not_written(path: Path, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f"{path}: checkpoint not written ({reason}); earlier checkpoints stay, free space and rerun")


def read_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its format, and the shape and fingerprint of each array by name."""
    return orbax().metadata(path.absolute()).custom_metadata


def _restore(path: Path, like: Any) -> tuple[Any, str | None]:
    try:
        saved = read_metadata(path)
        arrays, version = saved["arrays"], saved.get("format")
    except Exception as error:  # whatever a torn or altered metadata file makes the readers raise
        return None, f"metadata unreadable: {type(error).__name__}"
    other_version = UserError(f"{path}: checkpoint of another version of ssl_jax; use that version, or a new folder")
    if version != FORMAT:
        raise other_version
    wanted = {name: _shape(x) for name, x in _named(like)}
    for name in sorted({*wanted, *arrays}):
        here, there = wanted.get(name, "absent"), arrays[name]["shape"] if name in arrays else "absent"
        if here != there:
            raise UserError(f"{path}: checkpoint from another architecture: {name} is {there}, this run needs {here}")
    if saved["structure"] != _structure(like):
        raise other_version
    try:
        state = orbax().load(path, jax.tree.map(_abstract, like))
    except Exception as error:
        return None, f"unreadable: {type(error).__name__}"
    for name, digest in fingerprints(state).items():
        if digest != arrays[name]["digest"]:
            return None, f"{name} differs from its fingerprint"
    return state, None


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _describe(state: Any) -> dict[str, dict[str, str]]:
    digests = fingerprints(state)
    return {name: {"shape": _shape(x), "digest": digests[name]} for name, x in _named(state)}


def _structure(state: Any) -> str:
    return hashlib.sha256(str(jax.tree.structure(state)).encode()).hexdigest()


def _shape(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


# The fingerprint. Odd numbers, one per lane, from the prime constants of xxHash32.
LANES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
SMALL = 2**16  # bytes of an array up to which it is summed on the host: scalars, biases, statistics


def fingerprints(tree: Any) -> dict[str, str]:
    """A fingerprint, 128 bits in hexadecimal, of every array by its name; the same however the array is laid out.

    The bits of element i, cut into words of at most 32 bits, are mixed with i by a function that is one-to-one for each
    i, and the results are summed modulo 2^32: four times with other constants. So one changed word always changes the
    fingerprint, and any other damage all but surely. It is a checksum: it does not stop someone who forges one.

    Integer sums are exact in any order. Each device sums the part that lies on it, nothing is gathered, and one, two or
    four devices give the same number. In arrays of more than 2^32 words i is counted modulo 2^32: there, an exchange of
    two words just that far apart goes unnoticed. All processes must call this together.
    """
    # A program per shape of a large array, not one of the whole tree: a ResNet-50 with its optimizer has 25 shapes in
    # 600 arrays, and compiles in a fifth of the time.
    parts = jax.device_get([_sums_of_parts(x) for _, x in _named(tree)])
    zero = np.zeros(len(LANES), np.uint32)
    sums = np.array([np.sum(part, axis=0, dtype=np.uint32) if part else zero for part in parts]).reshape(-1, len(zero))
    sums = parallel.sum_over_processes(sums)
    return {name: "".join(f"{lane:08x}" for lane in lanes) for (name, _), lanes in zip(_named(tree), sums, strict=True)}


def _sums_of_parts(x: Any) -> list[Any]:
    """The four sums, uint32 [4], of each part on this process's devices. If several hold the same part, one counts."""
    x = jnp.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    parts = [part for part in x.addressable_shards if part.replica_id == 0]
    if x.is_fully_replicated and x.nbytes <= SMALL:
        return [_sums_on_host(np.asarray(part.data)) for part in parts]
    return [_sums(part.data, _place(part.index), x.shape) for part in parts]


def _sums_on_host(x: np.ndarray) -> np.ndarray:
    """The four sums of a whole array in NumPy, in less time than a program for its shape takes to compile."""
    words = np.frombuffer(x.tobytes(), f"<u{min(x.itemsize, 4)}").astype(np.uint32)
    index = np.arange(words.size, dtype=np.uint32)
    return np.array([_mix(words + index * np.uint32(lane)).sum(dtype=np.uint32) for lane in LANES])


def _place(index: tuple[slice, ...]) -> np.ndarray:
    """Where a part of an array begins along each axis, modulo 2^32."""
    return np.array([(axis.start or 0) % 2**32 for axis in index], np.uint32)


@functools.partial(jax.jit, static_argnames="shape")
def _sums(x: jax.Array, place: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The four sums, uint32 [4], of x, the part at `place` of an array of this shape."""
    words = _words(x)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    if words.ndim > x.ndim:  # two words per element
        index, stride = jax.lax.broadcasted_iota(jnp.uint32, words.shape, x.ndim), 2
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + place[axis]
        index += along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    terms = [_mix(words + index * jnp.uint32(lane)) for lane in LANES]
    # One reduction of four operands reads the array once.
    zeros = [jnp.uint32(0)] * len(LANES)
    return jnp.stack(jax.lax.reduce(terms, zeros, _add, tuple(range(words.ndim))))


def _add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32, with a last axis of two, low word first, if an element has 64."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)


def _mix(h: Any) -> Any:
    """MurmurHash3's last step for 32 bits: one-to-one, and each bit of h changes half of the result's."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
