"""Supervised baseline: cross-entropy with labels.

Source: the usual recipe of https://arxiv.org/abs/1512.03385. Images without a label (-1) do not count.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from ssl_jax.methods.base import Method, init_of, stack
from ssl_jax.models import linear


@dataclass(frozen=True)
class Config:
    classes: int = 0  # 0: as many as the data has


RECIPE = {"optim.lr": 0.1, "optim.nesterov": True, "optim.weight_decay": 5e-4}


def make(config, encoder, run):
    network = stack(encoder=encoder, classifier=linear(config.classes or run.classes))

    def forward(params, target, extra, batch, rng):
        del target, rng
        y, stats = network.apply(params, extra["stats"], batch["views"][0], train=True)
        return {"embedding": y["encoder"], "logits": y["classifier"]}, {"stats": stats}

    def loss(outputs, extra, batch):
        del extra
        logits, label = outputs["logits"], batch["label"]
        known = label >= 0
        count = jnp.maximum(known.sum(), 1)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        correct = (logits.argmax(axis=-1) == label) & known
        return jnp.where(known, each, 0).sum() / count, {"accuracy": correct.sum() / count}

    return Method(init_of(network), forward, loss, views=1, needs=frozenset({"label"}))
