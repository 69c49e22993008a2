"""Draws the data flow of every method into docs/methods.md, from the program that each method really is.

    python docs/make_methods.py

Forward and loss are traced, and every value is followed from the views to the loss: an arrow means that one network
reads what the other made. The text around the pictures is written by hand.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ssl_jax.augment import make_views, resolve_views
from ssl_jax.config import default, method_module, resolve
from ssl_jax.encoder import build
from ssl_jax.methods.base import RunInfo
from ssl_jax.transforms import target_of

OUT = Path(__file__).resolve().parent / "methods.md"
SIZE, BATCH = 16, 16
SMALL = {"hidden": 8, "queue": 24, "negatives": 8, "prototypes": 8, "predictor_hidden": 8, "permutations": 8, "out": 8}
NAMES = {"label": "labels", "index": "index of the image", "drawn": "drawn parameters"}


class Flow:
    """What each network reads: names of inputs, followed through a jaxpr."""

    def __init__(self, networks: list[str]):
        self.reads: dict[str, set[str]] = {name: set() for name in networks}

    def follow(self, jaxpr: Any, inputs: list[frozenset[str]]) -> list[frozenset[str]]:
        """Of each output, the names of all that it depends on."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def names(v):
            return frozenset() if isinstance(v, Literal) else known.get(v, frozenset())

        for eqn in jaxpr.eqns:
            given = [names(v) for v in eqn.invars]
            inner = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
            inner = [p for p in inner if hasattr(p, "eqns") and len(p.invars) == len(given)]
            if inner:
                made = self.follow(inner[0], given)
            else:
                if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                    self.meet(given)
                made = [frozenset().union(*given)] * len(eqn.outvars)
            known.update(zip(eqn.outvars, made, strict=True))
        return [names(v) for v in jaxpr.outvars]

    def meet(self, given: list[frozenset[str]]) -> None:
        """Where the parameters of a network first meet data, these are what it reads."""
        for name in self.reads:
            if frozenset([name]) in given:
                for data in given:
                    if "views" in data and name not in data:
                        self.reads[name] |= data

    def last(self, names: frozenset[str] | set[str]) -> list[str]:
        """Those that no other of them has read."""
        return sorted(n for n in names if not any(n in self.reads.get(other, ()) for other in names - {n}))


def flow(method_name: str) -> str:
    """A mermaid flow chart."""
    config = default(method_name)
    config.method.update({key: value for key, value in SMALL.items() if key in config.method})
    vit = config.model.name.startswith("vit")
    config.model.update({"name": "vit_tiny", "patch": 4, "depth": 1} if vit else {"name": "resnet_thin"})
    resolved = resolve(config)
    encoder = build(resolved.model, 3, SIZE)
    method = method_module(method_name).make(resolved.method, encoder, RunInfo(100, 10, 64, 3))
    views = resolve_views(resolved.augment, method.views, SIZE, method.local_views)
    images = jnp.zeros((BATCH, SIZE, SIZE, 3), jnp.uint8)
    parts: list[str] = []

    def init(rng):
        params, extra = method.init(rng, make_views(views, method.shares)(rng, images[:2])[0])
        parts.extend(params)  # in their order, which a traced dict loses
        return params, target_of(method.transform.init(params)), extra

    def run(params, target, extra, batch, rng):
        outputs, _ = method.forward(params, target, extra, batch, rng)
        return method.loss(outputs, extra, batch)[0]

    def batch_of(rng):
        made, drawn = make_views(views, method.shares)(rng, images)
        return {"views": made, "drawn": drawn, "label": jnp.zeros(BATCH, int), "index": jnp.arange(BATCH)}

    rng = jax.random.key(0)
    params, target, extra = jax.eval_shape(init, rng)
    batch = jax.eval_shape(batch_of, rng)
    args = params, target, extra, batch, jax.eval_shape(lambda: jax.random.split(rng, BATCH))
    jaxpr = jax.make_jaxpr(run)(*args).jaxpr

    def name(path) -> frozenset[str]:
        which, *keys = (getattr(p, "key", getattr(p, "idx", None)) for p in path)
        if which == 0:
            return frozenset([keys[0]])
        if which == 1:
            return frozenset([f"target {keys[0]}"])
        if which == 2:
            if keys[0] in ("stats", "target"):
                return frozenset([("target " if keys[0] == "target" else "") + keys[1]])
            return frozenset([keys[0]])
        return frozenset() if which == 4 else frozenset([keys[0]])

    inputs = [name(path) for path, _ in jax.tree_util.tree_flatten_with_path(args)[0]]
    moving = [f"target {part}" for part in target or ()]
    found = Flow([*parts, *moving])
    (in_loss,) = found.follow(jaxpr, inputs)
    in_loss -= {"step"}  # of schedules
    used = [n for n in [*parts, *moving] if n in in_loss]
    states = sorted(in_loss - {*used, *NAMES, "views"})

    count = f"{method.views} view{'s' if method.views > 1 else ''}"
    lines = [f'  views["{count}{", local views" if method.local_views else ""}"]']
    ids = {n: n.replace(" ", "_") for n in [*used, *states, "views", "drawn", "label", "index"]}
    lines += [f'  {ids[n]}["{n}"]' for n in parts if n in used]
    lines += [f'  {ids[n]}(["moving average of {n.removeprefix("target ")}"])' for n in moving if n in used]
    lines += [f'  {ids[n]}[("{n}")]' for n in states]
    lines += [f'  {n}["{text}"]' for n, text in NAMES.items() if n in in_loss]
    arrows = [(other, n, n in moving) for n in used for other in found.last(found.reads[n])]
    arrows += [(n, "loss((loss))", n in moving) for n in found.last(in_loss)]
    for start, end, fixed in arrows:
        arrow = "-.->" if fixed or start in states else "-->"
        lines.append(f"  {ids[start]} {arrow} {ids.get(end, end)}")
    return "\n".join(["```mermaid", "flowchart LR", *lines, "```"])


def page(text: str) -> str:
    """The text with each picture drawn anew, below its method's heading."""
    return re.sub(
        r"(<!-- flow: (\w+) -->\n)(?:```mermaid\n.*?```\n)?", lambda m: f"{m[1]}{flow(m[2])}\n", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    OUT.write_text(page(OUT.read_text()))
