r"""MoCo v1 and v2: a query finds its key among a queue of keys from a slowly moving encoder; any batch size.

The queue holds the keys of earlier batches, so the number of negatives does not depend on the batch: a method for small
devices. The batch is cut into groups with BatchNorm statistics of their own, and keys are shuffled between the groups.
Otherwise query and key could recognise each other by their statistics. The default is v2; v1 is `head="linear"`,
`temperature=0.07` and its weaker views.

$$-\log \frac{e^{q k_+/T}}{e^{q k_+/T}+\sum_{k\in \mathrm{queue}} e^{q k/T}}$$

Source: https://arxiv.org/abs/1911.05722 (v1), https://arxiv.org/abs/2003.04297 (v2); facebookresearch/moco.

Family: contrastive.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from ssl_jax.losses import info_nce, normalize, similarities
from ssl_jax.methods.base import (
    METRIC_ROWS,
    Method,
    chance_collapse,
    enqueue,
    init_queue,
    init_with_target,
    require_shuffle,
    search_metrics,
)
from ssl_jax.models import linear, mlp
from ssl_jax.network import shuffle_bn, stack
from ssl_jax.transforms import track_target


@dataclass(frozen=True)
class Config:
    queue: int = 65536  # keys remembered, any number (main_moco.py, --moco-k)
    momentum: float = 0.999  # of the key encoder
    temperature: float = 0.2  # v2; v1: 0.07
    head: Literal["mlp", "linear"] = "mlp"  # v2: mlp; v1: linear
    hidden: int = 2048
    out: int = 128
    bn_groups: int = 8  # the official run's GPUs: parts of the batch with BatchNorm statistics of their own


RECIPE = {"optim.lr": 0.03, "optim.decay_all": True}  # SGD, momentum 0.9, weight decay 1e-4 on everything


def make(config, encoder, run):
    require_shuffle(config.bn_groups, run, encoder)
    head = linear(config.out) if config.head == "linear" else mlp((config.hidden, config.out), norm=False, bias=True)
    network = stack(encoder=encoder, projector=head)

    def init(key, views):
        key_net, key_queue = jax.random.split(key)
        params, state = init_with_target(network)(key_net, views)
        return params, state._replace(memory=init_queue(key_queue, config.queue, config.out))

    def forward(params, target, state, batch, key):
        view_query, view_key = batch["views"]
        groups = config.bn_groups
        q, stats = network.apply(params, state.stats, view_query, train=True, groups=groups)
        k, target_stats = shuffle_bn(network, target, state.stats["target"], view_key, key[0], groups)
        key = jax.lax.stop_gradient(normalize(k["projector"]))
        outputs = {"embedding": q["encoder"], "query": q["projector"], "key": key}
        return outputs, {**stats, "target": target_stats}

    def loss(outputs, state, batch, ctx):
        del batch, ctx
        query, key, queue = outputs["query"], outputs["key"], state.memory["queue"]
        value = info_nce(query, key, queue, temperature=config.temperature)
        return value, search_metrics(value, similarities(query[METRIC_ROWS], key[METRIC_ROWS], queue))

    def push_keys(outputs, state, ctx):
        return ctx.params, enqueue(state.memory, outputs["key"])

    target = track_target(config.momentum)
    return Method(init, forward, loss, transform=target, post_update=push_keys, collapsed=chance_collapse)
