"""How many images per second and core are decoded and cropped: ssl_jax, torchvision's DataLoader, lightly's dataset.

    python -m venv peer && peer/bin/pip install torch==2.13.0 torchvision==0.28.0 lightly==1.6.0
    python benchmarks/decode_rate.py --peer=peer/bin/python      on an idle machine with two cores or more; Linux

Each side reads the same JPEGs of 500 x 375 px, made here: coloured noise with the spectrum of photographs (amplitude
1 / frequency) and a few shapes, quality 90. It makes two random resized crops of 224 px of each (area 0.08 to 1, ratio
3/4 to 4/3, bilinear), and hands out batches of 64.

ours         `data.batches` with config.data.crops="file": uint8 [B, 224, 224, 3] of each view, and the boxes
square       the same with config.data.crops="square": one image of 224 px, of which views are made on the device
torchvision  ImageFolder, RandomResizedCrop and ToTensor for each view, DataLoader: float32 [B, 3, 224, 224]
lightly      LightlyDataset, MultiViewTransform of the same two transforms, DataLoader

The flip, colours and blur are left out: ours happen on the device, theirs on the host, which would cost them more.

All processes start first and then take turns, each with the cores that it may use (sched_setaffinity); a turn is
IMAGES images after one batch that is not counted. As many workers as cores: threads here, processes there. With one
core the peers also run without a worker, in the process itself. The table has medians over the turns: by the clock, and
by the processor time of the process and its workers, which other programs on the machine disturb less.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FILES, WIDTH, HEIGHT, QUALITY = 400, 500, 375, 90
SIZE, BATCH, IMAGES = 224, 64, 384
OURS, SIDES = ("ours", "square"), ("ours", "torchvision", "lightly", "square")


def make_files(folder: Path) -> None:
    """FILES images in two class folders."""
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    amplitude = 1 / np.maximum(np.hypot(y, x), 1 / WIDTH)
    for i in range(FILES):
        planes = []
        for _ in range(3):
            noise = rng.normal(size=amplitude.shape) + 1j * rng.normal(size=amplitude.shape)
            plane = np.fft.irfft2(noise * amplitude, (HEIGHT, WIDTH))
            planes.append(plane / plane.std())
        gray = planes[0]
        colour = np.stack([gray + 0.4 * plane for plane in planes], axis=-1)
        image = Image.fromarray((128 + 45 * colour).clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for _ in range(4):
            left, top = rng.integers(0, WIDTH - 80), rng.integers(0, HEIGHT - 80)
            box = (left, top, left + rng.integers(20, 80), top + rng.integers(20, 80))
            (pen.ellipse, pen.rectangle)[rng.integers(2)](box, fill=tuple(map(int, rng.integers(0, 256, 3))))
        path = folder / f"{i % 2}" / f"{i:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=QUALITY)


def ours(side: str, folder: Path, workers: int) -> Iterator[int]:
    from ssl_jax.config import Data, View
    from ssl_jax.data import batches, open_source
    from ssl_jax.data.crops import Cutter

    data = Data(name="folder", path=str(folder), size=SIZE, workers=workers)
    source = open_source(data)
    cut = Cutter(data, [View(size=SIZE, crop_scale=(0.08, 1.0))] * 2, (), seed=0, channels=3, size=SIZE)
    options = {"batch": BATCH, "seed": 0, "start": 0, "stop": 10**6, "workers": workers}
    for batch in batches(source, **options, cut=cut if side == "ours" else None):
        assert (batch["crops"][1] if side == "ours" else batch["image"]).shape == (BATCH, SIZE, SIZE, 3)
        yield BATCH


def peer(side: str, folder: Path, workers: int) -> Iterator[int]:
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    one = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.ToTensor()])
    if side == "lightly":
        from lightly.data import LightlyDataset
        from lightly.transforms.multi_view_transform import MultiViewTransform

        dataset = LightlyDataset(str(folder), transform=MultiViewTransform([one, one]))
    else:
        dataset = datasets.ImageFolder(str(folder), transform=lambda image: (one(image), one(image)))
    more = {"prefetch_factor": 2, "persistent_workers": True} if workers else {}
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, **more)
    while True:
        for batch in loader:
            assert batch[0][1].shape == (BATCH, 3, SIZE, SIZE)
            yield BATCH


def serve(side: str, folder: Path) -> None:
    """For each line "cores workers" of stdin, prints images per second, and per second of processor time."""
    print("ready", flush=True)
    for line in sys.stdin:
        cores, workers = map(int, line.split())
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0) | set(range(os.cpu_count() or 1)))[:cores])
        feed = (ours if side in OURS else peer)(side, folder, workers)
        next(feed)
        start, before, made = time.perf_counter(), processor_time(), 0
        while made < IMAGES:
            made += next(feed)
        print(made / (time.perf_counter() - start), made / (processor_time() - before), flush=True)
        feed.close()


def processor_time() -> float:
    """Seconds, of this process and its workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        user, system = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


class Side:
    """One process."""

    def __init__(self, python: str, side: str, folder: Path):
        command = [python, __file__, f"--serve={side}", f"--folder={folder}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        assert self.process.stdout.readline().strip() == "ready"

    def rates(self, cores: int, workers: int) -> tuple[float, float]:
        self.process.stdin.write(f"{cores} {workers}\n")
        wall, processor = map(float, self.process.stdout.readline().split())
        return wall / cores, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="peer/bin/python", help="python of the environment with torch and lightly")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the files are made, and kept; default: nowhere")
    parser.add_argument("--make", action="store_true", help="only make the files")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not list(folder.rglob("*.jpg")):
            make_files(folder)
        if args.make:
            return
        size = statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))
        sides = {name: Side(sys.executable if name in OURS else args.peer, name, folder) for name in SIDES}
        found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for turn in range(args.rounds):
            for cores in args.cores:
                for name in SIDES[turn % 4 :] + SIDES[: turn % 4]:
                    for workers in (cores, 0) if cores == 1 and name not in OURS else (cores,):
                        label = name if workers else f"{name}, no worker"
                        found.setdefault((cores, label), []).append(rates := sides[name].rates(cores, workers))
                        print(turn, cores, label, *map(round, rates), flush=True)
        for each in sides.values():
            each.process.stdin.close()
            each.process.wait()
    print(f"{FILES} JPEGs of {WIDTH} x {HEIGHT} px, {size / 1e3:.0f} kB on average, {args.rounds} turns")
    print("| cores | side | images/s and core | ours to it | images per s of processor time | ours to it |")
    print("|---|---|---|---|---|---|")
    for (cores, name), rates in found.items():
        cells = [str(cores), name]
        for kind in (0, 1):
            ratios = [a[kind] / b[kind] for a, b in zip(found[cores, "ours"], rates, strict=True)]
            cells += [f"{statistics.median(each[kind] for each in rates):.0f}"]
            cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        print(f"| {' | '.join(cells)} |")
    print(json.dumps({f"{cores} {name}": rates for (cores, name), rates in found.items()}))


if __name__ == "__main__":
    main()
