r"""MSN: a masked view and small views are assigned to the prototypes of the whole other view; all prototypes are used.

Made for few labels: with a handful per class it beats methods that win with many. The first view is whole, the second
loses patches at random, local views (`config.augment.local_views`, in the paper 10 of 96 px) are small. The mean
prediction is pushed towards all prototypes alike, which is good where classes are about equally frequent. Needs a ViT;
its class token is what is trained. The moving average is what is exported.

$$-\sum_k q_k \log p_k - w\,H(\bar p),\quad p = \mathrm{softmax}(\cos(z, c)/T)$$

Source: https://arxiv.org/abs/2204.07141; facebookresearch/msn, src/msn_train.py.

Family: clustering and distillation.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from ssl_jax.fields import option
from ssl_jax.losses import msn, msn_targets, normalize
from ssl_jax.methods.base import (
    Method,
    entropies,
    entropy_collapse,
    init_with_target,
    require_batch,
    require_vit,
    select_entries,
    target_encoder,
)
from ssl_jax.models import mlp
from ssl_jax.network import apply_jointly, stack
from ssl_jax.transforms import track_target


@dataclass(frozen=True)
class Config:
    prototypes: int = 1024  # configs/pretrain/msn_vits16.yaml, as everything below
    temperature: float = 0.1  # of the masked views
    sharpen: float = 0.25  # the target's temperature / temperature
    mean_weight: float = option(1.0, "weight of the mean prediction's entropy", min=0)
    sinkhorn_iterations: int = option(3, "that balance the targets; 0: none", min=0)
    drop: float = option(0.15, "share of the second view's patches that is dropped", min=0, below=1)
    momentum: float = 0.996  # of the target, rises to 1 in a straight line
    hidden: int = 2048  # of the projector
    out: int = 256


# Official: 1e-3 at batch 1024, 15 of 800 epochs of warm-up.
RECIPE = {
    "model.name": "vit_tiny",
    "augment.crop_scale": (0.3, 1.0),  # src/data_manager.py
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.lr_batch": 1024,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.warmup": "0.1 epochs",
    "optim.clip_norm": 3.0,
}
# For the contract test. Lower temperatures enlarge the rounding of a sum over devices beyond what it allows.
TINY = {"augment.local_views": 1, "augment.local.size": 4, "method.temperature": 1.0}


def make(config, encoder, run):
    patch = require_vit(encoder, "msn")
    projector = mlp((config.hidden, config.hidden, config.out), gelu=True)
    network = stack(encoder=encoder, projector=projector)

    def init(key, views):
        key_net, key_prototypes = jax.random.split(key)
        params, state = init_with_target(network)(key_net, views)
        bound = config.out**-0.5
        shape = (config.prototypes, config.out)
        params["prototypes"] = jax.random.uniform(key_prototypes, shape, minval=-bound, maxval=bound)
        return params, state

    def see(params, stats, images, visible):
        """Class tokens of the visible patches."""
        tokens, stats = encoder.apply(params["encoder"], stats["encoder"], images, train=True, visible=visible)
        return tokens[:, 0], stats

    def forward(params, target, state, batch, key):
        views = batch["views"]
        require_batch(views, "msn")
        count = (views[0].shape[1] // patch) ** 2
        kept = max(1, int(count * (1 - config.drop)))
        order = jax.vmap(lambda k: jax.random.permutation(k, count))(key)
        whole, target_stats = see(target, state.stats["target"], views[0], order)
        y, encoder_stats = see(params, state.stats, views[1], order[:, :kept])
        anchors = [y]
        if len(views) > 2:
            side = views[2].shape[1] // patch
            everything = jnp.broadcast_to(jnp.arange(side * side), (len(y), side * side))

            def small(params, stats, x, *, train):
                del train
                count = len(x) // len(y)
                tokens, stats = see({"encoder": params}, {"encoder": stats}, x, jnp.repeat(everything, count, axis=0))
                return tokens, stats

            local, encoder_stats = apply_jointly(
                encoder._replace(apply=small), params["encoder"], encoder_stats, views[2:]
            )
            anchors += local
        z, projector_stats = apply_jointly(projector, params["projector"], state.stats["projector"], anchors)
        target_z, target_projector = projector.apply(
            target["projector"], state.stats["target"]["projector"], whole, train=True
        )
        outputs = {"embedding": whole, "z": z, "target": target_z}
        after = {"encoder": target_stats, "projector": target_projector}
        return outputs, {"encoder": encoder_stats, "projector": projector_stats, "target": after}

    def loss(outputs, state, batch, ctx):
        del state, batch
        prototypes = normalize(ctx.params["prototypes"])
        scores = [normalize(z) @ prototypes.T / config.temperature for z in outputs["z"]]
        target = jax.lax.stop_gradient(normalize(outputs["target"]) @ prototypes.T / config.temperature)
        q = msn_targets(target, sharpen=config.sharpen, iterations=config.sinkhorn_iterations)
        value, terms = msn(scores, q, weight=config.mean_weight)
        return value, {**terms, **entropies([q])}

    return Method(
        init,
        forward,
        loss,
        local_views=True,
        transform=track_target(
            optax.linear_schedule(config.momentum, 1.0, run.steps), select_entries("encoder", "projector")
        ),
        encoder=target_encoder,
        collapsed=entropy_collapse(
            config.prototypes,
            uniform="sharpen too high, or a learning rate too high",
            single="sinkhorn_iterations or mean_weight too low",
        ),
    )
