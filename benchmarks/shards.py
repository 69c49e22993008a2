"""Data sets larger than memory: how long opening 1.3 million images in tars takes, and the peak of resident memory.

    python benchmarks/shards.py write   FOLDER [--images=1300000 --tars=130]
    python benchmarks/shards.py measure FOLDER [--steps=200 --index=EMPTY]

`write` makes gray PNGs of 16 x 16 px with an integer label: blurred noise around a class's mean. Ten different tars are
made; the others repeat them, which neither the index nor the memory can tell. `measure` opens them twice, first without
an index, and pretrains for some steps with config.data.engine=auto, which takes the disk. Each is a process of its own;
its peak is that of the kernel (ru_maxrss), which counts no file cache. With other work on the machine, "cpu s" says
more than seconds.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

DIFFERENT = 10  # tars
SIDE, CLASSES = 16, 10
OPEN = """
import sys, time
from ssl_jax.config import Data
from ssl_jax.data import open_source
start, cpu = time.monotonic(), time.process_time()
source = open_source(Data(name="webdataset", path=sys.argv[1], size=32, channels=3))
opened, cpu = time.monotonic() - start, time.process_time() - cpu
rng, start = __import__("numpy").random.default_rng(0), time.monotonic()
source.load_many(rng.integers(0, len(source), 2000))
print(len(source), opened, cpu, 2000 / (time.monotonic() - start))
"""


def write(folder: Path, images: int, tars: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    each, rng = images // tars, np.random.default_rng(0)
    means = rng.uniform(0, 255, (CLASSES, 4, 4, 1, 1)) * np.ones((1, 1, 1, 4, 4))
    means = means.transpose(0, 1, 3, 2, 4).reshape(CLASSES, SIDE, SIDE)
    for number in range(min(tars, DIFFERENT)):
        labels = rng.integers(0, CLASSES, each)
        pixels = np.clip(means[labels] + rng.normal(0, 40, (each, SIDE, SIDE)), 0, 255).astype(np.uint8)
        with tarfile.open(folder / f"train-{number:06d}.tar", "w") as tar:
            for i in range(each):
                png = io.BytesIO()
                Image.fromarray(pixels[i]).save(png, "PNG")
                for kind, content in (("png", png.getvalue()), ("cls", str(labels[i]).encode())):
                    member = tarfile.TarInfo(f"{number:03d}{i:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for number in range(DIFFERENT, tars):
        shutil.copyfile(folder / f"train-{number % DIFFERENT:06d}.tar", folder / f"train-{number:06d}.tar")


def run(*command: str) -> tuple[str, dict[str, float]]:
    """(stdout; seconds, seconds of the processor, peak of resident memory in GB) of a process."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    seconds, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    return text, {"seconds": round(seconds, 1), "cpu s": round(cpu, 1), "peak GB": round(usage.ru_maxrss / 1e6, 2)}


def measure(folder: Path, steps: int, index: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(index)
    for name in ("without an index", "again"):
        text, used = run("-c", OPEN, str(folder))
        images, seconds, cpu, rate = map(float, text.split())
        found = {"images": images, "opening s": seconds, "opening cpu s": cpu, "then images/s": rate}
        print(json.dumps({name: found, "process": used}), flush=True)
    size = sum(path.stat().st_size for path in index.rglob("*.npz"))
    print(json.dumps({"index MB": size / 1e6}), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        flags = [f"--workdir={temporary}/run", f"--steps={steps}", "--config.data.size=32", "--config.data.channels=3"]
        flags += ["--config.model.name=resnet_thin", "--config.model.width=0.25", "--config.train.batch=256"]
        flags += ["--config.optim.warmup=0 steps"]
        _, used = run("-m", "ssl_jax.cli", "pretrain", "simclr", f"webdataset:{folder}", *flags)
        print(json.dumps({"pretraining": {"steps": steps, **used}}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--tars", type=int, default=130)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--index",
        type=Path,
        default=Path(tempfile.gettempdir()) / "shards_index",
        help="folder for the index; new for the first time",
    )
    given = parser.parse_args()
    if given.what == "write":
        write(given.folder, given.images, given.tars)
    else:
        measure(given.folder, given.steps, given.index)
