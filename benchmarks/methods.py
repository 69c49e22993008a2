"""Every method on Fashion-MNIST, one backbone, one budget: accuracy, speed and memory, beside random and from-scratch.

    python benchmarks/methods.py [--methods=simclr,byol] [--seeds=3] [--workdir=runs/methods]
    python benchmarks/methods.py --cost        time and memory of a step of each method, on an idle machine

Three short runs of each method choose its learning rate and, where it has one, its temperature: by kNN on training
images that no run has seen. Then `--seeds` full runs are measured on the test set after their last step. Each run is a
process `ssl-jax pretrain`. A finished run is a line of benchmarks/results/methods_trials.csv or methods_runs.csv and is
not run again, so this can be stopped at any time, and two of it may run with other methods each (`taskset -c 0 ...`).
The table is benchmarks/results/methods.md. What is tuned and measured: benchmarks/README.md.
"""

import argparse
import csv
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from ssl_jax.config import Data, Finetune, method_names, resolve
from ssl_jax.config_file import load_config
from ssl_jax.data import open_source
from ssl_jax.encoder import load_encoder, random_encoder
from ssl_jax.evaluate import finetune, interval, knn_predict, linear_probe, metrics, nested_subset
from ssl_jax.parallel import make_mesh
from ssl_jax.run_folder import RunFolder
from ssl_jax.train import init_state, make_step, set_up

RESULTS = Path(__file__).resolve().parent / "results"
SHORT = {"train.duration": "8000 examples", "optim.warmup": "20 steps"}  # of a trial
QUIET = {"eval.every": "0 steps", "eval.online_probe": False}  # nothing is measured with labels during a run
BANK = 20_000  # training images whose labels kNN and the linear classifier use
HELD_OUT = slice(50_000, 52_000)  # of the training images: by these the trials are judged; runs see the first 10,000
LABELS = 250
SCORES = ("knn", "linear", "finetune")
FLOORS = ("random weights", "random ViT", "from scratch")


def pretrain(method: str, seed: int, settings: dict, workdir: Path, config: str = "methods_fashion_mnist") -> dict:
    """One run. Minutes of all its cores together and memory are those of its whole process, compiling included."""
    if not RunFolder(workdir).finished():
        shutil.rmtree(workdir, ignore_errors=True)  # what an interrupted process left: its minutes would be missing
    command = [sys.executable, "-m", "ssl_jax.cli", "pretrain", f"--config={config}:{method}"]
    command += [f"--workdir={workdir}", f"--config.train.seed={seed}"]
    command += [f"--config.{key}={value}" for key, value in {**QUIET, **settings}.items()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"ended with status {status}: {' '.join(map(str, command))}")
    return {
        "cpu_minutes": round((usage.ru_utime + usage.ru_stime) / 60, 2),
        "peak_gb": round(usage.ru_maxrss / 2**20, 2),
    }


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


def tuned(method: str, workdir: Path, judge: "Judge") -> dict:
    """The settings of the best of three short runs: two rates, then twice the temperature, or a third rate."""
    config = load_config(f"methods_fashion_mnist:{method}", ())
    path = RESULTS / "methods_trials.csv"
    lr, temperature = config.optim.lr, config.method.get("temperature")

    def best() -> dict:
        done = [row for row in rows(path) if row["method"] == method]
        top = max(done, key=lambda row: float(row["knn_heldout"]))
        return {"optim.lr": top["lr"]} | ({"method.temperature": top["temperature"]} if top["temperature"] else {})

    def trial(number: int, settings: dict) -> None:
        if any(row["method"] == method and row["trial"] == str(number) for row in rows(path)):
            return
        folder = workdir / f"{method}-trial{number}"
        took = pretrain(method, 100, SHORT | settings, folder)
        tried = {"lr": settings["optim.lr"], "temperature": settings.get("method.temperature", "")}
        knn = judge.held_out(load_encoder(folder))
        add(path, {"method": method, "trial": number, **tried, "knn_heldout": knn, **took})

    first = {"method.temperature": temperature} if temperature else {}
    trial(0, {"optim.lr": lr} | first)
    trial(1, {"optim.lr": 3 * lr} | first)
    third = {"method.temperature": 2 * temperature} if temperature else {"optim.lr": float(f"{0.3 * lr:.3g}")}
    trial(2, best() | third)
    return best()


class Judge:
    """Test accuracies of an encoder: kNN and linear with all training labels, fine-tuned from LABELS of them."""

    def __init__(self):
        train, test = open_source(Data(name="fashion_mnist")), open_source(Data(name="fashion_mnist", split="test"))
        self.images, self.labels = train.arrays(), np.asarray(train.labels)
        self.test, self.truth, self.classes = test.arrays(), np.asarray(test.labels), train.classes

    def top1(self, scores) -> float:
        return round(metrics(np.asarray(scores), self.truth, self.classes)["top1"], 4)

    def held_out(self, encoder) -> float:
        bank, queries = slice(5000), self.images[HELD_OUT]
        found = encoder.embed(self.images[bank]), self.labels[bank], encoder.embed(queries)
        scores = knn_predict(*found, classes=len(self.classes))
        return round(metrics(np.asarray(scores), self.labels[HELD_OUT], self.classes)["top1"], 4)

    def __call__(self, encoder, seed: int, *, scratch: bool = False) -> dict[str, float]:
        few, count = nested_subset(self.labels, LABELS, seed), len(self.classes)
        how = Finetune(steps=300, epochs=0, lr=(3e-3,) if scratch else (1e-3,), head="zero" if scratch else "probe")
        model = finetune(encoder, self.images[few], self.labels[few], classes=count, settings=how, seed=seed)
        tuned = {"finetune": self.top1(model.logits(self.test))}
        if scratch:
            return {"knn": float("nan"), "linear": float("nan")} | tuned
        bank, labels, queries = encoder.embed(self.images[:BANK]), self.labels[:BANK], encoder.embed(self.test)
        votes = knn_predict(bank, labels, queries, classes=count)
        probe = linear_probe(bank, labels, classes=count, seed=seed)
        return {"knn": self.top1(votes), "linear": self.top1(probe.scores(queries))} | tuned


class Step:
    """A compiled training step, and how long each of its calls took."""

    def __init__(self, method: str):
        flags = [f"--config.{key}={value}" for key, value in QUIET.items()]
        config = resolve(load_config(f"methods_fashion_mnist:{method}", flags))
        source = open_source(config.data)
        setup, mesh = set_up(config, source), make_mesh(config.train.devices, config.train.batch)
        index = np.arange(config.train.batch)
        self.state, self.batch_size, self.wall, self.cpu = init_state(setup, 0), config.train.batch, [], []
        self.batch = {"image": source.take(index).arrays(), "label": np.asarray(source.labels)[index], "index": index}
        step = jax.jit(make_step(setup, config, mesh), donate_argnums=0)
        self.run = step.lower(self.state, self.batch).compile()
        memory = self.run.memory_analysis()
        self.mb = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20

    def __call__(self) -> None:
        began, used = time.perf_counter(), time.process_time()
        self.state, _ = self.run(self.state, self.batch)
        jax.block_until_ready(self.state)
        self.wall.append(time.perf_counter() - began)
        self.cpu.append(time.process_time() - used)


def cost(method: str, simclr: Step, rounds: int = 12) -> dict:
    """Of a training step: medians of wall and CPU seconds, its memory; and of SimCLR's, taking turns with it.

    A machine's speed changes by a third within minutes; what takes turns can be compared.
    """
    step = Step(method)
    simclr.wall, simclr.cpu = [], []
    for _ in range(rounds + 2):
        step()
        simclr()
    row = {"method": method, "batch": step.batch_size, "cores": len(os.sched_getaffinity(0))}
    for name, one in (("", step), ("simclr_", simclr)):
        row[f"{name}step_s"] = round(statistics.median(one.wall[2:]), 4)
        row[f"{name}step_cpu_s"] = round(statistics.median(one.cpu[2:]), 4)
        row[f"{name}step_mb"] = round(one.mb, 1)
    return row


def table(path: Path) -> str:
    """Markdown: mean and half of the 95 % interval over seeds, best fine-tuned first; cost beside it."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows(path):
        found.setdefault(row["method"], []).append(row)
    costs = {row["method"]: row for row in rows(RESULTS / "methods_cost.csv")}

    def cell(name: str, key: str) -> str:
        values = [100 * float(row[key]) for row in found[name] if row[key] not in ("", "nan")]
        mean, half = interval(values) if values else (float("nan"), 0)
        return (f"{mean:.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")) if values else ""

    def middle(name: str, key: str) -> str:
        return f"{statistics.median(float(r[key]) for r in found[name]):.1f}" if found[name][0][key] else ""

    def relative(name: str, key: str) -> str:
        return f"{float(costs[name][key]) / float(costs[name][f'simclr_{key}']):.2f}" if name in costs else ""

    def speed(name: str) -> str:
        return f"{int(costs[name]['batch']) / float(costs[name]['step_s']):.0f}" if name in costs else ""

    head = ["method", "seeds", "kNN", "linear", f"fine-tuned, {LABELS} labels", "CPU minutes", "peak GB"]
    head += ["images/s", "step / SimCLR's", "step's memory / SimCLR's"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in sorted(found, key=lambda n: -statistics.mean(float(r["finetune"]) for r in found[n])):
        numbers = [cell(name, key) for key in SCORES] + [middle(name, key) for key in ("cpu_minutes", "peak_gb")]
        numbers += [speed(name), relative(name, "step_s"), relative(name, "step_mb")]
        lines.append("| " + " | ".join([f"`{name}`", str(len(found[name])), *numbers]) + " |")
    return "\n".join(lines) + "\n"


def run(names: list[str], seeds: int, workdir: Path, path: Path) -> None:
    """Every run that is not a line of `path` yet."""
    judge, nothing = Judge(), {"lr": "", "temperature": "", "cpu_minutes": "", "peak_gb": ""}
    for seed, name in itertools.product(range(seeds), names):
        if any(row["method"] == name and row["seed"] == str(seed) for row in rows(path)):
            continue
        about = {"method": name, "seed": seed}
        if name in FLOORS:
            model = resolve(load_config(f"methods_fashion_mnist:{'mae' if 'ViT' in name else 'simclr'}", ())).model
            encoder = random_encoder(model, 28, 1, seed)
            add(path, about | judge(encoder, seed, scratch=name == "from scratch") | nothing)
        else:
            settings = tuned(name, workdir, judge)
            took = pretrain(name, seed, settings, workdir / f"{name}-{seed}")
            tried = {"lr": settings["optim.lr"], "temperature": settings.get("method.temperature", "")}
            add(path, about | judge(load_encoder(workdir / f"{name}-{seed}"), seed) | tried | took)
        print(rows(path)[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join([*FLOORS, *method_names()]))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--cost", action="store_true", help="measure a step of each method instead")
    parser.add_argument("--table", action="store_true", help="write the table only")
    args = parser.parse_args()
    names = args.methods.split(",")
    for name in names:
        if name not in [*FLOORS, *method_names()]:
            sys.exit(f"--methods={name}: unknown; allowed: {', '.join([*FLOORS, *method_names()])}")
    if args.cost:
        done, simclr = {row["method"] for row in rows(RESULTS / "methods_cost.csv")}, Step("simclr")
        for name in names:
            if name not in done and name not in FLOORS:
                add(RESULTS / "methods_cost.csv", cost(name, simclr))
    elif not args.table:
        run(names, args.seeds, args.workdir, RESULTS / "methods_runs.csv")
    (RESULTS / "methods.md").write_text(table(RESULTS / "methods_runs.csv"))
    print(table(RESULTS / "methods_runs.csv"))


if __name__ == "__main__":
    main()
