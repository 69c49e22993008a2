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
from ssl_jax.errors import UserError
from ssl_jax.fields import option
from ssl_jax.losses import info_nce, normalize, similarities
from ssl_jax.methods.base import (
    METRIC_ROWS,
    Method,
    chance_collapse,
    enqueue,
    init_queue,
    init_with_target,
    refuse_randaugment,
    require_shuffle,
    search_metrics,
)
from ssl_jax.models import mlp
from ssl_jax.network import Network, shuffle_bn, stack
from ssl_jax.transforms import track_target


@dataclass(frozen=True)
class Config:
    factors: tuple[str, ...] = option(("colour", "rotate"), "factors to stay sensitive to", choices=FACTORS)
    queue: int = 16384  # keys remembered in each space (moco2_module.py, as everything below but the temperature)
    momentum: float = 0.999  # of the key encoder
    temperature: float = 0.2  # MoCo v2's; moco2_module.py: 0.07
    hidden: int = 2048  # of each head; there as wide as the embedding
    out: int = 128
    bn_groups: int = 8  # as in MoCo


# SGD, 0.03 at batch 256, weight decay 1e-4 on everything. The paper rotates by quarter turns, here by any angle.
RECIPE = {"optim.lr": 0.03, "optim.decay_all": True, "augment.rotate": 180.0}


def make(config, encoder, run):
    require_shuffle(config.bn_groups, run, encoder)
    if not config.factors or len(set(config.factors)) < len(config.factors):
        allowed = f"one or more, each once, of {', '.join(FACTORS)}"
        raise UserError(f"config.method.factors={config.factors!r}: allowed: {allowed}")
    spaces = 1 + len(config.factors)  # space 0 feels nothing; space i feels factor i and finds key i
    network = stack(encoder=encoder, heads=heads(mlp((config.hidden, config.out), norm=False, bias=True), spaces))

    def init(key, views):
        key_net, key_queue = jax.random.split(key)
        params, state = init_with_target(network)(key_net, views)
        return params, state._replace(memory=init_queue(key_queue, config.queue, spaces, config.out))

    def forward(params, target, state, batch, key):
        refuse_randaugment(batch.get("drawn", ()), "looc")
        groups, target_stats, keys = config.bn_groups, state.stats["target"], []
        view_query, *view_keys = batch["views"]
        q, stats = network.apply(params, state.stats, view_query, train=True, groups=groups)
        for view, key_order in zip(view_keys, jax.random.split(key[0], spaces), strict=True):
            k, target_stats = shuffle_bn(network, target, target_stats, view, key_order, groups)
            keys.append(jax.lax.stop_gradient(normalize(k["heads"])))
        # query [B, spaces, D], keys [B, keys, spaces, D]
        outputs = {"embedding": q["encoder"], "query": q["heads"], "keys": jnp.stack(keys, axis=1)}
        return outputs, {**stats, "target": target_stats}

    def loss(outputs, state, batch, ctx):
        del batch, ctx
        query, keys, queue = outputs["query"], outputs["keys"], state.memory["queue"]
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

    def push_keys(outputs, state, ctx):
        each = jnp.arange(spaces)
        # Into the queue of each space go the keys that are positives there.
        return ctx.params, enqueue(state.memory, outputs["keys"][:, each, each])

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

    def init(key, x):
        return [head.init(k, x)[0] for k in jax.random.split(key, count)], {}

    def apply(params, stats, x, **kwargs):
        return jnp.stack([head.apply(p, {}, x, **kwargs)[0] for p in params], axis=1), stats

    return Network(init, apply)
