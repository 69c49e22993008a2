"""Predicts what published recipes need of TPU slices, with `ssl-jax plan`; nothing is run on a TPU.

    pip install -e '.[plan]'
    python benchmarks/plans.py [--slices=v5e:2x4,v5e:8x8,v5p:8x8x8] [--recipes=simclr,byol] [--groups]

Each recipe of configs/imagenet.py is compiled for each slice, in bfloat16 and with the batch of its paper. That takes
minutes each. If the batch does not fit, the largest micro-batch that does is searched. --groups plans the recipes with
BatchNorm again, with statistics per chip (train.bn_group). Rows that are in results/plans.csv are not computed again.
The table is in benchmarks/scale.md.
"""

import argparse
import csv
import dataclasses
from pathlib import Path

from methods import add, rows

from ssl_jax import hlo, plan
from ssl_jax.config import resolve
from ssl_jax.config_file import load_config
from ssl_jax.errors import UserError
from ssl_jax.start import start_jax

HERE = Path(__file__).resolve().parent
CSV, PAGE = HERE / "results" / "plans.csv", HERE / "scale.md"
BEGIN, END = "<!-- table of benchmarks/plans.py -->\n", "<!-- end of table -->"
RECIPES = (
    *("simclr", "moco_v1", "moco_v2", "moco_v3", "moco_v3_vit_small", "byol", "simsiam", "barlow_twins", "vicreg"),
    *("vicregl", "tico", "swav", "swav_256", "dino", "dino_resnet50", "instance_discrimination", "rotation", "jigsaw"),
    *("mae", "simmim"),
)
GROUPED = ("simclr", "byol")  # of those whose statistics of BatchNorm are the whole batch's, the largest batches


def predict(recipe: str, topology: str, grouped: bool) -> dict:
    config = resolve(load_config(f"imagenet:{recipe}", ["--config.model.dtype=bfloat16"]))
    if grouped:
        group = config.train.batch // plan.parse_topology(topology).chips
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, bn_group=group))
    [only] = plan.compare(config, [topology], plan.open_or_describe(config.data))
    return plan.table_row(only)


def table() -> str:
    head = ["recipe", "batch", "slice", "chips", "micro-batch", "GiB/chip", "all-reduce", "others"]
    head += ["net ms", "step ms", "images/s", "hours", "limit"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(csv.DictReader(CSV.open()), key=lambda row: (RECIPES.index(row["recipe"]), int(row["chips"]))):
        name = f"`{row['recipe']}`" + (", BatchNorm per chip" if row["grouped"] == "True" else "")
        cells = [name, row["batch"], row["topology"], row["chips"]]
        if row["fits"] == "True":
            others = [f"{row[kind]} {kind}" for kind in hlo.COLLECTIVES[1:] if row[kind] != "0"]
            cells += [row["micro_batch"] if row["micro_batch"] != "0" else "all", f"{float(row['memory']) / 2**30:.1f}"]
            cells += [row["all-reduce"], ", ".join(others) or "none", f"{1e3 * float(row['network_s']):.1f}"]
            cells += [f"{1e3 * float(row['step_s']):.0f}", f"{float(row['images_per_s']):,.0f}"]
            cells += [f"{float(row['hours']):.1f}", row["limit"]]
        else:
            cells += [f"does not fit: {float(row['memory']) / 2**30:.0f} GiB", *[""] * 8]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show() -> None:
    before, after = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + after.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slices", default="v5e:2x4,v5e:8x8,v5p:8x8x8")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--groups", action="store_true")
    args = parser.parse_args()
    start_jax()
    for topology in args.slices.split(","):
        for recipe in args.recipes.split(","):
            job = {"recipe": recipe, "topology": topology, "grouped": str(args.groups)}
            done = any(all(row[key] == value for key, value in job.items()) for row in rows(CSV))
            if done or (args.groups and recipe not in GROUPED):
                continue
            print(f"{recipe}, {topology}", flush=True)
            try:
                add(CSV, {**job, **predict(recipe, topology, args.groups)})
            except UserError as error:  # a batch that does not divide evenly among the chips
                print(error, flush=True)
                continue
            show()
    show()


if __name__ == "__main__":
    main()
