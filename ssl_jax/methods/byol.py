"""BYOL: an online network predicts the target network's projection of the other view; no negatives.

Source: https://arxiv.org/abs/2006.07733; google-deepmind/deepmind-research, byol.
"""

from dataclasses import dataclass

from ssl_jax.losses import negative_cosine
from ssl_jax.methods.base import Method, init_with_target, one_by_one, parts, stack
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


def make(config, encoder, run):
    target = stack(encoder=encoder, projector=mlp((config.hidden, config.out)))
    online = stack(
        encoder=encoder, projector=mlp((config.hidden, config.out)), predictor=mlp((config.hidden, config.out))
    )

    def forward(params, target_params, extra, batch, rng):
        del rng
        (a, b), stats = one_by_one(online, params, extra["stats"], batch["views"])
        (target_a, target_b), target_stats = one_by_one(target, target_params, extra["target"], batch["views"])
        outputs = {
            "embedding": a["encoder"],
            "pairs": ((a["predictor"], target_b["projector"]), (b["predictor"], target_a["projector"])),
        }
        return outputs, {"stats": stats, "target": target_stats}

    def loss(outputs, extra, batch):
        del extra, batch
        # 2 - 2 cos for each direction, added (equation 2 and its symmetric twin).
        return sum(2 + 2 * negative_cosine(prediction, z) for prediction, z in outputs["pairs"]), {}

    transform = track_target(cosine_momentum(config.momentum, run.steps), parts("encoder", "projector"))
    return Method(init_with_target(online, "encoder", "projector"), forward, loss, transform=transform)
