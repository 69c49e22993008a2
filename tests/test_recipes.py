"""Every recipe of configs/ is a config of this library, and its first step can be traced at full size."""

import dataclasses
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from ssl_jax import train
from ssl_jax.config import resolve
from ssl_jax.errors import UserError
from ssl_jax.evaluation import PROTOCOLS
from ssl_jax.parallel import make_mesh
from ssl_jax.train import memory

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = {name: runpy.run_path(str(CONFIGS / f"{name}.py")) for name in ("imagenet", "cifar10")}
EXAMPLES = {"imagenet": (1_281_167, 1000), "cifar10": (50_000, 10)}  # images and classes of the training part
RECIPES = [(file, name) for file, made in FILES.items() for name in made["RECIPES"]]
# The last of each method and network: the others differ in numbers alone.
TRACED = {}
for file, name in RECIPES:
    recipe = {"method": name, **FILES[file]["COMMON"], **FILES[file]["RECIPES"][name]}
    TRACED[file, recipe["method"], recipe["model.name"]] = (file, name)


class Source:
    """As much of a data set as `set_up` looks at."""

    def __init__(self, file, size):
        self.examples, classes = EXAMPLES[file]
        self.shape, self.classes = (size, size, 3), [str(i) for i in range(classes)]
        self.labels, self.objects = np.zeros(1, np.int32), None

    def __len__(self):
        return self.examples


def flat(config):
    """ "section.key": value of a ConfigDict of any depth, as a recipe writes it."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from ((f"{key}.{k}", v) for k, v in flat(value))
        else:
            yield key, value


@pytest.mark.parametrize(("file", "name"), RECIPES)
def test_a_recipe_says_what_was_published_and_sets_keys_that_exist(file, name):
    made = FILES[file]
    recipe = made["RECIPES"][name]
    resolve(made["get_config"](name))
    assert made["get_published"](name) == recipe["published"] and recipe["published"]
    for entry in recipe["published"]:
        assert set(entry) == {"protocol", "metric", "value", "source"} and entry["source"]
        assert entry["protocol"] in PROTOCOLS and entry["metric"] == "top1" and 20 < entry["value"] < 100
    protocols = [entry["protocol"] for entry in recipe["published"]]
    assert len(set(protocols)) == len(protocols)
    wanted = {k: v for k, v in {**made["COMMON"], **recipe}.items() if k not in ("published", "method")}
    found = dict(flat(made["get_config"](name)))
    assert {k: found.get(k, "no such key") for k in wanted} == wanted
    for key in ("train.batch", "train.duration", "optim.name", "optim.lr", "optim.weight_decay"):
        assert key in recipe, "left to a default that may change"


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), TRACED.values())
def test_a_recipe_is_traced_at_full_size(file, name):
    config = resolve(FILES[file]["get_config"](name))
    # Without the online probe, which would trace the encoder twice more.
    evaluation = dataclasses.replace(config.eval, online_probe=False)
    config = dataclasses.replace(config, eval=evaluation)
    source, batch = Source(file, config.data.size), config.train.batch
    setup = train.set_up(config, source)
    state = jax.eval_shape(lambda: train.init_state(setup, 0))
    mesh = make_mesh(1, batch)
    _, inputs = memory.abstract_arguments(setup, config, source, mesh)
    assert ("crops" in inputs) == (config.data.crops == "file") == ("image" not in inputs)
    after, metrics = jax.eval_shape(train.make_step(setup, config, mesh), state, inputs)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("file", FILES)
def test_an_unknown_recipe_is_one_line_with_a_hint(file):
    with pytest.raises(UserError, match=rf"{file}:RECIPE='simclrr': unknown; did you mean 'simclr'\?"):
        FILES[file]["get_config"]("simclrr")
    assert resolve(FILES[file]["get_config"]()).data.name == "tfds"
