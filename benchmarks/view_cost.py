"""Processor time of a view: python benchmarks/view_cost.py finetune natural

Presets are compared in one process, in turns: 16 images of 256 px become views of 224 px. Processor time, because other
programs on the machine change it less than they change the time that passes.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np

from ssl_jax.augment import PRESETS, make_views

IMAGES, SOURCE, SIZE, ROUNDS = 16, 256, 224, 5


def main(presets: list[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, SOURCE, SOURCE, 3), dtype=np.uint8)
    views = {name: jax.jit(make_views([dataclasses.replace(PRESETS[name][0], size=SIZE)])) for name in presets}
    taken: dict[str, list[float]] = {name: [] for name in presets}
    for key in jax.random.split(jax.random.key(0), ROUNDS + 1):
        for name in presets:
            start = time.process_time()
            jax.block_until_ready(views[name](key, images))
            taken[name].append(time.process_time() - start)
    for name in presets:
        median = statistics.median(taken[name][1:])  # without compiling
        print(f"{name:12} {1e3 * median / IMAGES:.1f} ms of processor time per image")


if __name__ == "__main__":
    main(sys.argv[1:] or ["finetune", "natural"])
