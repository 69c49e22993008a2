"""Measures what large batches cost on small memory: peak memory and time.

    python benchmarks/memory.py                 all cases, on an idle machine; 12 minutes on two cores
    python benchmarks/memory.py --cases=losses  only the losses (or: step)

Each case runs in a process of its own and is a row of benchmarks/results/memory.csv; what it says is in
benchmarks/scale.md. Peak memory is that of the whole process (resident), with Python, JAX and the compiler. For a
training step, program_mb is the compiler's count of what its program needs besides state and images.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# name: (kind, arguments of `loss` or `step`). dense: the loss as a whole N x N matrix, not in chunks.
CASES = {
    "nothing, jax imported": ("losses", {}),
    "nt_xent, N = 65,536, D = 128": ("losses", {"kind": "nt_xent", "pairs": 32_768, "dim": 128}),
    "nt_xent, N = 8,192, D = 128": ("losses", {"kind": "nt_xent", "pairs": 4_096, "dim": 128}),
    "nt_xent, N = 8,192, D = 128, dense": ("losses", {"kind": "nt_xent", "pairs": 4_096, "dim": 128, "dense": True}),
    "barlow_twins, B = 1,024, D = 8,192": ("losses", {"kind": "barlow_twins", "pairs": 1_024, "dim": 8_192}),
    "vicreg, B = 1,024, D = 8,192": ("losses", {"kind": "vicreg", "pairs": 1_024, "dim": 8_192}),
    "barlow_twins, B = 2,048, D = 8,192": ("losses", {"kind": "barlow_twins", "pairs": 2_048, "dim": 8_192}),
    "vicreg, B = 2,048, D = 8,192": ("losses", {"kind": "vicreg", "pairs": 2_048, "dim": 8_192}),
    "simclr, batch 64": ("step", {"batch": 64}),
    "simclr, batch 4,096 in micro-batches of 64": ("step", {"batch": 4_096, "micro_batch": 64}),
}
REPEATS = 3


def loss(kind: str, pairs: int, dim: int, dense: bool = False) -> dict:
    """Times the value and gradient of a loss of two views."""
    import jax
    import numpy as np

    from ssl_jax import losses
    from ssl_jax.losses import contrastive

    if dense:
        contrastive.DENSE_UP_TO = 2**62
    hyper: dict = {
        "nt_xent": {"temperature": 0.1},
        "barlow_twins": {"off_diagonal": 0.005},
        "vicreg": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
    }[kind]
    rng = np.random.default_rng(0)
    views = [jax.device_put(rng.standard_normal((pairs, dim), np.float32)) for _ in range(2)]
    run = jax.jit(jax.value_and_grad(lambda a, b: getattr(losses, kind)(a, b, **hyper), argnums=(0, 1)))
    return {"seconds": timed(lambda: jax.block_until_ready(run(*views)))}


def step(batch: int, micro_batch: int = 0) -> dict:
    """Times a training step of SimCLR with ResNet-18 at 32 px, its images on the device as in a run."""
    import jax
    import numpy as np

    from ssl_jax.config import default, resolve
    from ssl_jax.data.source import Source
    from ssl_jax.parallel import make_mesh
    from ssl_jax.train import init_state, make_step, set_up

    config = default("simclr")
    config.data.update({"name": "synthetic", "size": 32})
    config.augment.preset = "small"
    config.train.update({"batch": batch, "micro_batch": micro_batch, "bn_group": micro_batch and 64, "devices": 1})
    config.eval.online_probe = False
    resolved = resolve(config)
    images = np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), np.uint8)
    source = Source([str(i) for i in range(len(images))], images.shape[1:], images.__getitem__)
    mesh, setup = make_mesh(1, batch, micro_batch), set_up(resolved, source)
    state, store = init_state(setup, 0, mesh), jax.device_put(images)
    run, index = make_step(setup, resolved, mesh), np.arange(batch, dtype=np.int32)
    program = jax.jit(lambda state, store, index: run(state, {"image": store[index], "index": index}), donate_argnums=0)
    compiled = program.lower(state, store, index).compile()

    def once():
        nonlocal state
        state, metrics = compiled(state, store, index)
        jax.block_until_ready(metrics)

    seconds = timed(once)
    program_mb = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return {"seconds": seconds, "images_per_s": round(batch / seconds, 1), "program_mb": round(program_mb, 1)}


def timed(run) -> float:
    """Median seconds of three runs after a warm-up; if that takes over a minute, its own seconds."""
    times = []
    while len(times) <= REPEATS:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
        if times[0] > 60:
            return round(times[0], 4)
    return round(statistics.median(times[1:]), 4)


def measure(name: str) -> dict:
    """Runs a case in this process; returns its row."""
    kind, arguments = CASES[name]
    result: dict = {}
    if "kind" in arguments:
        result = loss(**arguments)
    elif arguments:
        result = step(**arguments)
    else:
        import jax.numpy as jnp

        import ssl_jax.losses  # noqa: F401

        jnp.zeros(1).block_until_ready()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    fields = ("seconds", "images_per_s", "program_mb")
    return {"case": name, "kind": kind, "peak_gb": round(peak, 3)} | {key: result.get(key, "") for key in fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="", help="losses or step (default: both)")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the case to measure in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    names = [name for name, (kind, _) in CASES.items() if args.cases in ("", kind)]
    if not names:
        sys.exit(f"--cases={args.cases}: unknown; allowed: {', '.join(sorted({k for k, _ in CASES.values()}))}")
    path = RESULTS / "memory.csv"
    results = []
    if path.exists():
        with path.open() as file:
            results = [row for row in csv.DictReader(file) if row["case"] not in names]
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, f"--one={name}"], stdout=subprocess.PIPE, text=True, check=True
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[-1])
        writer.writeheader()
        writer.writerows(results)


if __name__ == "__main__":
    main()
