r"""Triplet: a view lies nearer to views of its image, or of its class, than to others, by a margin.

Self-supervised by default: the positive is the second view, the negative another image of the batch. With `mining` set
to `all`, `hard` or `semi_hard`, labels decide: all views of a class in the batch are pairs, and images without a label
(-1) do not count. Each class should then have several images in a batch; the metric "anchors" counts the images that
find both another image of their class and one of another class. One negative at a time makes it weaker than its
successors; it is kept as the reference of the chest X-ray study. Without normalisation, hard mining can shrink all
distances to 0: the loss then stays at the margin.

$$\max(0,\ \|a-p\| - \|a-n\| + m)$$

Source: FaceNet, https://arxiv.org/abs/1503.03832.

Family: with labels.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.fields import option
from ssl_jax.losses import interleave, mined_triplet, normalize, triplet
from ssl_jax.methods.base import Method, init_network, one_label
from ssl_jax.models import mlp
from ssl_jax.network import apply_jointly, stack


@dataclass(frozen=True)
class Config:
    margin: float = 1.0  # of distances that reach from 0 to 2 between normalised projections
    # FaceNet, section 3.2
    mining: Literal["none", "all", "hard", "semi_hard"] = option(
        "none", "which triplets labels choose; none: no labels"
    )
    hidden: int = 512
    out: int = 128  # FaceNet, section 3.1
    normalize: bool = True  # onto the sphere, as in FaceNet; without it the distances can collapse


RECIPE = {"optim.lr": 0.06}


def make(config, encoder, run):
    del run
    mined = config.mining != "none"
    network = stack(encoder=encoder, projector=mlp((config.hidden, config.out)))

    def forward(params, target, state, batch, key):
        del target, key
        (a, b), stats = apply_jointly(network, params, state.stats, batch["views"])
        anchor, positive = a["projector"], b["projector"]
        if config.normalize:
            anchor, positive = normalize(anchor), normalize(positive)
        if len(anchor) < 2:
            raise UserError("config.train.batch=1: triplet takes its negative from the batch; allowed: 2 or more")
        return {"embedding": a["encoder"], "anchor": anchor, "positive": positive}, stats

    def loss(outputs, state, batch, ctx):
        del state
        anchor, positive = outputs["anchor"], outputs["positive"]
        shift = jax.random.randint(ctx.key, (), 1, len(positive))  # to another image, never to itself
        negative = jnp.roll(positive, shift, axis=0)
        metrics = {"distance": jnp.linalg.norm(jax.lax.stop_gradient(anchor - negative), axis=1).mean()}
        if not mined:
            return triplet(anchor, positive, negative, margin=config.margin), metrics
        z, label = interleave([anchor, positive]), one_label(batch)
        known = label >= 0
        same = (label[:, None] == label) & known
        metrics["anchors"] = ((same.sum(axis=1) > 1) & (~same & known).any(axis=1) & known).sum()
        return mined_triplet(z, interleave([label, label]), margin=config.margin, mining=config.mining), metrics

    def collapsed(metrics):
        if metrics["distance"] < 0.05 * config.margin:
            cause = "hard mining, normalize=False or a learning rate too high"
            return f"distance {metrics['distance']:.2g} between different images, against the margin; likely {cause}"
        if not metrics.get("anchors", 1):
            cause = "a batch too small for the number of classes, or too few labels"
            return f"no image of the batch has both another of its class and one of another class; likely {cause}"
        return ""

    needs = frozenset({"label"} if mined else ())
    return Method(init_network(network), forward, loss, needs=needs, collapsed=collapsed)
