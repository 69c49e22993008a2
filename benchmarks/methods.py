"""Every method on Fashion-MNIST, one backbone, one budget: accuracy, speed and memory, beside random and from-scratch.

    python benchmarks/methods.py [--methods=simclr,byol] [--seeds=3] [--workdir=runs/methods]

Five short runs of each method choose its learning rate and, where it has one, its temperature: by kNN on training
images held out. Then `--seeds` full runs are measured on the test set after their last step. Each run is a process
`ssl-jax pretrain`. A finished run is a line of benchmarks/results/methods_trials.csv or methods_runs.csv and is not run
again, so this can be stopped at any time. Runs may share a machine (two of this script, each with other methods and one
core): then images/s are those of a shared machine. The table is benchmarks/results/methods.md.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ssl_jax.config import Data, Finetune, Model, method_names
from ssl_jax.data import open_source
from ssl_jax.encoder import load_encoder, random_encoder
from ssl_jax.evaluate import finetune, interval, knn_predict, linear_probe, metrics, nested_subset, predict
from ssl_jax.run import read_lines

RESULTS = Path(__file__).resolve().parent / "results"
SHORT = "20000 examples"  # of a trial
LABELS = 250
SCORES = ("knn", "linear", "finetune")


def pretrain(
    method: str, seed: int, settings: dict, workdir: Path, *flags: str, config: str = "methods_fashion_mnist"
) -> dict:
    """One run. Minutes and memory are those of its whole process, compiling included."""
    command = [sys.executable, "-m", "ssl_jax.cli", "pretrain", f"--config={config}:{method}"]
    command += [f"--workdir={workdir}", f"--config.train.seed={seed}", *flags]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"ended with status {status}: {' '.join(map(str, command))}")
    speed = statistics.median(line["images_per_s"] for line in read_lines(workdir / "timing.jsonl"))
    took = {"minutes": round((time.monotonic() - began) / 60, 2), "images_per_s": round(speed)}
    return took | {"peak_gb": round(usage.ru_maxrss / 2**20, 2)}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def add(path: Path, row: dict) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def tuned(method: str, workdir: Path) -> dict:
    """The settings of the best of five short runs: three rates, then two temperatures, or two more rates without."""
    from ssl_jax.cli import load_config

    config = load_config(f"methods_fashion_mnist:{method}", ())
    path = RESULTS / "methods_trials.csv"
    lr, temperature = config.optim.lr, config.method.get("temperature")
    rates = (1.0, 0.3, 3.0) if temperature else (1.0, 0.3, 3.0, 0.1, 10.0)

    def best() -> dict:
        done = [row for row in rows(path) if row["method"] == method]
        top = max(done, key=lambda row: float(row["knn_heldout"]))
        return {"optim.lr": top["lr"]} | ({"method.temperature": top["temperature"]} if top["temperature"] else {})

    def trial(number: int, settings: dict) -> None:
        if any(row["method"] == method and row["trial"] == str(number) for row in rows(path)):
            return
        folder = workdir / f"{method}-trial{number}"
        flags = f"--config.train.duration={SHORT}", "--config.eval.every=100000 steps"  # once, at the end
        took = pretrain(method, 100, settings, folder, *flags)
        knn = read_lines(folder / "metrics.jsonl")[-1]["knn_accuracy"]
        tried = {"lr": settings["optim.lr"], "temperature": settings.get("method.temperature", "")}
        add(path, {"method": method, "trial": number, **tried, "knn_heldout": knn, **took})

    for number, factor in enumerate(rates):
        settings = {"optim.lr": float(f"{lr * factor:.3g}")}
        trial(number, settings | ({"method.temperature": temperature} if temperature else {}))
    if temperature:
        settings = best()
        for number, factor in enumerate((0.5, 2.0), len(rates)):
            trial(number, settings | {"method.temperature": temperature * factor})
    return best()


class Judge:
    """Test accuracies of an encoder: kNN and linear with all training labels, fine-tuned from LABELS of them."""

    def __init__(self):
        train, test = open_source(Data(name="fashion_mnist")), open_source(Data(name="fashion_mnist", split="test"))
        self.images, self.labels = train.arrays(), np.asarray(train.labels)
        self.test, self.truth, self.classes = test.arrays(), np.asarray(test.labels), train.classes

    def top1(self, scores) -> float:
        return round(metrics(np.asarray(scores), self.truth, self.classes)["top1"], 4)

    def __call__(self, encoder, seed: int, *, scratch: bool = False) -> dict[str, float]:
        few, count = nested_subset(self.labels, LABELS, seed), len(self.classes)
        how = Finetune(steps=600, epochs=0, lr=(3e-3,) if scratch else (1e-3,), head="zero" if scratch else "probe")
        model = finetune(encoder, self.images[few], self.labels[few], classes=count, settings=how, seed=seed)
        tuned = {"finetune": self.top1(predict(model, self.test))}
        if scratch:
            return {"knn": float("nan"), "linear": float("nan")} | tuned
        features, queries = encoder.embed(self.images), encoder.embed(self.test)
        votes = knn_predict(features, self.labels, queries, classes=count)
        probe = linear_probe(features, self.labels, classes=count, seed=seed)
        return {"knn": self.top1(votes), "linear": self.top1(probe.scores(queries))} | tuned


def table(path: Path) -> str:
    """Markdown: mean and half of the 95 % interval over seeds, best linear first."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows(path):
        found.setdefault(row["method"], []).append(row)

    def cell(name: str, key: str, scale: float = 100) -> str:
        values = [float(row[key]) * scale for row in found[name] if row[key] not in ("", "nan")]
        if not values:
            return ""
        mean, half = interval(values)
        return f"{mean:.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")

    head = ["method", "seeds", "kNN", "linear", f"fine-tuned, {LABELS} labels", "minutes", "images/s", "peak GB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in sorted(found, key=lambda n: -statistics.mean(float(r["finetune"]) for r in found[n])):
        numbers = [cell(name, key) for key in SCORES] + [
            f"{statistics.median(float(r[key]) for r in found[name]):g}" if found[name][0][key] else ""
            for key in ("minutes", "images_per_s", "peak_gb")
        ]
        lines.append("| " + " | ".join([f"`{name}`", str(len(found[name])), *numbers]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(method_names()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--table", action="store_true", help="write the table only")
    args = parser.parse_args()
    path = RESULTS / "methods_runs.csv"
    if not args.table:
        judge, nothing = Judge(), {"lr": "", "temperature": "", "minutes": "", "images_per_s": "", "peak_gb": ""}
        for seed in range(args.seeds):
            for name in ("random weights", "from scratch", *args.methods.split(",")):
                if any(row["method"] == name and row["seed"] == str(seed) for row in rows(path)):
                    continue
                about = {"method": name, "seed": seed}
                if name in method_names():
                    settings = tuned(name, args.workdir)
                    took = pretrain(name, seed, settings, args.workdir / f"{name}-{seed}")
                    tried = {"lr": settings["optim.lr"], "temperature": settings.get("method.temperature", "")}
                    add(path, about | judge(load_encoder(args.workdir / f"{name}-{seed}"), seed) | tried | took)
                else:
                    encoder = random_encoder(Model(name="resnet_thin"), 28, 1, seed)
                    add(path, about | judge(encoder, seed, scratch=name == "from scratch") | nothing)
                print(rows(path)[-1], flush=True)
    (RESULTS / "methods.md").write_text(table(path))
    print(table(path))


if __name__ == "__main__":
    main()
