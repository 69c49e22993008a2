"""The state of a training in a file: what a killed command goes on from."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax import files
from ssl_jax.errors import DamagedError

SECONDS = 60.0  # between two saves
SHARE = 0.05  # of the time, which saves take at most


class Saved:
    """A tree of arrays in a .npz file, with the step and the key of what it belongs to."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self._last, self._wait = time.monotonic(), SECONDS

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._last > self._wait

    def write(self, step: int, tree: Any) -> None:
        began = time.monotonic()
        leaves: Any = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        with files.writing(self.path) as file:
            np.savez(file, key=np.array(self.key), step=np.array(step), **leaves)
        self._last = time.monotonic()
        self._wait = max(SECONDS, (self._last - began) / SHARE)

    def read(self, like: Any) -> tuple[int, Any]:
        """(step, tree); (0, like) if there is none with this key, or if it is damaged, which is told."""
        files.remove_leftovers(self.path.parent)
        if not self.path.exists():
            return 0, like
        leaves, structure = jax.tree.flatten(like)
        try:
            found = files.read_npz(self.path, ["key", "step", *(f"leaf{i}" for i in range(len(leaves)))])
        except DamagedError as error:
            print(f"{error.damage}; training begins anew", flush=True)
            return 0, like
        if found["key"] != self.key:
            return 0, like
        return int(found["step"]), jax.tree.unflatten(structure, [found[f"leaf{i}"] for i in range(len(leaves))])
