"""Which labels, and what is spread from them, on frozen embeddings of training images: minutes.

python benchmarks/few_labels.py runs/demo/pretrain/simclr --out=benchmarks/results/few_labels.csv
python benchmarks/few_labels.py RUN --data=DIR                  a folder with one sub-folder per class

A pool of training images, of Fashion-MNIST if no folder is named, all of whose labels but the chosen ones are hidden.
Each number is the share of the others that get their right class. `--images=60000 --seeds=1` also tells how long the
parts take on a pool of that size.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data import open_source
from ssl_jax.encoder import load_encoder
from ssl_jax.evaluate import Neighbourhood, linear_probe, propagate
from ssl_jax.evaluate.propagation import aligned
from ssl_jax.selection import select

COUNTS = (20, 50, 250)
FIRST = 100  # seeds from here on: those of the studies begin at 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="run folder, or folder of an exported encoder")
    parser.add_argument("--data", default="")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("few_labels.csv"))
    given = parser.parse_args()
    encoder = load_encoder(given.run)
    data = Data(name="folder", path=given.data) if given.data else Data(name="fashion_mnist")
    source = open_source(encoder.data(data))
    rows = np.sort(np.random.default_rng(99).permutation(len(source))[: given.images])
    features, truth = timed("embedding", encoder.embed, source.arrays()[rows]), np.asarray(source.labels)[rows]
    pool, results = timed("graph", Neighbourhood, features), []
    for seed in range(FIRST, FIRST + given.seeds):
        for draw in ("random", "typical"):
            order = timed(f"select, {draw}", select, features, max(COUNTS), draw, seed=seed)
            for count in COUNTS:
                for name, guess in answers(features, truth, pool, order[:count], seed, len(source.classes)):
                    correct = np.delete(guess == truth, order[:count]).mean()
                    results.append({"seed": seed, "draw": draw, "labels": count, "answer": name, "top1": correct})
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    summarise(results)


def answers(features, truth, pool, index, seed, classes):
    """(name, class of each image int [N]) by each way to learn from the labels of the images at `index`."""
    known, labels = features[index], truth[index]
    yield "linear", linear_probe(known, labels, classes=classes, seed=seed).scores(features).argmax(axis=1)
    hidden = np.full(len(truth), -1)
    hidden[index] = labels
    yield "propagate", timed("propagate", propagate, features, hidden, classes).argmax(axis=1)
    shares = timed("spread", pool.spread, known, labels, classes)
    for align in (False, True, "equal"):
        yield f"pool, align={align}", aligned(shares, labels, align).argmax(axis=1)


def timed(what, function, *given, **options):
    start, cpu = time.monotonic(), time.process_time()
    result = function(*given, **options)
    print(f"{what}: {time.monotonic() - start:.1f} s, {time.process_time() - cpu:.1f} s of CPU", flush=True)
    return result


def summarise(results):
    for draw, count in dict.fromkeys((row["draw"], row["labels"]) for row in results):
        here = [row for row in results if (row["draw"], row["labels"]) == (draw, count)]
        names = dict.fromkeys(row["answer"] for row in here)
        means = {name: 100 * np.mean([row["top1"] for row in here if row["answer"] == name]) for name in names}
        print(f"{count} labels, {draw}: " + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items()))


if __name__ == "__main__":
    main()
