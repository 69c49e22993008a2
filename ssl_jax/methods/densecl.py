r"""DenseCL: MoCo for whole images and for each place of their feature maps, which is matched with the most alike place.

For detection and segmentation. A place of the one view is the positive of that place of the other view whose feature
of the encoder it is most similar to; positions are not needed. Negatives are the means of other images' places. As
`moco`, it has a queue, works with any batch and hides its positives from BatchNorm.

$$(1-w)\,\mathrm{InfoNCE}(q, k_+) + w\,\mathrm{mean}_p\,\mathrm{InfoNCE}(q_p, k_{m(p)})$$

Source: https://arxiv.org/abs/2011.09157; WXinlong/DenseCL, openselfsup/models/densecl.py.

Family: contrastive.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.fields import option
from ssl_jax.losses import info_nce, normalize, similarities
from ssl_jax.methods.base import (
    METRIC_ROWS,
    Method,
    State,
    chance_collapse,
    enqueue,
    init_queue,
    require_shuffle,
    search_metrics,
)
from ssl_jax.models import mlp
from ssl_jax.network import Network, dense_shapes, shuffle_bn
from ssl_jax.transforms import track_target


@dataclass(frozen=True)
class Config:
    queue: int = 65536  # keys remembered, any number (configs/selfsup/densecl, as everything below)
    momentum: float = 0.999  # of the key encoder
    temperature: float = 0.2  # of images and of places
    dense_weight: float = option(0.5, "weight of the places; the whole images have the rest", min=0, max=1)
    dense_start: float = option(0.0, "share of the run without the places", min=0, max=1)  # a hook has 1000 steps
    hidden: int = 2048  # of both projectors
    out: int = 128
    bn_groups: int = 8  # 8 GPUs: parts of the batch with BatchNorm statistics of their own


RECIPE = {"optim.lr": 0.03, "optim.decay_all": True}  # densecl_imagenet_200ep.py; COCO: 0.3


def make(config, encoder, run):
    require_shuffle(config.bn_groups, run, encoder)
    head = mlp((config.hidden, config.out), norm=False, bias=True)

    def init(key, views):
        keys = jax.random.split(key, 5)
        params, stats = encoder.init(keys[0], views[0])
        one = jnp.zeros(dense_shapes(encoder, params, stats, views[0][:1])[0].shape)
        heads = {name: head.init(k, one)[0] for name, k in zip(("projector", "places"), keys[1:3])}
        memory = {
            **init_queue(keys[3], config.queue, config.out),
            **{f"dense_{name}": x for name, x in init_queue(keys[4], config.queue, config.out).items()},
        }
        target = {"encoder": jax.tree.map(jnp.copy, stats)}
        return {"encoder": params, **heads}, State({"encoder": stats, "target": target}, memory)

    def apply(params, stats, x, *, train, groups=1):
        (y, maps), stats = encoder.apply(params["encoder"], stats, x, train=train, groups=groups, dense=True)
        maps = maps.reshape(len(y), -1, maps.shape[-1])
        whole, places = (
            head.apply(params[name], {}, v, train=train)[0] for name, v in (("projector", y), ("places", maps))
        )
        features = normalize(jax.lax.stop_gradient(maps))
        return {"embedding": y, "whole": whole, "places": places, "features": features}, stats

    network = Network(init, apply)

    def forward(params, target, state, batch, key):
        view_query, view_key = batch["views"]
        groups = config.bn_groups
        q, stats = network.apply(params, state.stats["encoder"], view_query, train=True, groups=groups)
        k, target_stats = shuffle_bn(network, target, state.stats["target"]["encoder"], view_key, key[0], groups)
        k = jax.lax.stop_gradient(k)
        match = jnp.argmax(jnp.einsum("bpd,bqd->bpq", q["features"], k["features"]), axis=2)
        outputs = {
            "embedding": q["embedding"],
            "query": q["whole"],
            "key": normalize(k["whole"]),
            "places": q["places"],
            "matches": jnp.take_along_axis(normalize(k["places"]), match[..., None], axis=1),
            "mean_place": normalize(k["places"].mean(axis=1)),
        }
        return outputs, {"encoder": stats, "target": {"encoder": target_stats}}

    def loss(outputs, state, batch, ctx):
        del batch
        query, key, queue = outputs["query"], outputs["key"], state.memory["queue"]
        whole = info_nce(query, key, queue, temperature=config.temperature)
        ours, theirs = (outputs[name].reshape(-1, config.out) for name in ("places", "matches"))
        places = info_nce(ours, theirs, state.memory["dense_queue"], temperature=config.temperature)
        weight = jnp.where(ctx.step < config.dense_start * run.steps, 0, config.dense_weight)
        metrics = search_metrics(whole, similarities(query[METRIC_ROWS], key[METRIC_ROWS], queue))
        return (1 - weight) * whole + weight * places, {**metrics, "dense_loss": places}

    def push_keys(outputs, state, ctx):
        memory = state.memory
        dense = {name: memory[f"dense_{name}"] for name in ("queue", "oldest")}
        dense = {f"dense_{name}": x for name, x in enqueue(dense, outputs["mean_place"]).items()}
        return ctx.params, {**enqueue(memory, outputs["key"]), **dense}

    target = track_target(config.momentum)
    return Method(init, forward, loss, transform=target, post_update=push_keys, collapsed=chance_collapse)
