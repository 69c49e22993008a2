r"""MoCo v3: a predicted query finds the momentum encoder's key of the other view among the keys of the batch.

There is no queue: the keys come from the same batch, which should be large. A predictor sits on the queries, and the
loss runs in both directions. A good choice for ViTs; the official recipe freezes their patch projection at its random
initial values.

$$2T\left(\mathrm{CE}(q_1 k_2^\top/T) + \mathrm{CE}(q_2 k_1^\top/T)\right)$$

Source: https://arxiv.org/abs/2104.02057; facebookresearch/moco-v3, moco/builder.py.

Family: contrastive.
"""

from dataclasses import dataclass

from ssl_jax.losses import in_batch_info_nce
from ssl_jax.methods.base import Method, init_with_target, select_entries
from ssl_jax.models import mlp
from ssl_jax.network import apply_separately, stack
from ssl_jax.transforms import cosine_momentum, track_target


@dataclass(frozen=True)
class Config:
    temperature: float = 1.0  # CONFIG.md: 1.0 for ResNet-50, 0.2 for ViT
    momentum: float = 0.99  # of the target, rises to 1; 0.996 for 1000 epochs
    hidden: int = 4096  # of projector and predictor
    out: int = 256


# CONFIG.md, ResNet-50: LARS, 0.6 at batch 256 for 100 epochs, 0.3 for longer. A ViT wants AdamW, 1.5e-4, decay 0.1.
RECIPE = {"optim.name": "lars", "optim.lr": 0.6, "optim.weight_decay": 1e-6, "optim.warmup": "0.1 epochs"}
TINY = {"optim.lr": 0.0125}  # for the contract test: rounding grows with the loss, which counts several times


def make(config, encoder, run):
    vit = encoder.patch > 0  # its projector is a layer deeper, and its predictor ends in a BatchNorm
    hidden = (config.hidden,) * (2 if vit else 1)
    projector = mlp((*hidden, config.out), last_norm="plain", last_bias=False)
    predictor = mlp((config.hidden, config.out), last_norm="plain" if vit else None, last_bias=False)
    target_network = stack(encoder=encoder, projector=projector)
    online = stack(encoder=encoder, projector=projector, predictor=predictor)

    def forward(params, target, state, batch, key):
        del key
        (a, b), stats = apply_separately(online, params, state.stats, batch["views"])
        (key_a, key_b), target_stats = apply_separately(target_network, target, state.stats["target"], batch["views"])
        pairs = ((a["predictor"], key_b["projector"]), (b["predictor"], key_a["projector"]))
        return {"embedding": a["encoder"], "pairs": pairs}, {**stats, "target": target_stats}

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        t = config.temperature
        # The factor 2 T makes the gradient's size independent of the temperature (builder.py).
        return sum(2 * t * in_batch_info_nce(q, k, temperature=t) for q, k in outputs["pairs"]), {}

    transform = track_target(cosine_momentum(config.momentum, run.steps), select_entries("encoder", "projector"))
    return Method(init_with_target(online, "encoder", "projector"), forward, loss, transform=transform)
