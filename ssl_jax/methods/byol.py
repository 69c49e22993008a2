r"""BYOL: an online network predicts the target network's projection of the other view; no negatives.

The target is a moving average of the online network. Works well with small batches and with weak colour transforms.
Without the predictor it collapses.

$$2 - 2\, n(q(z_1))\cdot \mathrm{sg}\,n(z'_2)$$

Source: https://arxiv.org/abs/2006.07733; google-deepmind/deepmind-research, byol.

Family: without negatives.
"""

from dataclasses import dataclass

from ssl_jax.collapse import embedding_std
from ssl_jax.losses import negative_cosine
from ssl_jax.methods.base import Method, init_with_target, select_entries, std_collapse
from ssl_jax.models import mlp
from ssl_jax.network import apply_separately, stack
from ssl_jax.transforms import cosine_momentum, track_target


@dataclass(frozen=True)
class Config:
    momentum: float = 0.99  # of the target, rises to 1; configs/byol.py: 0.97 at 40 epochs to 0.996 at 1000
    hidden: int = 4096  # section 3.3, for projector and predictor
    out: int = 256
    predictor: bool = True  # without it all projections become one (section 5)


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.45,
    "optim.weight_decay": 1e-6,
    "optim.warmup": "0.1 epochs",
}  # 100 epochs


def make(config, encoder, run):
    head = mlp((config.hidden, config.out), last_bias=False)
    target = stack(encoder=encoder, projector=head)
    online = stack(encoder=encoder, projector=head, predictor=head) if config.predictor else target
    last = "predictor" if config.predictor else "projector"

    def forward(params, target_params, state, batch, key):
        del key
        (a, b), stats = apply_separately(online, params, state.stats, batch["views"])
        (target_a, target_b), target_stats = apply_separately(
            target, target_params, state.stats["target"], batch["views"]
        )
        outputs = {
            "embedding": a["encoder"],
            "pairs": ((a[last], target_b["projector"]), (b[last], target_a["projector"])),
        }
        return outputs, {**stats, "target": target_stats}

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        # 2 - 2 cos for each direction, added (equation 2 and its symmetric twin).
        value = sum(2 + 2 * negative_cosine(*pair) for pair in outputs["pairs"])
        return value, {"projection_std": embedding_std(outputs["pairs"][0][1])}

    transform = track_target(cosine_momentum(config.momentum, run.steps), select_entries("encoder", "projector"))
    collapsed = std_collapse("no predictor, a learning rate too high, or a target that moves too fast", threshold=0.1)
    init = init_with_target(online, "encoder", "projector")
    return Method(init, forward, loss, transform=transform, collapsed=collapsed)
