"""Writes docs/configuration.md from the options that ssl_jax/config/sections.py and the methods declare.

python docs/make_configuration.py
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from ssl_jax import registry
from ssl_jax.augment.presets import PRESETS
from ssl_jax.config import SECTIONS, describe, method_module, recipe
from ssl_jax.fields import Option

OUT = Path(__file__).parent / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by docs/make_configuration.py. Change that file or the options in the sources, then run it. -->

A config is a Python file with one function, `get_config(arg)`, which returns an `ml_collections.ConfigDict`. Usually
that is `default(method)` with a few lines changed:

```python
from ssl_jax.config import default


def get_config(method="byol"):
    config = default(method)  # every option, with the values of the method's recipe
    config.data.name = "folder"
    config.data.path = "scans"
    config.train.duration = "50 epochs"
    return config
```

`--config=FILE.py` executes such a file, with all that its code does; `--config=FILE.py:simclr` passes it an argument. A
name without a folder, as in `--config=pretrain:byol`, is one of the configs that come with the package, and
`ssl-jax pretrain byol` is short for it. Flags change any option:

```
ssl-jax pretrain --config=pretrain:byol --config.data.name=folder --config.data.path=scans \\
    --config.optim.lr=0.3 --config.train.duration="50 epochs" --workdir=runs/a
ssl-jax pretrain byol scans --epochs=50 --config.optim.lr=0.3 --workdir=runs/a      # the same, shorter
```

The command line shows these tables, too: `ssl-jax pretrain --help=optim` lists the options of a section, and
`ssl-jax pretrain --help=byol` those of a method.

- **Errors.** An unknown option, a value of the wrong type or one that is not allowed ends the command before anything
  runs. The message is one line with the option, the value and what is allowed.
- **Run folder.** `config.json` in the run folder keeps all options. The same command continues the run. A command with
  other options is refused, and the message names those that differ.
- **Method.** A flag for `method.name` changes the method of a config: its options, and its recipe in place of what the
  recipe of the old method has set.
- **Durations** are written `"10 epochs"`, `"500 steps"` or `"100000 examples"`. An epoch has as many whole batches as
  the data fill; left-over images are drawn in another epoch.
- **Tuples** are written as in Python: `--config.augment.crop_scale="(0.3, 1.0)"`.
- **Defaults** in the tables apply unless the recipe of the method (see [method](#method)) says otherwise.
- **Learning rates** are for a batch of `optim.lr_batch` and scale linearly with `train.batch`.
- **Names** of sources, models and methods can also come from other packages, see [below](#names-from-other-packages).
"""

TOP = "Two options belong to no section:\n"

AUGMENT = """\
`config.augment.preset` is the name of a pair of views:
{presets}.
Options of a view change the preset: `--config.augment.blur=0.5` for all views, `--config.augment.second.blur=0.1` only
for the second one, and `--config.augment.local.size=96` only for the local views of methods with multi-crop.
Everything else stays as in the preset. The table shows the defaults of a plain view, as in the preset `none`.
`ssl-jax views METHOD DIR --out=views.png` draws the result before you train.
"""

METHODS = """\
Each method has its own options and a recipe. A recipe replaces defaults of other sections, and flags change its values
like any other. `ssl-jax methods` lists all methods.
"""

PACKAGES = """\
## Names from other packages

A method, data source or model can live in a package of your own. Its import path is its name: set `method.name`,
`data.name` or `model.name` to `mypackage.mymodule`. Entry points in the `pyproject.toml` of the package give it a
shorter name, which `ssl-jax methods` lists:

```toml
[project.entry-points."ssl_jax.methods"]
mymethod = "mypackage.mymethod"

[project.entry-points."ssl_jax.sources"]
mysource = "mypackage.mysource"

[project.entry-points."ssl_jax.models"]
mymodel = "mypackage.mymodel"
```

| kind | option | the module defines |
|---|---|---|
| method | `method.name` | `Config` and `make(config, encoder, run) -> Method`, as in `ssl_jax/methods/base.py` |
| source | `data.name` | `read(data: ssl_jax.config.Data) -> ssl_jax.data.Source` |
| model | `model.name` | `build(model: ssl_jax.config.Model, channels: int, size: int) -> ssl_jax.network.Network` |
"""


def page() -> str:
    parts = [INTRODUCTION, TOP, table("", describe("config"))]
    for name, kind in SECTIONS.items():
        intro = (
            AUGMENT.format(presets=", ".join(f"`{p}`" for p in PRESETS)) if name == "augment" else f"{kind.__doc__}\n"
        )
        parts += [f"## {name}\n", intro, table(f"{name}.", describe(name))]
    parts += ["## method\n", METHODS, *map(method, registry.own_names("method")), PACKAGES]
    return "\n".join(parts)


def method(name: str) -> str:
    module = method_module(name)
    summary = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
    settings = ", ".join(f"`{key}={value!r}`" for key, value in recipe(name).items())
    parts = [f"### {name}\n", f"{summary}\n"]
    if settings:
        parts.append(textwrap.fill(f"Recipe: {settings}.", 120, break_on_hyphens=False) + "\n")
    if options := describe(name):
        parts.append(table("method.", options))
    return "\n".join(parts)


def table(prefix: str, options: Iterable[Option]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    lines = ["| option | allowed | default | meaning |", "|---|---|---|---|"]
    for name, allowed, default, help in options:
        lines.append(f"| `{prefix}{name}` | {cell(allowed)} | `{cell(default)}` | {cell(help)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OUT.write_text(page())
