r"""TiCo: a view meets the target's projection of the other, away from where projections have been lately.

The directions in which projections pointed lately are kept as their covariance: D x D numbers in place of a queue.

$$1 - z_1 z'_2 + \rho\, z_1^\top M z_1$$

Source: https://arxiv.org/abs/2206.10698; lightly, loss/tico_loss.py and its ImageNet benchmark.

Family: without negatives.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from ssl_jax.collapse import embedding_std
from ssl_jax.losses import tico, tico_covariance
from ssl_jax.methods.base import Method, init_with_target, std_collapse
from ssl_jax.models import mlp
from ssl_jax.network import stack
from ssl_jax.transforms import cosine_momentum, track_target


@dataclass(frozen=True)
class Config:
    beta: float = 0.9  # momentum of the covariance (tico_loss.py)
    rho: float = 8.0  # weight of its term (tico_loss.py); 0 collapses
    momentum: float = 0.99  # of the target, rises to 1 (benchmark)
    hidden: int = 4096  # of the projector (lightly, TiCoProjectionHead)
    out: int = 256


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.2,
    "optim.weight_decay": 1.5e-6,
    "optim.warmup": "0.1 epochs",
}  # benchmark, 100 epochs
TINY = {"optim.lr": 0.005}  # for the contract test: rounding grows with the loss, which counts several times


def make(config, encoder, run):
    network = stack(encoder=encoder, projector=mlp((config.hidden, config.out)))

    def init(key, views):
        params, state = init_with_target(network)(key, views)
        return params, state._replace(memory={"covariance": jnp.zeros((config.out, config.out))})

    def forward(params, target, state, batch, key):
        del key
        view, other = batch["views"]
        y, stats = network.apply(params, state.stats, view, train=True)
        t, target_stats = network.apply(target, state.stats["target"], other, train=True)
        outputs = {"embedding": y["encoder"], "z": y["projector"], "target": t["projector"]}
        return outputs, {**stats, "target": target_stats}

    def loss(outputs, state, batch, ctx):
        del batch, ctx
        z = outputs["z"]
        value = tico(z, outputs["target"], state.memory["covariance"], beta=config.beta, rho=config.rho)
        return value, {"projection_std": embedding_std(z)}

    def remember(outputs, state, ctx):
        covariance = tico_covariance(outputs["z"], state.memory["covariance"], beta=config.beta)
        return ctx.params, {"covariance": covariance}

    transform = track_target(cosine_momentum(config.momentum, run.steps))
    collapsed = std_collapse("config.method.rho too small")
    return Method(init, forward, loss, transform=transform, post_update=remember, collapsed=collapsed)
