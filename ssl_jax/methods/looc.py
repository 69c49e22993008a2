r"""LooC: one space in which all views of an image are the same, and for each chosen factor one that feels this factor.

MoCo with a head and a queue for every space. One space ignores all transforms. Each further space stays sensitive to
one factor (colour, rotation, ...): there the query finds the key that shares the factor with it, and the other keys of
the same image are negatives. The encoder below the heads serves all spaces. Made for images whose colour or direction
matters. The transforms must draw every factor (config.augment), or none can be felt.

$$\sum_i -\log\frac{e^{q^i k^i_i/T}}{e^{q^i k^i_i/T}+\sum_{j\ne i}e^{q^i k^i_j/T}+\sum_{\mathrm{queue}_i} e^{q^i k/T}}$$

Source: https://arxiv.org/abs/2008.05659; ServiceNow/seasonal-contrast, models/moco2_module.py, which adds the losses of
the spaces where we take their mean.

Family: contrastive.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.augment import FACTORS
from ssl_jax.errors import UserError, unknown
from ssl_jax.losses import info_nce, similarities
from ssl_jax.losses.common import normalize
from ssl_jax.methods.base import (
    METRIC_ROWS,
    Method,
    chance_collapse,
    enqueue,
    init_queue,
    init_with_target,
    search_metrics,
)
from ssl_jax.models import mlp
from ssl_jax.network import Network, shuffle_bn, stack
from ssl_jax.transforms import track_target


@dataclass(frozen=True)
class Config:
    factors: tuple[str, ...] = ("colour", "rotate")  # to stay sensitive to, names in ssl_jax.augment.FACTORS
    queue: int = 16384  # keys remembered in each space (moco2_module.py, as everything below but the temperature)
    momentum: float = 0.999  # of the key encoder
    temperature: float = 0.2  # MoCo v2's; moco2_module.py: 0.07
    hidden: int = 2048  # of each head; there as wide as the embedding
    out: int = 128
    bn_groups: int = 8  # as in MoCo


# SGD, 0.03 at batch 256, weight decay 1e-4 on everything. The paper rotates by quarter turns, here by any angle.
RECIPE = {"optim.lr": 0.03, "optim.decay_all": True, "augment.rotate": 180.0}


def make(config, encoder, run):
    del run
    for factor in config.factors:
        if factor not in FACTORS:
            raise unknown("config.method.factors", factor, FACTORS)
    if not config.factors or len(set(config.factors)) < len(config.factors):
        allowed = f"one or more, each once, of {', '.join(FACTORS)}"
        raise UserError(f"config.method.factors={config.factors!r}: allowed: {allowed}")
    spaces = 1 + len(config.factors)  # space 0 feels nothing; space i feels factor i and finds key i
    network = stack(encoder=encoder, heads=heads(mlp((config.hidden, config.out), norm=False, bias=True), spaces))

    def init(rng, views):
        rng_net, rng_queue = jax.random.split(rng)
        params, extra = init_with_target(network)(rng_net, views)
        return params, {**extra, **init_queue(rng_queue, config.queue, spaces, config.out)}

    def forward(params, target, extra, batch, rng):
        groups, target_stats, keys = config.bn_groups, extra["target"], []
        view_query, *view_keys = batch["views"]
        q, stats = network.apply(params, extra["stats"], view_query, train=True, groups=groups)
        for view, key in zip(view_keys, jax.random.split(rng[0], spaces), strict=True):
            k, target_stats = shuffle_bn(network, target, target_stats, view, key, groups)
            keys.append(jax.lax.stop_gradient(normalize(k["heads"])))
        # query [B, spaces, D], keys [B, keys, spaces, D]
        outputs = {"embedding": q["encoder"], "query": q["heads"], "keys": jnp.stack(keys, axis=1)}
        return outputs, {**extra, "stats": stats, "target": target_stats}

    def loss(outputs, extra, batch):
        del batch
        query, keys, queue = outputs["query"], outputs["keys"], extra["queue"]
        values = {}
        for i, space in enumerate(("all", *config.factors)):
            # Where no factor is felt, the other keys of the image are no negatives: they belong to it, too.
            others = jnp.delete(keys[:, :, i], i, axis=1) if i else None
            found = query[:, i], keys[:, i, i], queue[:, i], others
            values[f"loss_{space}"] = info_nce(*found, temperature=config.temperature)
        metrics = search_metrics(
            values["loss_all"], similarities(query[METRIC_ROWS, 0], keys[METRIC_ROWS, 0, 0], queue[:, 0])
        )
        return jnp.stack(list(values.values())).mean(), metrics | values

    def push_keys(params, extra, outputs, step):
        del step
        each = jnp.arange(spaces)
        return params, enqueue(extra, outputs["keys"][:, each, each])  # into the queue of a space the keys found in it

    return Method(
        init,
        forward,
        loss,
        views=1 + spaces,
        shares=((), (), *((factor,) for factor in config.factors)),
        transform=track_target(config.momentum),
        post_update=push_keys,
        collapsed=chance_collapse,
    )


def heads(head: Network, count: int) -> Network:
    """`count` heads without statistics side by side: [B, D] -> [B, count, D']."""

    def init(rng, x):
        return [head.init(key, x)[0] for key in jax.random.split(rng, count)], {}

    def apply(params, stats, x, **kwargs):
        return jnp.stack([head.apply(p, {}, x, **kwargs)[0] for p in params], axis=1), stats

    return Network(init, apply)
