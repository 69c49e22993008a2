"""A training step on one GPU: images/s and peak memory of every published recipe, and of PyTorch beside it.

    make bench-gpu                                                      every case, each in a process of its own
    python benchmarks/gpu.py --peer=peer/bin/python "--cases=simclr"    one case, by a python with lightly and timm
    python benchmarks/gpu.py --tiny --out=/tmp/gpu                      a dry run: small shapes, on a CPU, too

About a minute a case for ssl_jax, and as long for each of eager and compiled PyTorch (gpu_peer.py). The data are random
images that lie in the device's memory; ssl_jax draws its views in the step, as in a run, PyTorch finds them ready. Peak
memory is what the device's allocator counted at most (PyTorch: of tensors). A line for each case and side is added to
benchmarks/results/gpu.csv under the device's name, and the table results/gpu.md is made of all lines.
"""

import argparse
import csv
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = 4096  # on the device
RECIPES = (  # of configs/imagenet.py
    *("simclr", "moco_v1", "moco_v2", "moco_v3", "moco_v3_vit_small", "byol", "simsiam", "barlow_twins", "vicreg"),
    *("vicregl", "tico", "swav", "swav_256", "dino", "dino_resnet50", "instance_discrimination", "rotation", "jigsaw"),
    *("mae", "simmim"),
)
HALF = {"train.batch": 256, "model.dtype": "bfloat16", "train.micro_batch": 0}
SMALLER = {"dino": 128, "simmim": 128, "mae": 256, "rotation": 128}  # batches
CASES = {name: (name, HALF | {"train.batch": SMALLER.get(name, 256)}) for name in RECIPES}
CASES |= {  # name: recipe, and what is changed
    "simclr, float32": ("simclr", HALF | {"model.dtype": "float32"}),
    "simclr, 4,096 in micro-batches": ("simclr", HALF | {"train.batch": 4096, "train.micro_batch": 256}),
}
SIDES = ("ssl_jax", "eager", "compiled")  # the last two: PyTorch
# Put together by gpu_peer.py of what lightly and transformers have; it has none of the others.
PEERS = ("simclr", "moco_v2", "byol", "simsiam", "barlow_twins", "vicreg", "tico", "swav", "swav_256", "dino")
PEERS = (*PEERS, "dino_resnet50", "mae", "simmim", "simclr, float32")


def measure(step, wait, seconds: float = 5.0, least: int = 5) -> float:
    """The median time of a step, over `seconds` or `least` steps."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        wait(step())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def config_of(name: str, tiny: bool):
    from ssl_jax.config import resolve
    from ssl_jax.config_file import load_config

    recipe, changes = CASES[name]
    changes = {"eval.online_probe": False, **changes}
    if tiny:
        model = load_config(f"imagenet:{recipe}", ()).model.name
        smaller = {"model.name": "vit_tiny", "model.depth": 2, "model.patch": 16} if "vit" in model else {}
        small = smaller or {"model.name": "resnet18"}
        changes |= {"train.batch": 16, "data.size": 96 if recipe == "jigsaw" else 64, **small}
        changes |= {"train.micro_batch": min(8, changes["train.micro_batch"]), "model.dtype": "float32"}
    return resolve(load_config(f"imagenet:{recipe}", [f"--config.{key}={value}" for key, value in changes.items()]))


def ours(name: str, tiny: bool) -> dict:
    import jax
    import numpy as np

    from ssl_jax.data.source import Source
    from ssl_jax.parallel import make_mesh
    from ssl_jax.train import init_state, make_step, set_up

    config = config_of(name, tiny)
    shape = (64 if tiny else IMAGES, config.data.size, config.data.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    source = Source([str(i) for i in range(len(images))], images.shape[1:], images.__getitem__)
    mesh = make_mesh(1, config.train.batch, config.train.part)
    setup = set_up(config, source)
    state, store = init_state(setup, 0, mesh), jax.device_put(images)
    run = make_step(setup, config, mesh)

    def step(state, store, index):
        return run(state, {"image": store[index], "index": index})

    index = np.arange(config.train.batch, dtype=np.int32)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, store, index).compile()
    compiling = time.perf_counter() - began

    def once():
        nonlocal state
        state, metrics = compiled(state, store, index)
        return metrics

    jax.block_until_ready(once())
    seconds = measure(once, jax.block_until_ready)
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", images.nbytes) - images.nbytes
    return {
        "device": device.device_kind,
        "software": f"jax {jax.__version__}",
        "model": config.model.name,
        "batch": config.train.batch,
        "micro_batch": config.train.part,
        "dtype": config.model.dtype,
        "step_s": round(seconds, 4),
        "images_per_s": round(config.train.batch / seconds),
        "peak_gb": round(peak / 2**30, 2),
        "compile_s": round(compiling, 1),
    }


def settings_of(name: str, side: str, tiny: bool) -> dict:
    """What benchmarks/gpu_peer.py reads, from the resolved recipe of ours."""
    import jax
    import numpy as np

    from ssl_jax.data.source import Source
    from ssl_jax.train import set_up

    config = config_of(name, tiny)
    image = np.zeros((config.data.size, config.data.size, 3), np.uint8)
    setup = set_up(config, Source(["a"] * 2 * config.train.batch, image.shape, lambda _: image))
    return {
        "method": {"name": config.method_name, **dataclasses.asdict(config.method)},
        "model": config.model.name,
        "features": {"resnet18": 512, "resnet50": 2048, "vit_tiny": 192, "vit_small": 384}.get(config.model.name, 0),
        "views": [view.size for view in setup.views],
        "batch": config.train.batch,
        "dtype": config.model.dtype,
        "steps": 1000,
        "epoch_steps": 100,
        "device": "cpu" if jax.devices()[0].platform == "cpu" else "cuda",
        "compiled": side == "compiled",
    }


def table(path: Path) -> str:
    """Markdown: a line for each device and case; images/s, memory and time of compilation of each side."""
    with path.open() as file:
        found = {(row["device"], row["case"], row["side"]): row for row in csv.DictReader(file)}  # the last one counts
    head = ["device", "case", "model", "batch", "dtype", "images/s: ssl_jax", "eager", "compiled", "ssl_jax / compiled"]
    head += ["peak GB: ssl_jax", "eager", "compiled", "compile s: ssl_jax", "compiled"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for device, case in dict.fromkeys(key[:2] for key in found):
        sides = [found.get((device, case, side), {}) for side in SIDES]
        about = next(row for row in sides if row)
        cells = [device, case, *(about[key] for key in ("model", "batch", "dtype"))]
        cells += [row.get("images_per_s", "") for row in sides]
        cells.append(f"{int(cells[5]) / int(cells[7]):.2f}" if cells[5] and cells[7] else "")
        cells += [row.get("peak_gb", "") for row in sides] + [sides[i].get("compile_s", "") for i in (0, 2)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(name: str, side: str, args: argparse.Namespace) -> dict | None:
    """One measurement, in a process of its own; None if it failed."""
    command = [sys.executable, __file__, f"--one={name}", f"--side={side}", *(["--tiny"] if args.tiny else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if side != "ssl_jax" and not done.returncode:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(done.stdout.splitlines()[-1])
            file.flush()
            peer = [args.peer, Path(__file__).with_name("gpu_peer.py"), file.name]
            done = subprocess.run(list(map(str, peer)), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name}, {side}: failed, see above", file=sys.stderr)
        return None
    return {"case": name, "side": side, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", help=f"separated by ';' (default: all): {'; '.join(CASES)}")
    parser.add_argument("--sides", default=",".join(SIDES), help="which to measure")
    parser.add_argument("--peer", default=sys.executable, help="python with torch, torchvision, lightly, timm")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.csv and gpu.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = ours(args.one, args.tiny) if args.side == "ssl_jax" else settings_of(args.one, args.side, args.tiny)
        print(json.dumps(found))
        return
    names = args.cases.split(";") if args.cases else list(CASES)
    for name in names:
        if name not in CASES:
            sys.exit(f"--cases={name}: unknown; allowed, separated by ';': {'; '.join(CASES)}")
    for side in args.sides.split(","):
        if side not in SIDES:
            sys.exit(f"--sides={side}: unknown; allowed: {', '.join(SIDES)}")
    if args.tiny and args.out == RESULTS:
        sys.exit("--tiny: measures nothing of use; give it an --out of its own")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.csv"
    for name in names:
        for side in args.sides.split(","):
            row = run(name, side, args) if side == "ssl_jax" or name in PEERS else None
            if row is None:
                continue
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
            (args.out / "gpu.md").write_text(table(path))


if __name__ == "__main__":
    main()
