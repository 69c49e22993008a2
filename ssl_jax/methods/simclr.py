r"""SimCLR: two views of an image find each other among all other views of the batch.

Simple and hard to break. It wants large batches, because the 2B - 2 other views of the batch are the negatives.
BatchNorm runs over the whole batch on all devices: per device, its statistics would give positives away.

$$-\log \frac{e^{z_i z_j/T}}{\sum_{k\ne i} e^{z_i z_k/T}}$$

Source: https://arxiv.org/abs/2002.05709; google-research/simclr.

Family: contrastive.
"""

from dataclasses import dataclass

from ssl_jax.losses import nt_xent
from ssl_jax.methods.base import Method, init_network
from ssl_jax.models import mlp
from ssl_jax.network import apply_jointly, stack


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


def make(config, encoder, run):
    del run
    network = stack(encoder=encoder, projector=mlp((config.hidden, config.out)))

    def forward(params, target, state, batch, key):
        del target, key
        (a, b), stats = apply_jointly(network, params, state.stats, batch["views"])
        return {"embedding": a["encoder"], "z": (a["projector"], b["projector"])}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        return nt_xent(*outputs["z"], temperature=config.temperature), {}

    return Method(init_network(network), forward, loss)
