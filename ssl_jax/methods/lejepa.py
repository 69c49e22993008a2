r"""LeJEPA: views of an image agree, and the projections of all images form a Gaussian cloud; no target network.

One weight to choose, and no stop-gradient, queue, teacher or predictor. A collapse costs more than it gains, because in
random directions the projections are compared with a normal distribution (SIGReg, the test of Epps and Pulley). Local
views help; the official setting has 2 whole and 6 local ones of 98 px (local.crop_scale 0.05 to 0.3).

$$(1-w)\,\mathrm{mean}\,(z_v - \bar z)^2 + w\,\mathrm{mean}_v\,\mathrm{SIGReg}(z_v)$$

Source: https://arxiv.org/abs/2511.08544; rbalestr-lab/lejepa, MINIMAL.md.

Family: without negatives.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.fields import option
from ssl_jax.losses import lejepa
from ssl_jax.methods.base import Method, init_network, require_batch, std_collapse
from ssl_jax.models import mlp
from ssl_jax.network import apply_jointly, stack


@dataclass(frozen=True)
class Config:
    weight: float = option(0.02, "weight of SIGReg; the agreement of views has the rest", min=0, max=1)  # MINIMAL.md
    directions: int = option(256, "random directions of a step", min=1)  # MINIMAL.md; README: 1024
    hidden: int = 2048  # of the projector (MINIMAL.md)
    out: int = 16  # its recommended command; 128 in its code


# README: AdamW, 5e-4, a weight decay of 5e-4 for ResNets and 5e-2 for ViTs, a linear warm-up; views of MINIMAL.md.
RECIPE = {
    "optim.name": "adamw",
    "optim.lr": 5e-4,
    "optim.weight_decay": 5e-4,
    "optim.warmup": "0.1 epochs",
}
TINY = {"augment.local_views": 1, "augment.local.size": 4}  # for the contract test


def make(config, encoder, run):
    del run
    projector = mlp((config.hidden, config.hidden, config.out), bias=True)
    network = stack(encoder=encoder, projector=projector)

    def forward(params, target, state, batch, key):
        del target, key
        require_batch(batch["views"], "lejepa")
        y, encoder_stats = apply_jointly(encoder, params["encoder"], state.stats["encoder"], batch["views"])
        # The projector sees the views of all sizes at once.
        z, projector_stats = apply_jointly(projector, params["projector"], state.stats["projector"], y)
        return {"embedding": y[0], "z": z}, {"encoder": encoder_stats, "projector": projector_stats}

    def loss(outputs, state, batch, ctx):
        del state, batch
        z = jnp.stack(outputs["z"])
        directions = jax.random.normal(ctx.key, (config.directions, z.shape[-1]), z.dtype)
        value, terms = lejepa(z, directions, weight=config.weight)
        return value, {**terms, "projection_std": z[0].std(axis=0).mean()}

    collapsed = std_collapse("config.method.weight too small")
    return Method(init_network(network), forward, loss, local_views=True, collapsed=collapsed)
