"""Writes docs/recipes.md from docs/recipes.csv: every official hyper-parameter beside that of configs/imagenet.py; and
the table of docs/reproduce.md.

    python docs/make_recipes.py

A row of the table is one hyper-parameter of one recipe: its name in the source, the official value, where it stands
(REPOSITORY:FILE:LINE, with the names of COMMITS, or words), our option and its value, and why they differ if they do.
Rows without an option are what the code fixes. tests/test_recipe_sources.py holds the table to the config.
"""

import csv
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_jax.augment import resolve_views
from ssl_jax.config import resolve, to_json

DOCS = Path(__file__).resolve().parent
TABLE, PAGE, REPRODUCE = DOCS / "recipes.csv", DOCS / "recipes.md", DOCS / "reproduce.md"
PLANS = DOCS.parent / "benchmarks" / "results" / "plans.csv"
BEGIN, END = "<!-- table of docs/make_recipes.py -->\n", "<!-- end of table -->"
COMMITS = {  # name in the table: repository, the commit that was read
    "moco": ("facebookresearch/moco", "5a429c00bb6d4efdf511bf31b6f01e064bf929ab"),
    "moco-v3": ("facebookresearch/moco-v3", "c349e6e24f40d3fedb22d973f92defa4cedf37a7"),
    "dino": ("facebookresearch/dino", "7c446df5b9f45747937fb0d72314eb9f7b66930a"),
    "swav": ("facebookresearch/swav", "06b1b7cbaf6ba2a792300d79c7299db98b93b7f9"),
    "simsiam": ("facebookresearch/simsiam", "a7bc1772896d0dad0806c51f0bb6f3b16d290468"),
    "barlowtwins": ("facebookresearch/barlowtwins", "8e8d284ca0bc02f88b92328e53f9b901e86b4a3c"),
    "vicreg": ("facebookresearch/vicreg", "4e12602fd495af83efd1631fbe82523e6db092e0"),
    "VICRegL": ("facebookresearch/VICRegL", "803ae4c8cd1649a820f03afb4793763e95317620"),
    "mae": ("facebookresearch/mae", "efb2a8062c206524e35e47d04501ed4f544c0ae8"),
    "vissl": ("facebookresearch/vissl", "09270ed25a6c2cf71263d955b64cbe076d34ac45"),
    "simclr": ("google-research/simclr", "0075cc077e65a023def9cd955cf1fc2d8c53e7b8"),
    "simclr-later": ("google-research/simclr", "383d4143fd8cf7879ae10f1046a9baeb753ff438"),
    "byol": ("google-deepmind/deepmind-research", "f5de0ede8430809180254ee957abf36ed62579ef"),
    "SimMIM": ("microsoft/SimMIM", "d3e29bcac950b83edc34ca33fe4404f38309052c"),
    "lemniscate": ("zhirongw/lemniscate.pytorch", "f7cfe298357cb2b169cd59eb540aca24bed1f9b8"),
    "lightly": ("lightly-ai/lightly", "e8d317fc5a87f4387a85a35e689869039ec249ee"),
}
TOOK = {  # as the sources say
    "simclr": "6 hours on 32 TPU v3",
    "moco_v1": "53 hours on 8 V100",
    "moco_v2": "53 hours on 8 V100",
    "moco_v3": "16 V100",
    "moco_v3_vit_small": "32 V100",
    "byol": "8 hours on 512 TPU v3",
    "simsiam": "8 V100",
    "barlow_twins": "7 days on 16 V100",
    "vicreg": "32 GPUs",
    "vicregl": "32 GPUs",
    "tico": "2 RTX 4090",
    "swav": "3:40 minutes an epoch on 64 GPUs, so 49 hours",
    "swav_256": "52 minutes an epoch on 4 GPUs, so 7 days",
    "dino": "1.75 days on 8 GPUs",
    "dino_resnet50": "2 RTX 4090",
    "rotation": "8 GPUs",
    "jigsaw": "8 GPUs",
    "mae": "ViT-L, 800 epochs: 42 hours on 64 V100",
    "simmim": "16 GPUs",
}
SLICES = ("v5e:2x4", "v5e:8x8", "v5p:8x8x8")
INTRODUCTION = """\
# The recipes beside their sources

<!-- Written by docs/make_recipes.py from docs/recipes.csv. Change the table, then run it. -->

For each recipe of [`configs/imagenet.py`](../configs/imagenet.py): the hyper-parameters of the official code, where
they stand, our option and value, and why the two differ where they do. "=" means equal. Options in brackets are set by
the preset or by a default, not by the recipe. The code was read at one commit of each repository; links lead to its
lines. `tests/test_recipe_sources.py` holds this table to the config. None of these recipes was run here:
[what can be confirmed, and how](reproduce.md).

**Different in all of them**

- Crops are resized bilinearly with antialiasing; BYOL, Barlow Twins, VICReg, VICRegL, DINO and MAE resize bicubically.
- Schedules move with every step; those of MoCo v1 and v2, SimSiam, instance discrimination, rotation and jigsaw move
  with every epoch.
- An epoch has only whole batches, as in most sources; Barlow Twins and VICReg also take the smaller last one.
- A blur's kernel has a tenth of the view's side, as SimCLR's; Pillow's, in the PyTorch sources, has none.
- Computation is in float32; most sources mix in float16, and `model.dtype=bfloat16` comes near it.
"""


def rows() -> list[dict[str, str]]:
    """The rows of docs/recipes.csv, in the order of the recipes."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def text(value: Any) -> str:
    """A value as the table writes it.

    >>> text(1e-6), text((0.2, 1)), text("100 epochs"), text(0.3 / 4.8)
    ('1e-06', '(0.2, 1)', '100 epochs', '0.0625')
    """
    if isinstance(value, tuple | list):
        return f"({', '.join(map(text, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def ours(made: Mapping[str, Any], recipe: str, key: str) -> str:
    """The value of an option in a recipe of the config file `made`, as the run has it. augment.*: of the first view,
    augment.second.* of the second one, augment.local.* of local ones; published.PROTOCOL: the published number."""
    if key.startswith("published."):
        return next(text(p["value"]) for p in made["get_published"](recipe) if p["protocol"] == key.partition(".")[2])
    config = resolve(made["get_config"](recipe))
    section, *rest = key.split(".")
    if section == "augment" and rest[-1] not in ("preset", "local_views"):
        local = bool(config.augment.local_views)
        views = resolve_views(config.augment, 2, config.data.size, local)
        return text(getattr(views[{"second": 1, "local": -1}.get(rest[0], 0)], rest[-1]))
    value: Any = to_json(config)
    for part in (section, *rest):
        value = value[part]
    return text(value)


def link(source: str) -> str:
    """A source as a link to its line; words stay words."""
    match = re.fullmatch(r"([\w.-]+):(.+):(\d+)", source)
    if not match:
        return source
    repository, commit = COMMITS[match[1]]
    return f"[{match[2].rpartition('/')[2]}, {match[3]}](https://github.com/{repository}/blob/{commit}/{match[2]}#L{match[3]})"


def page(made: Mapping[str, Any]) -> str:
    parts = [INTRODUCTION]
    for recipe, group in itertools.groupby(rows(), key=lambda row: row["recipe"]):
        listed = list(group)
        names = {row["source"].partition(":")[0] for row in listed} & set(COMMITS)
        read = ", ".join(f"{COMMITS[n][0]} at {COMMITS[n][1][:10]}" for n in COMMITS if n in names)
        own = set(made["RECIPES"][recipe]) | set(made["COMMON"])
        parts.append(f"## {recipe}\n\n{read}.\n")
        parts.append("| official | value | source | our option | ours | why it differs |\n|---|---|---|---|---|---|")
        for row in listed:
            option = row["key"] and (
                f"`{row['key']}`" if row["key"] in own or "published" in row["key"] else f"(`{row['key']}`)"
            )
            value = "=" if row["ours"] == row["official"] else row["ours"]
            cells = (row["name"], row["official"], link(row["source"]), option, value, row["why"])
            parts.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        parts[-1] += "\n"
    return "\n".join(parts)


def hours() -> dict[str, dict[str, float]]:
    """Of each recipe and slice in benchmarks/results/plans.csv; what does not fit, or was not planned, is absent."""
    found: dict[str, dict[str, float]] = {}
    with PLANS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["fits"] == "True" and row["grouped"] == "False":
                found.setdefault(row["recipe"], {})[row["topology"]] = float(row["hours"])
    return found


def overview(made: Mapping[str, Any]) -> str:
    """The table of docs/reproduce.md."""
    lines = ["| recipe | published | took, by its source | " + " | ".join(SLICES) + " | settings that differ |"]
    lines.append("|---" * (4 + len(SLICES)) + "|")
    planned = hours()
    for recipe, group in itertools.groupby(rows(), key=lambda row: row["recipe"]):
        listed = [row for row in group if row["name"] not in ("images", "reader")]
        differ = sum(row["ours"] != row["official"] for row in listed)
        numbers = ", ".join(f"{text(p['value'])} % {p['protocol']}" for p in made["get_published"](recipe))
        each = [f"{planned[recipe][s]:.1f} h" if s in planned.get(recipe, {}) else "" for s in SLICES]
        count = f"[{differ} of {len(listed)}](recipes.md#{recipe})"
        cells = (f"`{recipe}`", numbers, TOOK.get(recipe, ""), *each, count)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_overview(page: str, made: Mapping[str, Any]) -> str:
    """docs/reproduce.md with its table written anew."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + overview(made) + END + rest.partition(END)[2]


def recipes() -> dict[str, Any]:
    """What configs/imagenet.py defines."""
    import runpy

    return runpy.run_path(str(DOCS.parent / "configs" / "imagenet.py"))


if __name__ == "__main__":
    PAGE.write_text(page(recipes()), encoding="utf-8")
    REPRODUCE.write_text(with_overview(REPRODUCE.read_text(encoding="utf-8"), recipes()), encoding="utf-8")
