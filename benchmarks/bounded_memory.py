"""Peak memory of each command on 1.3 million small images that are decoded on demand, as ImageNet has to be.

    PYTHONPATH=. python benchmarks/bounded_memory.py --out=benchmarks/results/bounded_memory.csv

The images are this module, a data source (`config.data.name=benchmarks.bounded_memory`): 16 x 16 px, ten classes, each
a PNG in memory that is decoded whenever it is read. `data.memory_gb` is set so low (0.1) that neither the images (1.0
GB) nor their embeddings are held: what a command needs does then not depend on their number, but for names and labels.
The peak is that of the operating system (ru_maxrss of the process, the program itself included).
"""

import argparse
import csv
import functools
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data import Source
from ssl_jax.data.source import pick_parts

CLASSES, SIZE, DISTINCT = 10, 16, 4_096
CODE = "import sys; from ssl_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
ON_DEMAND = ["--config.data.memory_gb=0.1"]


def read(data: Data) -> Source:
    """data.path: the number of training images; 10,000 others are for tests."""
    parts = {"train": range(int(data.path)), "test": range(DISTINCT // 2, DISTINCT // 2 + 10_000)}
    picked = pick_parts(parts, data.split, "bounded_memory")
    keys = np.concatenate([np.arange(part.start, part.stop) for part in picked])[: data.limit or None]
    return Source(
        [f"{i}.png" for i in range(len(keys))],
        (SIZE, SIZE, 3),
        lambda i: np.asarray(Image.open(io.BytesIO(_png(int(keys[i]) % DISTINCT)))),
        labels=(keys % DISTINCT % CLASSES).astype(np.int32),
        classes=[f"class {c}" for c in range(CLASSES)],
        workers=data.workers,
    )


@functools.cache
def _png(number: int) -> bytes:
    """A wave whose direction tells the class, under noise."""
    rng = np.random.default_rng(number)
    angle = np.pi * (number % CLASSES) / CLASSES
    y, x = np.mgrid[:SIZE, :SIZE]
    wave = np.sin(x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 2 * np.pi))
    image = 128 + 50 * wave[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 40, (SIZE, SIZE, 3))
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def commands(root: Path, images: int, encoder: list[str]) -> dict[str, list[str]]:
    """By name, in the order in which they need each other."""
    run, source = str(root / "run"), "benchmarks.bounded_memory"
    knn = [f"--workdir={run}", *ON_DEMAND]
    few = ["--config.finetune.steps=20", "--config.finetune.epochs=0", "--config.finetune.lr=(0.001,)"]
    return {
        "pretrain, 100 steps": ["pretrain", "simclr", f"{source}:{images}", f"--workdir={run}", "--steps=100"]
        + ["--batch=128", "--config.optim.warmup=0 steps", "--config.eval.every=100 steps", *encoder, *ON_DEMAND],
        "evaluate knn": ["evaluate", *knn, "--protocol=knn"],
        "evaluate linear_quick": ["evaluate", *knn, "--protocol=linear_quick"],
        "evaluate linear, 1 epoch": ["evaluate", *knn, "--protocol=linear", "--config.linear.epochs=1"],
        "embed to a folder": ["embed", run, f"{source}:{images}", f"--out={root / 'embeddings'}", *ON_DEMAND],
        "embed to a file": ["embed", run, f"{source}:{images}", f"--out={root / 'embeddings.npz'}", *ON_DEMAND],
        "finetune on a tenth": ["finetune", run, f"{source}:{images // 10}", f"--out={root / 'classifier'}", *few]
        + ["--config.data.memory_gb=0.01"],
        "predict": ["predict", str(root / "classifier"), f"{source}:{images}", f"--out={root / 'predictions.csv'}"]
        + ON_DEMAND,
    }


def measure(arguments: list[str], log: Path) -> dict[str, float]:
    """Peak memory in GB, and seconds."""
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", CODE, *arguments], stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)}: failed\n{log.read_text()[-2000:]}")
    cpu = used.ru_utime + used.ru_stime
    return {"peak_gb": used.ru_maxrss * 1024 / 1e9, "seconds": time.monotonic() - start, "cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--root", type=Path, default=Path("runs/bounded_memory"))
    parser.add_argument("--only", default="", help="names of commands that begin so, separated by semicolons")
    parser.add_argument("--width", type=float, default=0.5, help="of resnet_thin: its embeddings have 96 x width")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    rows = []
    encoder = ["--model=resnet_thin", f"--config.model.width={args.width}"]
    for name, command in commands(args.root, args.images, encoder).items():
        if args.only and not name.startswith(tuple(args.only.split(";"))):
            continue
        found = measure(command, args.root / f"{name.replace(' ', '_')}.log")
        rows.append({"command": name, "images": args.images, **{k: f"{v:.2f}" for k, v in found.items()}})
        print(rows[-1], flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
