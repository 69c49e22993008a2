"""BYOL: an online network predicts the target network's projection of the other view; no negatives.

Source: https://arxiv.org/abs/2006.07733; google-deepmind/deepmind-research, byol.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.losses import negative_cosine
from ssl_jax.methods.base import Method, encoder_of, keep, stack
from ssl_jax.models import mlp
from ssl_jax.transforms import cosine_momentum, track_target


@dataclass(frozen=True)
class Config:
    momentum: float = 0.99  # of the target, rises to 1; configs/byol.py: 0.97 at 40 epochs to 0.996 at 1000
    hidden: int = 4096  # section 3.3, for projector and predictor
    out: int = 256


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.45,
    "optim.weight_decay": 1e-6,
    "optim.warmup": "0.1 epochs",
}  # 100 epochs


def make(config, encoder, steps):
    target = stack(encoder=encoder, projector=mlp((config.hidden, config.out)))
    online = stack(
        encoder=encoder, projector=mlp((config.hidden, config.out)), predictor=mlp((config.hidden, config.out))
    )

    def targeted(tree):
        return {"encoder": tree["encoder"], "projector": tree["projector"]}

    def init(rng, views):
        params, stats = online.init(rng, views[0])
        return params, {"stats": stats, "target": jax.tree.map(jnp.copy, targeted(stats))}

    def forward(params, target_params, extra, batch, rng):
        del rng
        stats, target_stats = extra["stats"], extra["target"]
        view_a, view_b = batch["views"]
        a, stats = online.apply(params, stats, view_a, train=True)
        b, stats = online.apply(params, stats, view_b, train=True)
        target_a, target_stats = target.apply(target_params, target_stats, view_a, train=True)
        target_b, target_stats = target.apply(target_params, target_stats, view_b, train=True)
        outputs = {
            "embedding": a["encoder"],
            "pairs": ((a["predictor"], target_b["projector"]), (b["predictor"], target_a["projector"])),
        }
        return outputs, {"stats": stats, "target": target_stats}

    def loss(outputs, extra, batch):
        del extra, batch
        # 2 - 2 cos for each direction, added (equation 2 and its symmetric twin).
        return sum(2 + 2 * negative_cosine(prediction, z) for prediction, z in outputs["pairs"]), {}

    transform = track_target(cosine_momentum(config.momentum, steps), targeted)
    return Method(2, frozenset(), init, forward, loss, transform, keep, encoder_of)
