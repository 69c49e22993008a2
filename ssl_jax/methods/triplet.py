"""Triplet: a view lies nearer to the other view of its image than to another image, by a margin.

Source: FaceNet, https://arxiv.org/abs/1503.03832. Self-supervised: the positive is the second view, the negative
another image of the batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.losses import triplet
from ssl_jax.losses.common import normalize
from ssl_jax.methods.base import Method, init_of, stack, together
from ssl_jax.models import mlp


@dataclass(frozen=True)
class Config:
    margin: float = 1.0  # of distances that reach from 0 to 2 between normalised projections
    hidden: int = 512
    out: int = 128  # FaceNet, section 3.1
    normalize: bool = True  # onto the sphere, as in FaceNet; without it the distances can collapse


RECIPE = {"optim.lr": 0.06}


def make(config, encoder, run):
    del run
    network = stack(encoder=encoder, projector=mlp((config.hidden, config.out)))

    def forward(params, target, extra, batch, rng):
        del target
        (a, b), stats = together(network, params, extra["stats"], batch["views"])
        anchor, positive = a["projector"], b["projector"]
        if config.normalize:
            anchor, positive = normalize(anchor), normalize(positive)
        n = len(anchor)
        if n < 2:
            raise UserError("config.train.batch=1: triplet takes its negative from the batch; allowed: 2 or more")
        outputs = {
            "embedding": a["encoder"],
            "anchor": anchor,
            "positive": positive,
            "shift": jax.random.randint(rng, (), 1, n),  # to another image, never to itself
        }
        return outputs, {"stats": stats}

    def loss(outputs, extra, batch):
        del extra, batch
        negative = jnp.roll(outputs["positive"], outputs["shift"], axis=0)
        return triplet(outputs["anchor"], outputs["positive"], negative, margin=config.margin), {}

    return Method(init_of(network), forward, loss)
