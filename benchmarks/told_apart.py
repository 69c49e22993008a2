"""Methods told apart from random weights and from each other, ssl_jax beside lightly: kNN and linear, three seeds.

    python benchmarks/told_apart.py --peer=peer/bin/python --at-once=2           two CPU cores, about two hours
    python benchmarks/told_apart.py gpu --peer=peer/bin/python --minutes=60      one GPU; fits itself into the time
    python benchmarks/told_apart.py --table                                      what is finished so far

Both train on all 60,000 images of Fashion-MNIST with the same network, views, batch, steps and optimizer: lightly's
side (lightly_peer.py) reads the resolved config of ours. Both export embeddings of the training and the test images,
and one function judges them after the last step. First a few steps of every cell are timed; then it says what it will
do and how long that takes. With --minutes it takes as many epochs as fit, and drops seeds before it goes below LEAST
epochs. That plan is kept in the workdir. A finished cell is not run again; ours goes on from its last checkpoint,
lightly's starts again. The environment of the peer: benchmarks/README.md, "Against lightly".
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

# A GPU is shared by the processes that take turns on it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
from against_lightly import ALL, FOR, settings_of, shown

from ssl_jax.config import Data, Model, resolve
from ssl_jax.config_file import load_config
from ssl_jax.data import open_source
from ssl_jax.evaluate import interval, paired
from ssl_jax.files import read_lines
from ssl_jax.run_folder import RunFolder
from ssl_jax.train import set_up

HERE = Path(__file__).resolve().parent
SIDES = ("ssl_jax", "lightly")
FLOOR = "random weights"
SCORES = {  # name: (what it is, neighbours)
    "knn20": ("kNN, 20 neighbours", 20),
    "knn200": ("kNN, 200 neighbours as lightly's benchmarks have it", 200),
    "linear": ("logistic regression", 0),
}
LEAST = 20  # epochs: before fewer are trained, seeds are dropped
VIEWS = {"augment.jitter_prob": 1.0, "augment.brightness": 0.8, "augment.contrast": 0.8}  # methods_fashion_mnist.py
SETUPS: dict[str, dict[str, Any]] = {
    # Rate and temperatures: of the trials in results/methods_trials.csv, which ran ours alone, the best.
    "cpu": {
        "methods": ("simclr", "moco", "supervised"),
        "size": 28,
        "epochs": 4,
        "batch": 128,
        "model": {"model.name": "resnet_thin"},
        "all": {**VIEWS, "optim.lr": 3e-3},
        "for": {"moco": {"method.temperature": 0.4}},
    },
    # Heads as in lightly's cifar10_benchmark.py (MoCo's queue, too), VICReg's as Barlow Twins'. The rate was not tuned.
    "gpu": {
        "methods": (
            *("simclr", "moco", "byol", "simsiam", "barlow_twins", "vicreg", "swav", "dino"),
            "supervised",
        ),
        "size": 32,
        "epochs": 200,
        "batch": 256,
        "model": {"model.name": "resnet18", "model.stem": "small", "model.dtype": "bfloat16", "data.size": 32},
        "all": {**VIEWS, "optim.lr": 1e-3},
        "for": {
            "byol": {"method.hidden": 1024, "method.out": 256},
            "simsiam": {"method.hidden": 2048, "method.out": 2048, "method.bottleneck": 512},
            "barlow_twins": {"method.hidden": 2048, "method.out": 2048, "method.off_diagonal": 5e-3},
            "vicreg": {"method.hidden": 2048, "method.out": 2048},
            "swav": {"method.prototypes": 512},
            "dino": {"method.hidden": 2048, "method.bottleneck": 256, "method.out": 2048},
        },
    },
}


class Runner:
    def __init__(self, args: argparse.Namespace):
        self.args, self.setup, self.timed = args, dict(SETUPS[args.setup]), args.timed
        self.setup["batch"] = args.batch or self.setup["batch"]
        self.workdir = args.workdir.resolve()
        self.cells, self.data = self.workdir / "cells", self.workdir / f"images-{args.images}.npz"
        self.methods = tuple(args.methods.split(",")) if args.methods else self.setup["methods"]
        self.cores = max(1, args.cores // args.at_once)  # of a cell
        self.shares: SimpleQueue[range] = SimpleQueue()
        for number in range(args.at_once):
            self.shares.put(range(number * self.cores, (number + 1) * self.cores))
        self.stopping = threading.Event()

    # One cell.

    def name(self, side: str, method: str, seed: int) -> str:
        return f"{method.replace(' ', '_')}-{seed}-{side}"

    def result(self, side: str, method: str, seed: int) -> dict | None:
        path = self.cells / f"{self.name(side, method, seed)}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def flags(self, method: str, seed: int, epochs: int) -> list[str]:
        steps = epochs * (self.args.images // self.setup["batch"])
        settings = {
            "data.limit": self.args.images,
            "train.batch": self.setup["batch"],
            "train.duration": f"{epochs} epochs",
            "train.seed": seed,
            "train.log_every": f"{self.timed} steps",
            "train.micro_batch": 0,
            "optim.warmup": f"{steps // 10} steps",
            **ALL,
            **self.setup["model"],
            **self.setup["all"],
            **FOR.get(method, {}),
            **self.setup["for"].get(method, {}),
        }
        if method == "swav":
            settings["method.freeze_steps"] = steps // 10
        return [f"--config.{key}={value}" for key, value in settings.items()]

    def train(self, side: str, method: str, seed: int, epochs: int, folder: Path, timed: bool = False) -> dict:
        """Trains one cell: loss of the last step. Or times a few steps of it: seconds of a step, and of the rest."""
        flags = self.flags(method, seed, epochs)
        config = f"methods_fashion_mnist:{method}"
        if side == "ssl_jax":
            command = [sys.executable, "-m", "ssl_jax.cli", "pretrain", f"--config={config}", f"--workdir={folder}"]
            more = [f"--config.train.duration={2 * self.timed} steps", "--config.optim.warmup=0 steps"] if timed else []
            wall = self.start([*command, *flags, *more])
            images_per_s = [line["images_per_s"] for line in read_lines(RunFolder(folder).timing)]
            step = self.setup["batch"] / statistics.median(images_per_s[1:] or images_per_s)
            loss = read_lines(RunFolder(folder).metrics)[-1]["loss"]
            return {"step_s": step, "other_s": max(0.0, wall - 2 * self.timed * step)} if timed else {"loss": loss}
        folder.mkdir(parents=True, exist_ok=True)
        resolved = resolve(load_config(config, flags))
        source, about = self.source(), {key: getattr(self.args, key) for key in ("images", "workers")}
        about = argparse.Namespace(**about, cores=self.cores, epochs=epochs, batch=self.setup["batch"])
        settings = settings_of(resolved, set_up(resolved, source), about, folder)
        settings |= {"device": self.args.device, "timed": self.timed if timed else 0, "classes": len(source.classes)}
        settings["data"] = str(self.data)
        (folder / "settings.json").write_text(json.dumps(settings))
        wall = self.start([self.args.peer, HERE / "lightly_peer.py", folder / "settings.json"])
        found = json.loads((folder / "result.json").read_text())
        other = max(0.0, wall - 2 * self.timed * found["step"])
        return {"step_s": found["step"], "other_s": other} if timed else {"loss": found["loss"]}

    def run(self, side: str, method: str, seed: int, epochs: int) -> dict:
        """Scores of one cell; it is a file once all of it is there."""
        done = self.result(side, method, seed)
        if done:
            return done
        folder, found = self.workdir / self.name(side, method, seed), {}
        if method != FLOOR and not (folder / "trained.json").exists():
            found = self.train(side, method, seed, epochs, folder)
            (folder / "trained.json").write_text(json.dumps(found))
        elif method != FLOOR:
            found = json.loads((folder / "trained.json").read_text())
        began = time.monotonic()
        same = [f"--{key}={getattr(self.args, key)}" for key in ("images", "device")]
        self.start([sys.executable, __file__, self.args.setup, f"--judge={folder}", f"--workdir={self.workdir}", *same])
        scores = json.loads((folder / "scores.json").read_text())
        about = {"side": side, "method": method, "seed": seed, "epochs": epochs if found else 0}
        found = about | found | scores | {"judge_s": time.monotonic() - began}
        self.cells.mkdir(parents=True, exist_ok=True)
        part = self.cells / "part"
        part.write_text(json.dumps(found))
        part.replace(self.cells / f"{self.name(side, method, seed)}.json")
        (folder / "embeddings.npz").unlink(missing_ok=True)
        return found

    def start(self, command: list) -> float:
        """Seconds that a process took, without those in which it stood still because the pause file exists."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.cores), "OMP_WAIT_POLICY": "passive"}
        if self.args.device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        share = self.shares.get()
        process = subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True)
        if self.args.at_once > 1:
            os.sched_setaffinity(process.pid, share)
        pause, stopped, seconds = self.args.pause_file, False, 0.0
        try:
            while process.poll() is None and not self.stopping.is_set():
                if pause and pause.exists() != stopped:
                    stopped = not stopped
                    os.killpg(process.pid, signal.SIGSTOP if stopped else signal.SIGCONT)
                time.sleep(0.2)
                seconds += 0.0 if stopped else 0.2
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.shares.put(share)
        if process.returncode:
            sys.exit(f"ended with status {process.returncode}: {' '.join(map(str, command))}")
        return seconds

    def source(self):
        return open_source(Data(name="fashion_mnist", limit=self.args.images, size=self.setup["size"]))

    def prepare(self) -> None:
        """The images, for lightly and for the judge."""
        if self.data.exists():
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        train = self.source()
        test = open_source(Data(name="fashion_mnist", split="test", size=self.setup["size"]))
        made = {"train": train.arrays(), "labels": np.asarray(train.labels)}
        made |= {"test": test.arrays(), "truth": np.asarray(test.labels)}
        part = self.workdir / "part.npz"
        np.savez(part, **made)
        part.replace(self.data)

    # All cells.

    def order(self, seeds: int) -> list[tuple[str, str, int]]:
        """Those that tell most come first."""
        return [
            (side, method, seed)
            for seed in range(seeds)
            for method in (FLOOR, *self.methods)
            for side in (SIDES[:1] if method == FLOOR else SIDES)
        ]

    def plan(self) -> dict:
        """Seeds, epochs and the times that were measured; a plan that is there is kept."""
        args, path = self.args, self.workdir / "plan.json"
        asked = {key: getattr(args, key) for key in ("setup", "images", "epochs", "seeds", "minutes", "batch")}
        asked["methods"] = list(self.methods)
        if path.exists():
            kept = json.loads(path.read_text())
            for key, value in asked.items():
                if kept["asked"].get(key, 0) != value:
                    sys.exit(f"--{key}={value}: {path} was made with {kept['asked'].get(key)}; take another --workdir")
            return kept
        epochs = args.epochs or self.setup["epochs"]
        judge = self.run(SIDES[0], FLOOR, 0, 0)["judge_s"]
        times = {}
        for method in self.methods:
            for side in SIDES:
                folder = self.workdir / "timing" / self.name(side, method, 0)
                shutil.rmtree(folder, ignore_errors=True)
                times[f"{side} {method}"] = self.train(side, method, 0, max(1, epochs), folder, timed=True)
                took = times[f"{side} {method}"]
                print(f"{side} {method}: {took['step_s']:.3f} s a step, {took['other_s']:.0f} s beside", flush=True)
        seeds, epochs = fit(times, judge, self.steps(1), args.minutes * args.at_once, args.seeds, epochs)
        made = {"asked": asked, "seeds": seeds, "epochs": epochs, "times": times, "judge_s": judge}
        path.write_text(json.dumps(made, indent=1))
        return made

    def steps(self, epochs: int) -> int:
        return epochs * (self.args.images // self.setup["batch"])

    def seconds(self, plan: dict, cell: tuple[str, str, int]) -> float:
        """What a cell takes, by the times of the plan."""
        side, method, _ = cell
        if self.result(*cell):
            return 0.0
        time = plan["times"].get(f"{side} {method}", {"step_s": 0.0, "other_s": 0.0})
        return plan["judge_s"] + time["other_s"] + self.steps(plan["epochs"]) * time["step_s"]

    def all(self) -> None:
        self.prepare()
        plan = self.plan()
        cells = self.order(plan["seeds"])
        told = (
            f"{len(self.methods)} methods, {plan['seeds']} seeds, {plan['epochs']} epochs of {self.args.images} images"
        )
        print(told, flush=True)

        def one(cell: tuple[str, str, int]) -> None:
            if self.result(*cell) or self.stopping.is_set():
                return
            left = sum(self.seconds(plan, other) for other in cells) / self.args.at_once / 60
            done = sum(bool(self.result(*other)) for other in cells)
            told = f"{done} of {len(cells)} done, about {left:.0f} minutes left"
            print(f"{' '.join(map(str, cell))}: {told}", flush=True)
            print(self.run(*cell, plan["epochs"]), flush=True)

        with ThreadPoolExecutor(self.args.at_once) as pool:
            running = [pool.submit(one, cell) for cell in cells]
            try:
                for each in running:
                    each.result()
            finally:
                self.stopping.set()
        print(self.table())

    def table(self) -> str:
        """Markdown, one table for each score: mean ± half of the 95 % interval over seeds, in %."""
        found = [json.loads(path.read_text()) for path in sorted(self.cells.glob("*.json"))]
        trained = sorted({row["epochs"] for row in found if row["epochs"]})
        lines = [f"{self.args.images} images, {', '.join(map(str, trained))} epochs, batch {self.setup['batch']}"]

        def of(side: str, method: str, key: str) -> dict[int, float]:
            some = [row for row in found if (row["side"], row["method"]) == (side, method)]
            return {row["seed"]: 100 * row[key] for row in some}

        for key, (title, _) in SCORES.items():
            floor = list(of(SIDES[0], FLOOR, key).values())
            if not floor:
                continue
            lines += ["", f"{title}; random weights: {shown(*interval(floor))}", ""]
            lines += ["| method | seeds | ssl_jax | lightly | difference | above random weights |", "|" + "---|" * 6]
            for method in self.methods:
                ours, theirs = (of(side, method, key) for side in SIDES)
                both = sorted(ours.keys() & theirs.keys())
                if not ours and not theirs:
                    continue
                cells = [shown(*interval(list(side.values()))) if side else "" for side in (ours, theirs)]
                apart = paired([ours[s] for s in both], [theirs[s] for s in both]) if both else None
                cells.append(shown(*apart, sign="+") if apart else "")
                cells.append(f"{statistics.mean(ours.values()) - statistics.mean(floor):+.1f}" if ours else "")
                lines.append(f"| `{method}` | {len(both)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def fit(times: dict, judge: float, steps: int, minutes: float, seeds: int, epochs: int) -> tuple[int, int]:
    """(seeds, epochs) that take at most `minutes`; 0 minutes: as many as were asked for.

    times: of each side and method, as `Runner.train` measures them; steps: of an epoch; judge: seconds of a cell.

    >>> fit({"a": {"step_s": 0.1, "other_s": 10.0}}, 10.0, 100, 12.0, 3, 200)  # 240 s a seed: 30 s and 21 epochs
    (3, 21)
    >>> fit({"a": {"step_s": 0.1, "other_s": 10.0}}, 10.0, 100, 10.0, 3, 200)  # 17 epochs would be too few
    (2, 27)
    """
    if not minutes:
        return seeds, epochs
    other = sum(time["other_s"] + judge for time in times.values()) + judge
    each = steps * sum(time["step_s"] for time in times.values())
    for fewer in range(seeds, 0, -1):
        fits = int((60 * minutes / fewer - other) / each)
        if fits >= min(LEAST, epochs) or fewer == 1:
            break
    if fits < 1:
        needed = (other + each) / 60
        sys.exit(f"--minutes={minutes:g}: one seed and one epoch of these methods need about {needed:.0f} minutes")
    return fewer, min(fits, epochs)


def judge(folder: Path, images: Path, model: Model, size: int) -> None:
    """Writes scores.json beside the embeddings; those of ssl_jax and of random weights are made here."""
    from ssl_jax.encoder import load_encoder, random_encoder
    from ssl_jax.evaluate import knn_predict, linear_probe, metrics

    data = np.load(images)
    method, seed, side = folder.name.rsplit("-", 2)
    if side == "ssl_jax":
        floor = method == FLOOR.replace(" ", "_")
        encoder = random_encoder(model, size, 1, int(seed)) if floor else load_encoder(folder)
        bank, queries = encoder.embed(data["train"]), encoder.embed(data["test"])
    else:
        made = np.load(folder / "embeddings.npz")
        bank, queries = made["train"], made["test"]
    labels, truth = data["labels"], data["truth"]
    names = [str(c) for c in range(labels.max() + 1)]
    found = {}
    for key, (_, k) in SCORES.items():
        if k:
            votes = knn_predict(bank, labels, queries, classes=len(names), k=min(k, len(bank)), temperature=0.1)
        else:
            votes = linear_probe(bank, labels, classes=len(names), seed=0).scores(queries)
        found[key] = round(metrics(np.asarray(votes), truth, names)["top1"], 4)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(found))


def stop(*_) -> None:
    sys.exit(128 + signal.SIGTERM)  # on the way out, `Runner.start` ends the process that it waits for


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setup", nargs="?", default="cpu", choices=sorted(SETUPS))
    parser.add_argument("--peer", default="peer/bin/python", help="python of the environment with lightly")
    parser.add_argument("--methods", help="default: those of the setup")
    parser.add_argument("--minutes", type=float, default=0.0, help="what all of it may take; 0: what it takes")
    parser.add_argument("--epochs", type=int, default=0, help="at most; 0: those of the setup (cpu 4, gpu 200)")
    parser.add_argument("--seeds", type=int, default=3, help="at most")
    parser.add_argument("--batch", type=int, default=0, help="0: that of the setup (cpu 128, gpu 256)")
    parser.add_argument("--timed", type=int, default=30, help="steps that are timed, after as many that are not")
    parser.add_argument("--images", type=int, default=60_000, help="the first of the training images")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="of all cells that compute at once")
    parser.add_argument("--at-once", type=int, default=1, help="cells that compute at once, each on its share of cores")
    parser.add_argument(
        "--workers", type=int, help="processes of lightly's DataLoader; default: cpu none, gpu as cores"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: that of the setup; gpu on a cpu: a dry run")
    parser.add_argument("--workdir", type=Path, help="default: runs/told_apart/SETUP")
    parser.add_argument("--pause-file", type=Path, help="while this file exists, nothing computes")
    parser.add_argument("--table", action="store_true", help="print what is finished, and run nothing")
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    args.device = args.device or {"cpu": "cpu", "gpu": "cuda"}[args.setup]
    args.workers = args.cores * (args.device == "cuda") if args.workers is None else args.workers
    args.workdir = args.workdir or Path("runs/told_apart") / args.setup
    runner = Runner(args)
    for method in runner.methods:
        if method not in SETUPS["gpu"]["methods"]:
            sys.exit(f"--methods={method}: unknown; allowed: {', '.join(SETUPS['gpu']['methods'])}")
    if args.judge:
        model = resolve(load_config("methods_fashion_mnist:simclr", runner.flags("simclr", 0, 1))).model
        judge(args.judge, runner.data, model, runner.setup["size"])
    elif args.table:
        print(runner.table())
    else:
        runner.all()


if __name__ == "__main__":
    main()
