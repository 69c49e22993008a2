r"""Supervised baseline: cross-entropy with labels.

The baseline that every other method is measured against. Use it when labels are plentiful. Labels that are not known do
not count. Multi-label data get a binary cross-entropy for each class; "accuracy" is then the share of known labels on
whose side the logit lies.

$$-\log \mathrm{softmax}(W f(x))_y$$

Source: the usual recipe of https://arxiv.org/abs/1512.03385.

Family: with labels.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from ssl_jax.losses import binary_cross_entropy, cross_entropy
from ssl_jax.methods.base import Method, init_network
from ssl_jax.models import linear
from ssl_jax.network import stack


@dataclass(frozen=True)
class Config:
    classes: int = 0  # 0: as many as the data has


RECIPE = {"optim.lr": 0.1, "optim.nesterov": True, "optim.weight_decay": 5e-4}


def make(config, encoder, run):
    network = stack(encoder=encoder, classifier=linear(config.classes or run.classes))

    def forward(params, target, state, batch, key):
        del target, key
        y, stats = network.apply(params, state.stats, batch["views"][0], train=True)
        return {"embedding": y["encoder"], "logits": y["classifier"]}, stats

    def loss(outputs, state, batch, ctx):
        del state, ctx
        logits, label = outputs["logits"], batch["label"]
        if label.ndim == 2:
            known, right = ~jnp.isnan(label), (logits > 0) == (label >= 0.5)
            value = binary_cross_entropy(logits, label)
        else:
            known, right = label >= 0, logits.argmax(axis=-1) == label
            value = cross_entropy(logits, label)
        return value, {"accuracy": (right & known).sum() / jnp.maximum(known.sum(), 1)}

    return Method(init_network(network), forward, loss, views=1, needs=frozenset({"label"}))
