"""What a save costs a run: the pause between two steps, and how long the write takes in all, before and after.

    python benchmarks/checkpoint_pause.py                a state of about 400 MB, 5 saves each, in a temporary folder
    python benchmarks/checkpoint_pause.py --folder=DIR   on the disk of DIR

The state has the arrays of a ResNet-50 four times (parameters, two moments, target), filled with noise. Steps multiply
matrices for about 0.3 s and rewrite the state in place, as training does. "Before" is how ssl_jax 0.1 saved: a SHA-256
of every array, gathered on the host, then a write that blocks. Both ways run in turn, in one process. Columns, medians
in seconds:

    blocked   until `save` returned
    pause     from the end of one step to the end of the next with a save between them, less a usual step
    lost      the same for all steps until the checkpoint was complete: steps are slower beside a write
    written   until the checkpoint was complete on disk
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import checkpoint

SECONDS = 0.3  # of a step


def resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64), (64,), (64,)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            kernels = [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            kernels += [(1, 1, inputs, 4 * width)] if block == 0 else []
            shapes += [shape for kernel in kernels for shape in (kernel, kernel[-1:], kernel[-1:])]
            inputs = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def make_state(copies: int) -> list[list[jax.Array]]:
    generator = np.random.default_rng(0)
    shapes = resnet50_shapes()
    return [[jnp.asarray(generator.standard_normal(shape, np.float32)) for shape in shapes] for _ in range(copies)]


def save_as_before(folder: Path, step: int, state: Any) -> None:
    def digest(x: jax.Array) -> str:
        return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()

    arrays = {jax.tree_util.keystr(path): digest(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, sum(x.nbytes for x in jax.tree.leaves(state)))
    checkpoint.orbax().save(folder.absolute() / f"{step:09d}", state, custom_metadata={"arrays": arrays})


@jax.jit
def work(x: jax.Array, count: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, count, lambda i, y: jnp.tanh(y @ x), x)


class Training:
    """Steps of about SECONDS, timed from end to end."""

    def __init__(self, copies: int):
        self.state = make_state(copies)
        self.update = jax.jit(
            lambda state, y: jax.tree.map(lambda x: x + 1e-9 * y[0, 0], state), donate_argnums=0, keep_unused=True
        )
        self.x = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 1024), np.float32)) / 32
        self.count = 1
        self.step()
        while (seconds := min(self.step() for _ in range(3))) < SECONDS:
            self.count = max(self.count + 1, min(4 * self.count, int(self.count * SECONDS / seconds)))
        self.usual = statistics.median(self.step() for _ in range(9))
        self.ended = time.perf_counter()

    def step(self) -> float:
        """Seconds since the end of the step before."""
        began = getattr(self, "ended", time.perf_counter())
        self.state = self.update(self.state, work(self.x, jnp.int32(self.count)))
        jax.block_until_ready(self.state)
        self.ended = time.perf_counter()
        return self.ended - began


def measure(training: Training, folder: Path, step: int, save: Any) -> dict[str, float]:
    """One save among steps."""
    for _ in range(3):
        training.step()
    began = time.perf_counter()
    complete = threading.Event()
    seconds: dict[str, float] = {}

    def watch() -> None:
        while step not in checkpoint.steps(folder):
            time.sleep(0.005)
        seconds["written"] = time.perf_counter() - began
        complete.set()

    threading.Thread(target=watch, daemon=True).start()
    save(step, training.state)
    seconds["blocked"] = time.perf_counter() - began
    seconds["pause"] = seconds["lost"] = training.step() - training.usual
    while not complete.is_set():
        seconds["lost"] += training.step() - training.usual
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written and removed again")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--copies", type=int, default=4, help="of the arrays of a ResNet-50, 102 MB each")
    args = parser.parse_args()
    training = Training(args.copies)
    size = sum(x.nbytes for x in jax.tree.leaves(training.state)) / 1e6
    print(f"{size:.0f} MB on {jax.devices()[0].device_kind}, {os.cpu_count()} CPUs, a step {training.usual:.3f} s")
    rows: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        before, now = Path(place) / "before", Path(place) / "now"
        before.mkdir()
        with checkpoint.Checkpoints(now, 1, print) as checkpoints:
            for number in range(args.saves + 1):  # the first of each compiles and warms up
                rows["before"].append(
                    measure(training, before, number, lambda step, state: save_as_before(before, step, state))
                )
                shutil.rmtree(before / f"{number:09d}")
                rows["now"].append(measure(training, now, number, checkpoints.save))
                checkpoints.wait()
    columns = ("blocked", "pause", "lost", "written")
    print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name, measured in rows.items():
        for label, some in ((f"{name}, first save", measured[:1]), (name, measured[1:])):
            print(f"| {label} | " + " | ".join(f"{statistics.median(s[c] for s in some):.2f}" for c in columns) + " |")


if __name__ == "__main__":
    main()
