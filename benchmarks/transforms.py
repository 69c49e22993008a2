"""Which label is lost under which transforms? One method, one budget, different views; then a linear probe.

    python benchmarks/transforms.py                                   colour images: shape, colour, texture, orientation
    ssl-jax phantom --out=runs/phantoms
    python benchmarks/transforms.py --set=phantom --data=runs/phantoms phantom radiographs: ten findings

Views: natural, chest_xray, each transform of natural alone, natural without each, natural with a rotation. Methods:
MoCo and BYOL on all, LooC on those that draw what it is to stay sensitive to. Scores: accuracy by attribute (factors),
ROC AUC by finding (phantom), of a linear probe on all training labels, on the test images, after the last step.

A finished run is a line of benchmarks/results/transforms_SET.csv and is not run again, so this can be stopped at any
time. --methods, --views and --seeds choose runs; two of this script with other methods may share a machine. The table
is transforms_SET.md, the figure transforms_SET.png.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from methods import add, pretrain, rows

from ssl_jax.config import Data, resolve
from ssl_jax.config_file import load_config
from ssl_jax.data import open_source
from ssl_jax.encoder import load_encoder, random_encoder
from ssl_jax.evaluate import interval, linear_probe, metrics, paired
from ssl_jax.plotting import STYLE, save

RESULTS = Path(__file__).resolve().parent / "results"
# Each transform with the strength that it has in the preset natural, and what takes it out of that preset.
ALONE = {
    "crop": {"crop_scale": (0.08, 1.0)},
    "flip": {"flip": 0.5},
    "colour": {"jitter_prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gray": 0.2},
    "blur": {"blur": 1.0, "second.blur": 0.1},
    "solarize": {"second.solarize": 0.2},
}
OFF = {
    "crop": {"crop_scale": (1.0, 1.0)},
    "flip": {"flip": 0.0},
    "colour": {"jitter_prob": 0.0, "gray": 0.0},
    "blur": {"blur": 0.0},
    "solarize": {"solarize": 0.0},
}
FURTHER = {"rotate": {"rotate": 90.0}, "perspective": {"perspective": 0.2, "perspective_prob": 0.5}}  # not in natural
VIEWS = {
    "natural": {"preset": "natural"},
    "chest_xray": {"preset": "chest_xray"},
    **{f"{name} alone": {"preset": "none", **changes} for name, changes in {**ALONE, **FURTHER}.items()},
    **{f"natural without {name}": {"preset": "natural", **changes} for name, changes in OFF.items()},
    "natural and rotate": {"preset": "natural", **FURTHER["rotate"]},
}
# LooC has a space for each of these factors that the views draw; it is run where there is one.
SENSITIVE = {
    "natural": ("colour",),
    "natural and rotate": ("colour", "rotate"),
    "colour alone": ("colour",),
    "rotate alone": ("rotate",),
}
SETS = {"factors": "accuracy", "phantom": "ROC AUC"}
ATTRIBUTES = ("shape", "colour", "texture", "orientation")
RANDOM = "random weights"
NO_SCORES = ("method", "views", "seed", "examples", "cpu_minutes", "peak_gb")


def settings(args: argparse.Namespace, method: str, views: str) -> dict:
    """What a run has on the command line: `--config.KEY=VALUE`."""
    made = {f"augment.{key}": value for key, value in VIEWS[views].items()}
    if method == "looc":
        made["method.factors"] = SENSITIVE[views]
    if args.set == "phantom":
        made |= {"data.name": "chexpert", "data.path": args.data, "data.labels": ("study",)}
        made |= {"data.size": 64, "data.cache": args.workdir / "cache"}
    return made | {"train.duration": f"{args.examples} examples"}


class Judge:
    """Scores by class of a linear probe on all training labels, on the test images."""

    def __init__(self, args: argparse.Namespace):
        flags = [f"--config.{key}={value}" for key, value in settings(args, "moco", "natural").items()]
        self.set, self.config = args.set, resolve(load_config("transforms:moco", flags))
        self.train, self.test = open_source(self.config.data), open_source(self.config.data, "test")
        self.images = self.train.arrays(), self.test.arrays()

    def random(self, seed: int):
        return random_encoder(self.config.model, self.train.shape[0], self.train.shape[2], seed)

    def __call__(self, encoder, seed: int) -> dict[str, float]:
        features, queries = (encoder.embed(images) for images in self.images)
        if self.set == "phantom":
            probe = linear_probe(features, self.train.labels, classes=len(self.train.classes), seed=seed)
            found = metrics(probe.scores(queries), self.test.labels, self.train.classes)["auc"]
            return {name: round(found.get(name, math.nan), 4) for name in self.train.classes}
        made = {}
        for name in ATTRIBUTES:
            data = Data(name="factors", path=f"{self.config.data.path},label={name}")
            train, test = open_source(data), open_source(data, "test")
            probe = linear_probe(features, train.labels, classes=len(train.classes), seed=seed)
            made[name] = round(metrics(probe.scores(queries), test.labels, train.classes)["top1"], 4)
        return made


def plan(args: argparse.Namespace) -> list[tuple[int, str, str]]:
    """(seed, method, views) of all runs; seeds outermost, so that every comparison is there early."""
    runs = []
    for seed in range(args.seeds):
        runs.append((seed, RANDOM, ""))
        for views in args.views.split(","):
            for method in args.methods.split(","):
                if method != "looc" or views in SENSITIVE:
                    runs.append((seed, method, views))
    return runs


def scores(path: Path, examples: int) -> tuple[list[str], dict[tuple[str, str], dict[int, np.ndarray]]]:
    """(classes, {(method, views): {seed: score of each class and their mean}}) of the finished runs of this budget."""
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    lines = [row for row in rows(path) if row["examples"] == str(examples)]
    classes = [key for key in lines[0] if key not in NO_SCORES]
    for row in lines:
        values = [float(row[name]) for name in classes]
        found.setdefault((row["method"], row["views"]), {})[int(row["seed"])] = np.array([*values, np.nanmean(values)])
    return [*classes, "mean"], found


def table(path: Path, examples: int, what: str) -> str:
    """Markdown: the scores of every kind of views, then what each transform of natural does: with minus without it."""
    classes, found = scores(path, examples)

    def cell(mean: float, half: float, sign: str = "") -> str:
        if math.isnan(mean):
            return ""  # a class of one kind only in the test images
        return f"{100 * mean:{sign}.1f}" + (f" ± {100 * half:.1f}" if not math.isnan(half) else "")

    head = ["method", "views", "seeds", *classes]
    lines = [f"{what}, %, mean ± half of the 95 % interval over seeds.", "", _row(head), _row(["---"] * len(head))]
    for (method, views), seeds in found.items():
        each = np.array(list(seeds.values()))
        cells = [cell(*interval(column)) for column in each.T]
        lines.append(_row([method, views, str(len(seeds)), *cells]))
    effects = []
    for method, name in ((m, n) for m in dict.fromkeys(m for m, _ in found) for n in OFF):
        natural, without = (found.get((method, v), {}) for v in ("natural", f"natural without {name}"))
        both = sorted(natural.keys() & without.keys())
        if both:
            sides = zip(*(np.array([side[seed] for seed in both]).T for side in (natural, without)), strict=True)
            effects.append(_row([method, name, str(len(both)), *(cell(*paired(a, b), "+") for a, b in sides)]))
    if effects:
        lines += ["", "natural minus natural without the transform, points, paired by seed:", ""]
        lines += [_row(["method", "transform", "seeds", *classes]), _row(["---"] * len(head)), *effects]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def figure(path: Path, examples: int, title: str) -> None:
    """A panel a method: score by views and class in numbers; colour: the distance to the mean of the column."""
    import matplotlib
    from matplotlib.figure import Figure

    classes, found = scores(path, examples)
    methods = [m for m in dict.fromkeys(m for m, _ in found) if m != RANDOM]
    names = [RANDOM, *(v for v in VIEWS if any((m, v) in found for m in methods))]
    if not methods:
        return
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        size = 1.9 + len(methods) * (0.62 * len(classes) + 0.4), 1.9 + 0.3 * len(names)
        drawn = Figure(figsize=size, layout="constrained")
        panels = drawn.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            runs = [found.get((RANDOM, "") if name == RANDOM else (method, name)) for name in names]
            means = [np.mean(list(r.values()), axis=0) if r else np.full(len(classes), math.nan) for r in runs]
            grid = 100 * np.array(means)
            shade = grid - np.ma.masked_invalid(grid).mean(axis=0).filled(0)
            axes.imshow(shade, cmap="RdBu", vmin=-20, vmax=20, aspect="auto")
            for y, x in zip(*np.nonzero(np.isfinite(grid)), strict=True):
                dark = abs(shade[y, x]) > 13
                axes.text(x, y, f"{grid[y, x]:.0f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
            axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right", fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=9)
            axes.tick_params(length=0)
            axes.set_title(method)
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11)
        save(drawn, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", choices=SETS, default="factors")
    parser.add_argument("--data", default="", help="folder made by `ssl-jax phantom`")
    parser.add_argument("--methods", default="moco,byol,looc")
    parser.add_argument("--views", default=",".join(VIEWS), help="names, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--examples", type=int, default=0, help="that a run sees; 0: 40,000 (factors), 20,000 (phantom)"
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/transforms"))
    parser.add_argument("--table", action="store_true", help="write table and figure only")
    args = parser.parse_args()
    args.examples = args.examples or {"factors": 40_000, "phantom": 20_000}[args.set]
    unknown = [name for name in args.views.split(",") if name not in VIEWS]
    if unknown or (args.set == "phantom" and not args.data and not args.table):
        sys.exit(f"--views={unknown[0]}: allowed: {', '.join(VIEWS)}" if unknown else "--set=phantom needs --data=DIR")
    path = RESULTS / f"transforms_{args.set}.csv"
    judge = None
    for seed, method, views in [] if args.table else plan(args):
        about = {"method": method, "views": views, "seed": seed, "examples": args.examples}
        if any(all(row[key] == str(value) for key, value in about.items()) for row in rows(path)):
            continue
        judge = judge or Judge(args)
        if method == RANDOM:
            took = {"cpu_minutes": "", "peak_gb": ""}
            encoder = judge.random(seed)
        else:
            folder = args.workdir / f"{args.set}-{args.examples}" / f"{method}-{views.replace(' ', '_')}-{seed}"
            took = pretrain(method, seed, settings(args, method, views), folder, config="transforms")
            encoder = load_encoder(folder)
        add(path, about | judge(encoder, seed) | took)
        print(rows(path)[-1], flush=True)
    name = "Phantom radiographs" if args.set == "phantom" else "Generated colour images"
    text = f"{name}. {table(path, args.examples, f'Linear probe, {SETS[args.set]}')}"
    path.with_suffix(".md").write_text(text)
    figure(path, args.examples, f"{name}: linear probe, {SETS[args.set]}, %")
    print(text)


if __name__ == "__main__":
    main()
