"""SimCLR: two views of an image find each other among all other views of the batch.

Source: https://arxiv.org/abs/2002.05709; google-research/simclr. Wants large batches.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from ssl_jax.losses import nt_xent
from ssl_jax.methods.base import Method, encoder_of, keep, stack
from ssl_jax.models import mlp


@dataclass(frozen=True)
class Config:
    temperature: float = 0.2  # 0.1 at batch 4096, 0.5 for CIFAR-10 (appendix B.9); 0.2 suits batches of a few hundred
    hidden: int = 2048  # of the projector
    out: int = 128  # section 2.1


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.3,
    "optim.weight_decay": 1e-6,
    "optim.warmup": "0.1 epochs",
}  # section 2.2


def make(config, encoder, steps):
    del steps
    network = stack(encoder=encoder, projector=mlp((config.hidden, config.out)))

    def init(rng, views):
        params, stats = network.init(rng, views[0])
        return params, {"stats": stats}

    def forward(params, target, extra, batch, rng):
        del target, rng
        # One pass over both views: with statistics of its own, each view could be told by them.
        images = jnp.concatenate(batch["views"])
        y, stats = network.apply(params, extra["stats"], images, train=True)
        z_a, z_b = jnp.split(y["projector"], 2)
        outputs = {"embedding": jnp.split(y["encoder"], 2)[0], "z_a": z_a, "z_b": z_b}
        return outputs, {"stats": stats}

    def loss(outputs, extra, batch):
        del extra, batch
        return nt_xent(outputs["z_a"], outputs["z_b"], temperature=config.temperature), {}

    return Method(2, frozenset(), init, forward, loss, optax.identity(), keep, encoder_of)
