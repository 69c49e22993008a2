r"""SwAV: each view predicts the cluster of another view of the image; clusters are balanced over the batch.

Sinkhorn's iteration spreads the batch evenly over the prototypes, so that not all images end in one. Local views make
it strong at little cost. In the paper: two views of 224 px (crop_scale 0.14 to 1) and config.augment.local_views=6 of
96 px (local.crop_scale 0.05 to 0.14).

$$-\sum_k Q(z_1)_k \log \mathrm{softmax}(z_2 C/T)_k$$

Source: https://arxiv.org/abs/2006.09882; facebookresearch/swav.

Family: clustering and distillation.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.losses import normalize, sinkhorn, swav
from ssl_jax.methods.base import Method, entropies, entropy_collapse, init_network
from ssl_jax.models import mlp
from ssl_jax.network import apply_jointly, stack


@dataclass(frozen=True)
class Config:
    prototypes: int = 3000  # main_swav.py, as everything below
    temperature: float = 0.1  # of the prediction
    epsilon: float = 0.05  # of the assignment, lower is sharper
    sinkhorn_iterations: int = 3  # 0: clusters are not balanced, and all images end in one
    freeze_steps: int = 313  # the prototypes stay in these first steps; 5005 at batch 256
    queue: int = 3840  # features of earlier images in the assignment, for small batches; 0: none, as at batch 4096
    queue_start: float = 0.075  # share of the run after which it fills, to be used once it is full: 15 of 200 epochs
    hidden: int = 2048  # of the projector
    out: int = 128


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.6,
    "optim.weight_decay": 1e-6,
    "optim.warmup": "0.1 epochs",
}  # scripts/swav_200ep_bs256_pretrain.sh; 4.8 at batch 4096 is half as much
TINY = {"augment.local_views": 2, "augment.local.size": 4}  # for the contract test


def make(config, encoder, run):
    first = round(config.queue_start * run.steps)  # step whose features are the first in the queue
    projector = mlp((config.hidden, config.out))
    network = stack(encoder=encoder, projector=projector)

    def init(key, views):
        key_net, key_prototypes = jax.random.split(key)
        params, state = init_network(network)(key_net, views)
        params["prototypes"] = normalize(jax.random.normal(key_prototypes, (config.prototypes, config.out)))
        # Without a queue nothing is remembered: an array without elements could not be saved.
        return params, state._replace(
            memory={"queue": jnp.zeros((2, config.queue, config.out))} if config.queue else {}
        )

    def forward(params, target, state, batch, key):
        del target, key
        y, encoder_stats = apply_jointly(encoder, params["encoder"], state.stats["encoder"], batch["views"])
        # The projector sees the views of all sizes at once, as the official one does.
        z, projector_stats = apply_jointly(projector, params["projector"], state.stats["projector"], y)
        outputs = {"embedding": y[0], "z": [normalize(view) for view in z]}
        return outputs, {"encoder": encoder_stats, "projector": projector_stats}

    def assign(scores, remembered):
        """Assignments of the batch, which shares the clusters with the images remembered."""
        options = {"epsilon": config.epsilon, "iterations": config.sinkhorn_iterations}
        return sinkhorn(jnp.concatenate([remembered, scores]), **options)[len(remembered) :]

    def loss(outputs, state, batch, ctx):
        del batch
        prototypes = ctx.params["prototypes"]
        scores = [z @ prototypes.T for z in outputs["z"]]
        targets = jax.lax.stop_gradient(scores[:2])
        if config.queue:
            remembered = jax.lax.stop_gradient(state.memory["queue"] @ prototypes.T)
            full = (ctx.step - first) * len(targets[0]) >= config.queue
            q = [jax.lax.cond(full, assign, lambda s, r: assign(s, r[:0]), *pair) for pair in zip(targets, remembered)]
        else:
            q = [assign(s, s[:0]) for s in targets]
        return swav(scores, q, temperature=config.temperature), entropies(q)

    def after(outputs, state, ctx):
        """Prototypes are unit vectors again; the newest features come first in the queue, the oldest leave it."""
        params = {**ctx.params, "prototypes": normalize(ctx.params["prototypes"])}
        if not config.queue:
            return params, state.memory
        queue = state.memory["queue"]
        filled = jnp.concatenate([jnp.stack(outputs["z"][:2]), queue], axis=1)[:, : config.queue]
        return params, {"queue": jnp.where(ctx.step >= first, filled, queue)}

    return Method(
        init,
        forward,
        loss,
        local_views=True,
        frozen={"prototypes": config.freeze_steps},
        post_update=after,
        collapsed=entropy_collapse(
            config.prototypes,
            uniform="epsilon too high, or a learning rate too high: all images have the same projection",
            single="sinkhorn_iterations too low",
        ),
    )
