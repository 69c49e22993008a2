"""ssl_jax beside lightly 1.6.0 (PyTorch) on Fashion-MNIST and a CPU: kNN accuracy and time of an epoch, by method.

    python -m venv peer && peer/bin/pip install torch==2.14.1 torchvision==0.29.1 lightly==1.6.0
    python benchmarks/against_lightly.py --peer=peer/bin/python [--methods=simclr,byol] [--seeds=3] [--epochs=3]
    python benchmarks/against_lightly.py --peer=peer/bin/python --images=4096 --seeds=1      times, on an idle machine

Every run is a process, `ssl-jax pretrain` or benchmarks/lightly_peer.py, and the two take turns. The peer reads its
settings from the resolved config of ours: images, views, batch, epochs, AdamW, rate, warm-up, cosine, weight decay,
sizes of heads, temperatures, momentum. The numbers of parameters are compared before the first run. One function
judges both: kNN on the 10,000 test images, all training images used vote. A finished run is a line of
benchmarks/results/against_lightly.csv and is not run again; the table is benchmarks/results/against_lightly.md. With
--shared the machine may do other work: then no times are recorded. What is equal and what is not: benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from methods import add, rows

from ssl_jax.augment import PRESETS
from ssl_jax.config import Config, Data, Model, View, resolve
from ssl_jax.config_file import load_config
from ssl_jax.data import open_source
from ssl_jax.encoder import load_encoder, random_encoder
from ssl_jax.evaluate import interval, knn_predict, metrics, paired
from ssl_jax.files import read_lines
from ssl_jax.models import normalization
from ssl_jax.models.resnet import ARCHITECTURES
from ssl_jax.run_folder import RunFolder
from ssl_jax.train import Setup, set_up

HERE = Path(__file__).resolve().parent
CSV, TABLE = HERE / "results" / "against_lightly.csv", HERE / "results" / "against_lightly.md"
METHODS = ("simclr", "moco", "byol", "simsiam", "barlow_twins", "vicreg", "swav", "dino", "tico")
FLOOR = "random weights"
SAME = ("images", "epochs", "batch", "cores", "shared")  # runs that differ in these are not compared
# What lightly's building blocks cannot follow is switched off here: statistics of BatchNorm in parts of the batch,
# SwAV's queue. Views are those of the preset alone.
ALL = {"eval.every": "0 steps", "eval.online_probe": False}
ALL |= {f"augment.{key}": getattr(PRESETS["grayscale"][0], key) for key in ("jitter_prob", "brightness", "contrast")}
ALL |= {f"augment.{key}": 0.0 for key in ("blur", "solarize", "rotate")}
FOR = {"moco": {"method.bn_groups": 1}, "swav": {"method.queue": 0}}
DRAWN = ("size", "crop_scale", "crop_ratio", "flip", "jitter_prob", "brightness", "contrast")  # of views, by both
GUESS = {"ssl_jax": 500, "lightly": 700}  # images/s on two cores with AVX2, for the estimate before the first run


def flags(method: str, seed: int, args: argparse.Namespace) -> list[str]:
    steps = args.epochs * (args.images // args.batch)
    settings = {
        "data.limit": args.images,
        "train.batch": args.batch,
        "train.duration": f"{args.epochs} epochs",
        "train.seed": seed,
        "train.log_every": "1 epochs",
        "optim.warmup": f"{steps // 10} steps",
        **ALL,
        **FOR.get(method, {}),
    }
    if method == "swav":
        settings["method.freeze_steps"] = steps // 10
    return [f"--config.{key}={value}" for key, value in settings.items()]


def settings_of(config: Config, setup: Setup, args: argparse.Namespace, folder: Path) -> dict:
    """What benchmarks/lightly_peer.py reads: nothing in it that is not in the run of ours."""
    views = [jax.ShapeDtypeStruct((2, v.size, v.size, 1), jnp.float32) for v in setup.views]
    params, _ = jax.eval_shape(setup.method.init, jax.random.key(0), views)
    widths, depths, _ = ARCHITECTURES[config.model.name]
    mean, std = normalization(config.model, 1)
    stem = (5, 2) if config.model.name == "resnet_thin" else (3, 1)
    optim = config.optim
    if optim.name != "adamw" or optim.schedule != "cosine":
        sys.exit(f"benchmarks/lightly_peer.py trains by AdamW with a cosine; config.optim: {optim}")
    for view in setup.views:
        rest = dataclasses.replace(view, **{key: getattr(View(), key) for key in DRAWN})
        if rest != View():
            sys.exit(f"benchmarks/lightly_peer.py draws {', '.join(DRAWN)}; a view of ours has more: {view}")
    return {
        "method": {"name": config.method_name, **dataclasses.asdict(config.method)},
        "optim": dataclasses.asdict(optim),
        "views": [dataclasses.asdict(view) for view in setup.views],
        "network": {"channels": 1, "widths": widths, "depths": depths, "stem": stem, "pool": False},
        "features": widths[-1],
        "parameters": {"encoder": count(params["encoder"]), "all": count(params)},
        "mean": mean,
        "std": std,
        "constant_lr": sorted(setup.method.constant_lr),
        "peak": optim.lr * (args.batch / optim.lr_batch if optim.lr_batch else 1),
        "warmup": int(optim.warmup.split()[0]),
        "steps": setup.steps,
        "epoch_steps": setup.steps // args.epochs,
        "epochs": args.epochs,
        "batch": args.batch,
        "seed": config.train.seed,
        "cores": args.cores,
        "workers": args.workers,
        "device": "cpu",
        "dtype": config.model.dtype,
        "timed": 0,
        "data": str(folder.parent / f"images-{args.images}.npz"),
        "out": str(folder),
    }


def count(params) -> int:
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.train = open_source(Data(name="fashion_mnist", limit=args.images))
        self.test = open_source(Data(name="fashion_mnist", split="test"))
        self.setting = {key: getattr(args, key) for key in SAME}

    def done(self, side: str, method: str, seed: int) -> bool:
        found = {"side": side, "method": method, "seed": seed, **self.setting}
        return any(all(row[key] == str(value) for key, value in found.items()) for row in rows(CSV))

    def folder(self, side: str, method: str, seed: int) -> Path:
        name = "-".join(map(str, (method, *self.setting.values(), seed, side)))
        return (self.args.workdir / name).resolve()

    def prepare(self) -> None:
        """Settings of every run, the images, and the comparison of parameters."""
        args, written = self.args, []
        for method in args.methods.split(","):
            for seed in range(args.seeds):
                config = resolve(load_config(f"methods_fashion_mnist:{method}", flags(method, seed, args)))
                folder = self.folder("lightly", method, seed)
                folder.mkdir(parents=True, exist_ok=True)
                settings = settings_of(config, set_up(config, self.train), args, folder)
                (folder / "settings.json").write_text(json.dumps(settings))
            written.append(folder / "settings.json")
        np.savez(settings["data"], train=self.train.arrays(), test=self.test.arrays())
        self.start([args.peer, HERE / "lightly_peer.py", "--check", *written])

    def start(self, command: list) -> float:
        """Seconds that a process took. Both libraries get the cores of this process, and no accelerator."""
        began = time.monotonic()
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        status = subprocess.run(list(map(str, command)), env=environment).returncode
        if status:
            sys.exit(f"ended with status {status}: {' '.join(map(str, command))}")
        return time.monotonic() - began

    def knn(self, bank: np.ndarray, queries: np.ndarray) -> float:
        votes = knn_predict(bank, np.asarray(self.train.labels), queries, classes=len(self.train.classes))
        return round(metrics(np.asarray(votes), np.asarray(self.test.labels), self.train.classes)["top1"], 4)

    def judge(self, encoder) -> float:
        return self.knn(encoder.embed(self.train.arrays()), encoder.embed(self.test.arrays()))

    def ours(self, method: str, seed: int) -> dict:
        folder = self.folder("ssl_jax", method, seed)
        command = [sys.executable, "-m", "ssl_jax.cli", "pretrain", f"--config=methods_fashion_mnist:{method}"]
        wall = self.start([*command, f"--workdir={folder}", *flags(method, seed, self.args)])
        images = self.args.images // self.args.batch * self.args.batch
        epochs = [images / line["images_per_s"] for line in read_lines(RunFolder(folder).timing)]
        loss = read_lines(RunFolder(folder).metrics)[-1]["loss"]
        return result(epochs, wall) | {"knn": self.judge(load_encoder(folder)), "loss": loss, "step_s": ""}

    def lightly(self, method: str, seed: int) -> dict:
        folder = self.folder("lightly", method, seed)
        wall = self.start([self.args.peer, HERE / "lightly_peer.py", folder / "settings.json"])
        found, made = json.loads((folder / "result.json").read_text()), np.load(folder / "embeddings.npz")
        measured = result(found["epochs"], wall - found["after"])
        knn = self.knn(made["train"], made["test"])
        return measured | {"knn": knn, "loss": found["loss"], "step_s": round(found["step"], 4)}

    def run(self) -> None:
        args = self.args
        everything = [
            (side, method, seed)
            for seed in range(args.seeds)
            for method in (FLOOR, *args.methods.split(","))
            for side in (("ssl_jax",) if method == FLOOR else ("ssl_jax", "lightly"))
        ]
        left = [job for job in everything if not self.done(*job)]
        if any(method != FLOOR for _, method, _ in left):
            self.prepare()
        for number, (side, method, seed) in enumerate(left):
            print(f"{side} {method} {seed}: {self.estimate(left[number:])}", flush=True)
            if method == FLOOR:
                encoder = random_encoder(Model(name="resnet_thin"), 28, 1, seed)
                found = {"epoch_s": "", "other_s": "", "knn": self.judge(encoder), "loss": "", "step_s": ""}
            else:
                found = (self.ours if side == "ssl_jax" else self.lightly)(method, seed)
            if args.shared:
                found |= {"epoch_s": "", "other_s": "", "step_s": ""}
            add(CSV, {"side": side, "method": method, "seed": seed, **self.setting, **found})
            TABLE.write_text(table())

    def estimate(self, left: list[tuple[str, str, int]]) -> str:
        """Minutes for the runs that are left, from those that are done, else from a guess."""
        total, same = 0.0, [row for row in rows(CSV) if row["cores"] == str(self.args.cores) and row["epoch_s"]]
        for side, method, _ in left:
            known = [row for row in same if (row["side"], row["method"]) == (side, method)]
            each = [float(row["epoch_s"]) / int(row["images"]) for row in known] or [1 / GUESS[side]]
            if method != FLOOR:
                total += statistics.median(each) * self.args.images * self.args.epochs + 20
        return f"{len(left)} runs left, about {total / 60:.0f} minutes"


def result(epochs: list[float], wall: float) -> dict:
    """Seconds of an epoch: the median of those after the first. other_s: start, compilation, checkpoints."""
    return {"epoch_s": round(statistics.median(epochs[1:] or epochs), 3), "other_s": round(wall - sum(epochs), 1)}


def table() -> str:
    """Markdown, one table for each setting: mean ± half of the 95 % interval over seeds."""
    found: dict[tuple, list[dict[str, str]]] = {}
    for row in rows(CSV):
        found.setdefault(tuple(row[key] for key in SAME), []).append(row)
    return "\n".join(part(dict(zip(SAME, setting)), some) for setting, some in found.items())


def part(setting: dict[str, str], found: list[dict[str, str]]) -> str:
    def of(side: str, method: str, key: str) -> list[float]:
        some = [row for row in found if (row["side"], row["method"]) == (side, method) and row[key]]
        return [float(row[key]) for row in sorted(some, key=lambda row: int(row["seed"]))]

    def percent(values: list[float]) -> str:
        return shown(*interval([100 * v for v in values])) if values else ""

    timed = bool(of("lightly", next((m for m in METHODS if of("lightly", m, "knn")), ""), "epoch_s"))
    head = ["method", "seeds", "kNN ssl_jax, %", "kNN lightly, %", "difference"]
    if timed:
        head += ["s/epoch ssl_jax", "s/epoch lightly", "ratio", "lightly's steps alone, s/epoch"]
        head += ["other s ssl_jax", "other s lightly"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in METHODS:
        ours, theirs = of("ssl_jax", method, "knn"), of("lightly", method, "knn")
        seeds = min(len(ours), len(theirs))
        if not seeds:
            continue
        apart = shown(*(100 * x for x in paired(ours[:seeds], theirs[:seeds])), sign="+")
        cells = [f"`{method}`", str(seeds), percent(ours), percent(theirs), apart]
        if timed:
            times = [statistics.median(of(side, method, "epoch_s")) for side in ("ssl_jax", "lightly")]
            steps = int(setting["images"]) // int(setting["batch"]) * statistics.median(of("lightly", method, "step_s"))
            other = [statistics.median(of(side, method, "other_s")) for side in ("ssl_jax", "lightly")]
            cells += [f"{t:.1f}" for t in times] + [f"{times[0] / times[1]:.2f}", f"{steps:.1f}"]
            cells += [f"{t:.0f}" for t in other]
        lines.append("| " + " | ".join(cells) + " |")
    told = f"{setting['images']} images, {setting['epochs']} epochs, batch {setting['batch']}, {setting['cores']} cores"
    floor = percent(of("ssl_jax", FLOOR, "knn"))
    return f"{told}; kNN of random weights {floor} %\n\n" + "\n".join(lines) + "\n"


def shown(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if half == half else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", default="peer/bin/python", help="python of the environment with lightly")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, default=10000, help="the first of the training images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="of each side; they never run at once")
    parser.add_argument("--workers", type=int, default=2, help="processes of lightly's DataLoader")
    parser.add_argument("--shared", action="store_true", help="the machine does other work too: record no times")
    parser.add_argument("--workdir", type=Path, default=Path("runs/against_lightly"))
    args = parser.parse_args()
    for method in args.methods.split(","):
        if method not in METHODS:
            sys.exit(f"--methods={method}: unknown; allowed: {', '.join(METHODS)}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # the processes started inherit it
    Bench(args).run()
    TABLE.write_text(table())
    print(table())


if __name__ == "__main__":
    main()
