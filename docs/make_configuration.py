"""Writes docs/configuration.md from the sources of the options, so that the page can't fall behind them.

    python docs/make_configuration.py

Types and defaults are those of the dataclasses in ssl_jax/config.py and ssl_jax/methods; meanings are the comments at
the end of their lines.
"""

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Made by docs/make_configuration.py: change that file or the comments in the sources, then run it. -->

A config is a flat Python file with one function, `get_config(arg)`, which returns an `ml_collections.ConfigDict`:
usually `default(method)` with a few lines changed.

```python
from ssl_jax.config import default


def get_config(method="byol"):
    config = default(method)  # every key, at the values of the method's recipe
    config.data.name = "folder"
    config.data.path = "scans"
    config.train.duration = "50 epochs"
    return config
```

`--config=FILE.py` names such a file, `--config=FILE.py:simclr` passes it an argument, and a name without a folder, as
in `--config=pretrain:byol`, finds one of those that come with the package. Any key can then be set by a flag:

```
ssl-jax pretrain --config=pretrain:byol --config.data.name=folder --config.data.path=scans \\
    --config.optim.lr=0.3 --config.train.duration="50 epochs" --workdir=runs/a
```

- A key that does not exist, a value of the wrong type or one that is not allowed ends the command with one line that
  names the key and what is allowed; nothing is run.
- The run folder keeps the result in `config.json`. The same command continues a run; another config in the same
  folder is refused, with the keys that differ.
- **Durations** are `"10 epochs"`, `"500 steps"` or `"100000 examples"`. An epoch is as many whole batches as the data
  give; what is left over waits for another epoch. `"0 steps"` turns `eval.every` off.
- **Tuples** are written as Python writes them: `--config.augment.crop_scale="(0.3, 1.0)"`.
- **Defaults** in the tables hold before the method's recipe, which is under [method](#method).
- **Collapse** is named while training; `--config.on_collapse=stop` ends the run then, `warn` (the default) goes on.
- **Learning rates** hold for a batch of `optim.lr_batch` and grow linearly with `train.batch`.
"""

AUGMENT = """\
`config.augment.preset` names a pair of views: {presets}.
Every key of a view can be set on top of it, `--config.augment.blur=0.5` for both views,
`--config.augment.second.blur=0.1` for the second one alone, `--config.augment.local.size=96` for the local views that
methods with multi-crop take; what is not set stays as the preset has it.
`ssl-jax views --config=... --out=views.png` shows what comes out, before anything is trained. The defaults in this
table are those of a bare view, as in the preset `none`.
"""

METHODS = """\
Keys of the method itself, and its recipe: the values that it puts in the place of other sections' defaults, and that
you can change like any other. `ssl-jax methods` lists what there is.
"""

# Of keys whose line in the source needs no comment for its reader.
PLAIN = {
    "augment.perspective_prob": "probability of the perspective",
    "augment.contrast": "factor, as brightness",
    "augment.saturation": "factor, as brightness",
    "augment.solarize_threshold": "pixels above it are inverted; of 1",
    "optim.warmup": "a linear rise of the learning rate from 0, before the schedule",
    "optim.nesterov": "sgd: Nesterov's momentum",
    "optim.weight_decay": "added to the gradient (sgd, lars) or decoupled from it (adamw)",
    "train.duration": "length of the run",
    "train.seed": "of everything random: weights, order, views",
    "train.log_every": "a line in metrics.jsonl",
    "train.save_every": "a checkpoint; the last step is always saved",
    "eval.knn_k": "nearest neighbours that vote",
    "eval.knn_temperature": "a vote weighs exp(cosine / temperature)",
    "finetune.weight_decay": "AdamW's",
    "finetune.augment": "views of the labelled images; keys as under augment",
    "study.labels": "label counts, each drawn within the next larger one",
    "study.seeds": "draws of the labels, the same for every arm",
    "method.hidden": "hidden width of the head",
    "method.out": "dimensions of the projection",
    "method.predictor_hidden": "hidden width of the predictor",
}


class Option(NamedTuple):
    name: str
    kind: str
    default: str
    meaning: str


def page() -> str:
    source = (ROOT / "ssl_jax" / "config.py").read_text()
    parts = [INTRODUCTION]
    for name, kind, _, _ in options(source, "Config"):
        if name in ("method", "method_name", "on_collapse"):
            continue
        parts.append(f"## {name}\n")
        if name == "augment":
            known = ", ".join(f"`{p}`" for p in presets())
            own = [o for o in options(source, "Augment") if o.name in ("preset", "local_views")]
            parts += [AUGMENT.format(presets=known), table([*own, *options(source, "View")], name)]
        else:
            parts += [docstring(source, kind), table(options(source, kind), name)]
    parts += ["## method\n", METHODS]
    for path in sorted((ROOT / "ssl_jax" / "methods").glob("*.py")):
        if path.stem not in ("__init__", "base"):
            parts.append(method(path))
    return "\n".join(part for part in parts if part)


def options(source: str, name: str) -> list[Option]:
    """The fields of a dataclass in a source text."""
    found = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.strip()[0] != "#"
    }
    return [
        Option(
            node.target.id, ast.unparse(node.annotation), default(node.value), comments.get(node.end_lineno or 0, "")
        )
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def default(value: ast.expr | None) -> str:
    """A field's default as it is written; for a factory, what it makes."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        made = value.keywords[0].value
        return ast.unparse(made.body) if isinstance(made, ast.Lambda) else f"{ast.unparse(made)}()"
    return ast.unparse(value) if value else ""


def docstring(source: str, name: str) -> str:
    found = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    text = ast.get_docstring(found)
    return f"{text}\n" if text else ""


def presets() -> list[str]:
    for node in ast.parse((ROOT / "ssl_jax" / "augment" / "presets.py").read_text()).body:
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "PRESETS"
            and isinstance(node.value, ast.Dict)
        ):
            return [ast.literal_eval(key) for key in node.value.keys if key]
    raise LookupError("ssl_jax/augment/presets.py: no PRESETS")


def method(path: Path) -> str:
    source = path.read_text()
    tree = ast.parse(source)
    first = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    recipe: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RECIPE":
            recipe = ast.literal_eval(node.value)
    settings = ", ".join(f"`{key}={value!r}`" for key, value in recipe.items())
    told = f"\nRecipe: {settings}.\n" if recipe else ""
    return f"### {path.stem}\n\n{first}\n{told}\n{table(options(source, 'Config'), 'method')}"


def table(rows: list[Option], section: str) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, usual, meaning in rows:
        key = f"{section}.{name}"
        lines.append(f"| `{key}` | `{cell(kind)}` | `{cell(usual)}` | {cell(meaning or PLAIN.get(key, ''))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OUT.write_text(page())
