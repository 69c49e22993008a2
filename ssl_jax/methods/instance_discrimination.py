r"""Instance discrimination: each image is a class of its own; a memory bank keeps one embedding of every image.

A view has to find its own row of the bank among all others (`softmax`) or a few thousand of them (`nce`). Cheap to
compute, with one view per step. The bank takes `out` numbers for each image of the data set, and its rows are an epoch
old, which makes training slow. In the first epoch an image meets a random row: the loss falls only after it.

$$P(i\mid v)=\frac{e^{v\cdot b_i/T}}{Z}$$

Source: https://arxiv.org/abs/1805.01978; zhirongw/lemniscate.pytorch, which like this leaves out the paper's proximal
term.

Family: contrastive.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_jax.collapse import embedding_std
from ssl_jax.fields import option
from ssl_jax.losses import indexed_info_nce, nce, nce_normalizer, normalize
from ssl_jax.methods.base import Method, init_network, std_collapse
from ssl_jax.models import linear
from ssl_jax.network import stack


@dataclass(frozen=True)
class Config:
    mode: Literal["nce", "softmax"] = option(
        "nce", "nce: against `negatives` drawn rows; softmax: against the whole bank, for small data sets"
    )
    # main.py, --nce-k, there for each image
    negatives: int = option(4096, "rows of the bank drawn at each step, for the whole batch", min=1)
    temperature: float = 0.07  # main.py, --nce-t
    momentum: float = 0.5  # of a row of the bank when its image comes (main.py, --nce-m)
    out: int = 128  # main.py, --low-dim


# main.py: SGD with momentum 0.9, weight decay 1e-4 on everything, batch 256, 200 epochs, rate x 0.1 at 120 and at 160.
RECIPE = {"optim.lr": 0.03, "optim.schedule": "step", "optim.decay_all": True}
# For the contract test: Z of a bank of 8 numbers a row is far off at the own temperature.
TINY = {"method.temperature": 0.5}


def make(config, encoder, run):
    network = stack(encoder=encoder, projector=linear(config.out))
    sizes = {"examples": run.examples, "temperature": config.temperature}

    def init(key, views):
        key_net, key_bank = jax.random.split(key)
        params, state = init_network(network)(key_net, views)
        most = (3 / config.out) ** 0.5  # rows of length 1, on average (lib/NCEAverage.py)
        bank = jax.random.uniform(key_bank, (run.examples, config.out), minval=-most, maxval=most)
        return params, state._replace(memory={"bank": bank, "normalizer": jnp.zeros([])})

    def forward(params, target, state, batch, key):
        del target, key
        y, stats = network.apply(params, state.stats, batch["views"][0], train=True)
        outputs = {"embedding": y["encoder"], "z": normalize(y["projector"]), "index": batch["index"]}
        return outputs, stats

    def noise(state, ctx):
        """Rows of the bank, the same for the whole batch."""
        return state.memory["bank"][jax.random.randint(ctx.key, (config.negatives,), 0, run.examples)]

    def normalizer(outputs, state, ctx):
        """Z, fixed from the first batch on."""
        z, bank = jax.lax.stop_gradient(outputs["z"]), state.memory["bank"]
        first = nce_normalizer(z, bank[outputs["index"]], noise(state, ctx), **sizes)
        return jnp.where(state.memory["normalizer"] > 0, state.memory["normalizer"], first)

    def loss(outputs, state, batch, ctx):
        del batch
        z, bank, index = outputs["z"], state.memory["bank"], outputs["index"]
        if config.mode == "nce":
            value = nce(z, bank[index], noise(state, ctx), normalizer=normalizer(outputs, state, ctx), **sizes)
        else:
            value = indexed_info_nce(z, bank, index, temperature=config.temperature)
        return value, {"projection_std": embedding_std(z)}

    def remember(outputs, state, ctx):
        bank, index = state.memory["bank"], outputs["index"]
        rows = normalize(config.momentum * bank[index] + (1 - config.momentum) * outputs["z"])
        return ctx.params, {"bank": bank.at[index].set(rows), "normalizer": normalizer(outputs, state, ctx)}

    # Not `chance_collapse`: against a bank of old rows, a sound run may be worse than that for epochs.
    collapsed = std_collapse("a learning rate or weight decay too high")
    return Method(init, forward, loss, views=1, needs=frozenset({"index"}), post_update=remember, collapsed=collapsed)
