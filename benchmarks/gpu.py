"""A training step on one GPU: images/s and peak memory of the published recipes, and of PyTorch beside SimCLR's.

    make bench-gpu                                   all cases, each in a process of its own; about a minute each
    python benchmarks/gpu.py "--cases=simclr;torch"  some of them

The data are random images that lie in the device's memory; views are drawn in the step, as in a run. Peak memory is
what the device's allocator counted at most (PyTorch: of tensors). A line a case is added to
benchmarks/results/gpu.csv under the device's name, and the table results/gpu.md is made of all lines.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = 4096  # of 224 px, on the device
CASES = {  # name: recipe of configs/imagenet.py, and what is changed
    "simclr": ("simclr", {"train.batch": 256, "model.dtype": "bfloat16"}),
    "simclr, float32": ("simclr", {"train.batch": 256}),
    "simclr, 4,096 in micro-batches": (
        "simclr",
        {"train.batch": 4096, "train.micro_batch": 256, "model.dtype": "bfloat16"},
    ),
    "moco_v2": ("moco_v2", {"train.batch": 256, "model.dtype": "bfloat16"}),
    "byol": ("byol", {"train.batch": 256, "model.dtype": "bfloat16"}),
    "swav": ("swav", {"train.batch": 256, "model.dtype": "bfloat16"}),
    "dino, ViT-S": ("dino", {"train.batch": 128, "model.dtype": "bfloat16"}),
    "mae, ViT-B": ("mae", {"train.batch": 256, "model.dtype": "bfloat16"}),
}
PEER = "torch"  # SimCLR on ResNet-50, batch 256, bfloat16 by autocast, channels last, views that lie ready


def measure(step, wait, seconds: float = 5.0, least: int = 5) -> float:
    """The median time of a step, over `seconds` or `least` steps."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        wait(step())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(name: str) -> dict:
    import jax
    import numpy as np

    from ssl_jax.config import resolve
    from ssl_jax.config_file import load_config
    from ssl_jax.data.source import Source
    from ssl_jax.parallel import make_mesh
    from ssl_jax.train import init_state, make_step, set_up

    recipe, changes = CASES[name]
    flags = [f"--config.{key}={value}" for key, value in {"eval.online_probe": False, **changes}.items()]
    config = resolve(load_config(f"imagenet:{recipe}", flags))
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 224, 224, 3), np.uint8)
    source = Source([str(i) for i in range(IMAGES)], images.shape[1:], images.__getitem__)
    mesh = make_mesh(1, config.train.batch, config.train.micro_batch)
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
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) - images.nbytes
    return {
        "device": device.device_kind,
        "software": f"jax {jax.__version__}",
        "model": config.model.name,
        "batch": config.train.batch,
        "micro_batch": config.train.micro_batch,
        "dtype": config.model.dtype,
        "step_s": round(seconds, 4),
        "images_per_s": round(config.train.batch / seconds),
        "peak_gb": round(peak / 2**30, 2),
        "compile_s": round(compiling, 1),
    }


def torch_peer() -> dict:
    import torch
    import torchvision
    from torch.nn import functional

    torch.backends.cudnn.benchmark = True
    net = torchvision.models.resnet50()
    net.fc = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 128))
    net = net.cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    batch = 256
    x = torch.rand(2 * batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    other = torch.arange(2 * batch, device="cuda").roll(batch)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            z = functional.normalize(net(x).float(), dim=1)
            logits = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        functional.cross_entropy(logits.float(), other).backward()
        optimizer.step()

    step()
    seconds = measure(step, lambda _: torch.cuda.synchronize())
    return {
        "device": torch.cuda.get_device_name(),
        "software": f"torch {torch.__version__}",
        "model": "resnet50",
        "batch": batch,
        "micro_batch": 0,
        "dtype": "bfloat16",
        "step_s": round(seconds, 4),
        "images_per_s": round(batch / seconds),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "compile_s": 0.0,
    }


def table(path: Path) -> str:
    head = ["device", "case", "software", "model", "batch", "micro-batch", "dtype", "images/s", "peak GB", "compile s"]
    keys = ["device", "case", "software", "model", "batch", "micro_batch", "dtype", "images_per_s", "peak_gb"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    with path.open() as file:
        for row in csv.DictReader(file):
            lines.append("| " + " | ".join(row[key] for key in [*keys, "compile_s"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", help=f"separated by ';' (default: all): {'; '.join([*CASES, PEER])}")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measured in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps({"case": args.one, **(torch_peer() if args.one == PEER else ours(args.one))}))
        return
    names = args.cases.split(";") if args.cases else [*CASES, PEER]
    for name in names:
        if name not in [*CASES, PEER]:
            sys.exit(f"--cases={name}: unknown; allowed, separated by ';': {'; '.join([*CASES, PEER])}")
    path = RESULTS / "gpu.csv"
    for name in names:
        done = subprocess.run([sys.executable, __file__, f"--one={name}"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: failed, see above", file=sys.stderr)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
    if path.exists():
        (RESULTS / "gpu.md").write_text(table(path))


if __name__ == "__main__":
    main()
