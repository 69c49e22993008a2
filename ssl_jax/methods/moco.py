"""MoCo v1 and v2: a query finds its key among a queue of keys from a slowly moving encoder; any batch size.

Source: https://arxiv.org/abs/1911.05722 (v1), https://arxiv.org/abs/2003.04297 (v2); facebookresearch/moco. The default
is v2; v1 is `head="linear"`, `temperature=0.07` and its weaker views.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.errors import unknown
from ssl_jax.losses import info_nce
from ssl_jax.losses.common import normalize
from ssl_jax.methods.base import Method, init_with_target, stack
from ssl_jax.models import linear, mlp
from ssl_jax.transforms import track_target


@dataclass(frozen=True)
class Config:
    queue: int = 65536  # keys remembered, any number (main_moco.py, --moco-k)
    momentum: float = 0.999  # of the key encoder
    temperature: float = 0.2  # v2; v1: 0.07
    head: str = "mlp"  # v2: mlp; v1: linear
    hidden: int = 2048
    out: int = 128
    bn_groups: int = 8  # the official run's GPUs: parts of the batch with BatchNorm statistics of their own


RECIPE = {"optim.lr": 0.03, "optim.decay_all": True}  # SGD, momentum 0.9, weight decay 1e-4 on everything


def make(config, encoder, run):
    del run
    if config.head not in ("mlp", "linear"):
        raise unknown("config.method.head", config.head, ("mlp", "linear"))
    head = linear(config.out) if config.head == "linear" else mlp((config.hidden, config.out), norm=False, bias=True)
    network = stack(encoder=encoder, projector=head)

    def init(rng, views):
        rng_net, rng_queue = jax.random.split(rng)
        params, extra = init_with_target(network)(rng_net, views)
        queue = normalize(jax.random.normal(rng_queue, (config.queue, config.out)))
        return params, {**extra, "queue": queue, "oldest": jnp.zeros([], jnp.int32)}

    def forward(params, target, extra, batch, rng):
        view_query, view_key = batch["views"]
        q, stats = network.apply(params, extra["stats"], view_query, train=True, groups=config.bn_groups)
        # Query and key must not share the batch that BatchNorm sees, or its statistics give the positive away: keys
        # are shuffled into other groups than their queries' and put back in order (v1, section 3.3).
        order = jax.random.permutation(rng, len(view_key))
        k, target_stats = network.apply(target, extra["target"], view_key[order], train=True, groups=config.bn_groups)
        key = jax.lax.stop_gradient(normalize(k["projector"][jnp.argsort(order)]))
        outputs = {"embedding": q["encoder"], "query": q["projector"], "key": key}
        return outputs, {**extra, "stats": stats, "target": target_stats}

    def loss(outputs, extra, batch):
        del batch
        return info_nce(outputs["query"], outputs["key"], extra["queue"], temperature=config.temperature), {}

    def push(params, extra, outputs, step):
        """The newest keys overwrite the oldest ones, in a ring of any length."""
        del step
        keys = outputs["key"][-config.queue :]
        places = (extra["oldest"] + jnp.arange(len(keys))) % config.queue
        oldest = (extra["oldest"] + len(keys)) % config.queue
        return params, {**extra, "queue": extra["queue"].at[places].set(keys), "oldest": oldest}

    return Method(init, forward, loss, transform=track_target(config.momentum), post_update=push)
