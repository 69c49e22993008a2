"""Writes the sections of docs/methods.md: a method's docstring, and its data flow as its program really is.

    python docs/make_methods.py

Text above the marker is written by hand. Below it stand all methods that `ssl-jax methods` lists, grouped by the
`Family: ...` line of their docstrings, and the costs of a step from benchmarks/results/methods_cost.csv. To draw the
data flow, `forward` and `loss` are traced and every value is followed from the views to the loss: an arrow means that
one network reads what the other one computes.
"""

import ast
import csv
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ssl_jax.augment import make_views, resolve_views
from ssl_jax.config import default, method_module, method_names, resolve
from ssl_jax.encoder import build
from ssl_jax.methods.base import Context, RunInfo
from ssl_jax.transforms import target_of

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "methods.md"
COSTS = ROOT / "benchmarks" / "results" / "methods_cost.csv"
MARKER = "<!-- Everything below is written by docs/make_methods.py. -->\n"
FAMILIES = {
    "With labels": "",
    "Contrastive": """\
All of these find one positive among negatives. Guessing gives a loss of ln K. The metric `chance` is the loss as a
share of that; a run that stays at 1 has collapsed or learns nothing. `positive_rank` counts the negatives that look
more like the query than its positive does. The loss of a memory bank says nothing of the kind; watch `projection_std`
there.""",
    "Without negatives": """\
Nothing here pushes images apart directly; each method has its own reason not to map all of them to one point. The
reason has failed when `projection_std` (about 1/√D is healthy for normalised projections) or `embedding_std` is near
0.""",
    "Clustering and distillation": """\
Targets are probabilities over K outputs. There are two ways to collapse: `target_entropy` at ln K means targets
without any preference, `mean_target_entropy` near 0 means that all images share one output. `distill` is different: its
teacher never changes, so `projection_std` near 0 means that the teacher itself tells no images apart.""",
    "Pretext tasks": """\
One network, and one question whose answer is known because we asked it. These methods cannot collapse, but shortcuts
can solve the task without learning anything useful; each method closes the known ones. They are weaker than the others
for classification, and useful where transforms cannot be trusted.""",
    "Other methods": "",
}
SIZE, BATCH = 16, 16
SMALL = {"hidden": 8, "queue": 24, "negatives": 8, "prototypes": 8, "predictor_hidden": 8, "permutations": 8, "out": 8}
DATA = {"label": "labels", "index": "index of the image", "drawn": "drawn parameters"}


class Flow:
    """What each network reads: names of inputs, followed through a jaxpr."""

    def __init__(self, networks: list[str]):
        self.reads: dict[str, set[str]] = {name: set() for name in networks}

    def follow(self, jaxpr: Any, inputs: list[frozenset[str]]) -> list[frozenset[str]]:
        """For each output, the names of all inputs that it depends on."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def names(var):
            return frozenset() if isinstance(var, Literal) else known.get(var, frozenset())

        for eqn in jaxpr.eqns:
            sources = [names(var) for var in eqn.invars]
            inner = [getattr(param, "jaxpr", param) for param in eqn.params.values()]
            inner = [param for param in inner if hasattr(param, "eqns") and len(param.invars) == len(sources)]
            if inner:
                results = self.follow(inner[0], sources)
            else:
                if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                    self.meet(sources)
                results = [frozenset().union(*sources)] * len(eqn.outvars)
            known.update(zip(eqn.outvars, results, strict=True))
        return [names(var) for var in jaxpr.outvars]

    def meet(self, sources: list[frozenset[str]]) -> None:
        """Where the parameters of a network first meet data: that data is what the network reads."""
        for name in self.reads:
            if frozenset([name]) in sources:
                for data in sources:
                    if "views" in data and name not in data:
                        self.reads[name] |= data

    def last(self, names: frozenset[str] | set[str]) -> list[str]:
        """Those that none of the others reads."""
        return sorted(n for n in names if not any(n in self.reads.get(other, ()) for other in names - {n}))


def flow(method_name: str) -> str:
    """A mermaid flow chart of a method."""
    config = default(method_name)
    config.method.update({key: value for key, value in SMALL.items() if key in config.method})
    tiny = getattr(method_module(method_name), "TINY", {})
    config.update_from_flattened_dict({key: value for key, value in tiny.items() if key.startswith("method.")})
    vit = resolve(config).model.name.startswith("vit")
    config.model.update({"name": "vit_tiny", "patch": 4, "depth": 1} if vit else {"name": "resnet_thin"})
    resolved = resolve(config)
    encoder = build(resolved.model, 3, SIZE)
    method = method_module(method_name).make(resolved.method, encoder, RunInfo(100, 10, 64, 3))
    views = resolve_views(resolved.augment, method.views, SIZE, method.local_views)
    images = jnp.zeros((BATCH, SIZE, SIZE, 3), jnp.uint8)
    parts: list[str] = []

    def init(key):
        params, state = method.init(key, make_views(views, method.shares)(key, images[:2])[0])
        parts.extend(params)  # in their order, which a traced dict loses
        return params, target_of(method.transform.init(params)), state

    def run(params, target, state, batch, keys):
        outputs, _ = method.forward(params, target, state, batch, keys)
        return method.loss(outputs, state, batch, Context(jnp.zeros([], jnp.int32), keys[0], params))[0]

    def batch_of(key):
        arrays, drawn = make_views(views, method.shares)(key, images)
        return {"views": arrays, "drawn": drawn, "label": jnp.zeros(BATCH, int), "index": jnp.arange(BATCH)}

    key = jax.random.key(0)
    params, target, state = jax.eval_shape(init, key)
    batch = jax.eval_shape(batch_of, key)
    args = params, target, state, batch, jax.eval_shape(lambda: jax.random.split(key, BATCH))
    jaxpr = jax.make_jaxpr(run)(*args).jaxpr

    def name(path) -> frozenset[str]:
        which, *keys = (next(getattr(p, a) for a in ("key", "idx", "name") if hasattr(p, a)) for p in path)
        if which == 0:
            return frozenset([keys[0]])
        if which == 1:
            return frozenset([f"target {keys[0]}"])
        if which == 2:
            _, *keys = keys  # stats or memory
            return frozenset([f"target {keys[1]}" if keys[0] == "target" else keys[0]])
        return frozenset() if which == 4 else frozenset([keys[0]])

    inputs = [name(path) for path, _ in jax.tree_util.tree_flatten_with_path(args)[0]]
    moving = [f"target {part}" for part in target or ()]
    networks = Flow([*parts, *moving])
    (in_loss,) = networks.follow(jaxpr, inputs)
    used = [n for n in [*parts, *moving] if n in in_loss]
    memory = sorted(in_loss - {*used, *DATA, "views"})

    count = f"{method.views} view{'s' if method.views > 1 else ''}"
    lines = [f'  views["{count}{", local views" if method.local_views else ""}"]']
    ids = {n: n.replace(" ", "_") for n in [*used, *memory, "views", "drawn", "label", "index"]}
    lines += [f'  {ids[n]}["{n}"]' for n in parts if n in used]
    lines += [f'  {ids[n]}(["moving average of {n.removeprefix("target ")}"])' for n in moving if n in used]
    lines += [f'  {ids[n]}[("{n}")]' for n in memory]
    lines += [f'  {n}["{text}"]' for n, text in DATA.items() if n in in_loss]
    arrows = [(other, n, n in moving) for n in used for other in networks.last(networks.reads[n])]
    arrows += [(n, "loss((loss))", n in moving) for n in networks.last(in_loss)]
    for start, end, fixed in arrows:
        arrow = "-.->" if fixed or start in memory else "-->"
        lines.append(f"  {ids[start]} {arrow} {ids.get(end, end)}")
    return "\n".join(["```mermaid", "flowchart LR", *lines, "```"])


def sections() -> str:
    """All methods, family by family."""
    families: dict[str, list[str]] = {title: [] for title in FAMILIES}
    titles = {title.lower(): title for title in FAMILIES}
    for name in method_names():
        docstring = ast.get_docstring(ast.parse(Path(method_module(name).__file__ or "").read_text())) or ""
        family = re.search(r"^Family: (.+?)\.?$", docstring, flags=re.M)
        text = re.sub(r"\n*^Family: .*$", "", docstring, flags=re.M)
        title = titles.get(family[1].lower() if family else "", "Other methods")
        families[title].append(f"### {name}\n\n{text}\n\n{flow(name)}\n")
    return "\n".join(
        "\n".join(part for part in (f"## {title}\n", f"{FAMILIES[title]}\n" if FAMILIES[title] else "", *parts) if part)
        for title, parts in families.items()
        if parts
    )


def costs() -> str:
    """The table of what a step costs, relative to one of SimCLR."""
    with COSTS.open() as file:
        rows = list(csv.DictReader(file))
    ratios = [[float(row[key]) / float(row[f"simclr_{key}"]) for key in ("step_s", "step_mb")] for row in rows]
    ranked = sorted(zip(ratios, (row["method"] for row in rows), strict=True))
    lines = [f"| `{name}` | {time:.2f} | {memory:.2f} |" for (time, memory), name in ranked]
    head = ["| method | time / SimCLR's | memory / SimCLR's |", "|---|---|---|"]
    return "\n".join(["## What a step costs\n", COST_TEXT, *head, *lines]) + "\n"


COST_TEXT = """\
One training step of each method beside one of SimCLR, the two taking turns in one process: 64 images of 28 px,
`resnet_thin`, two CPU cores. `mae` and `simmim` run on a small ViT, so their numbers say more about the network. Memory
is the compiler's figure: the state and the most that a step holds. The ratios differ at ImageNet's sizes. Command:
`python benchmarks/methods.py --cost`; all numbers: [methods_cost.csv](../benchmarks/results/methods_cost.csv).
"""


def page(text: str) -> str:
    """The page with everything below the marker written anew."""
    return f"{text.partition(MARKER)[0]}{MARKER}\n{sections()}\n{costs()}"


if __name__ == "__main__":
    OUT.write_text(page(OUT.read_text()))
