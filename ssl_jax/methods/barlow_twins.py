r"""Barlow Twins: the cross-correlation between the projections of two views becomes the identity.

Each dimension agrees between the views, and no two dimensions say the same. There is no momentum and no predictor. Wide
projections help; the cost grows with the square of `out`.

$$\sum_i (1-C_{ii})^2 + \lambda\sum_{i\ne j} C_{ij}^2$$

Source: https://arxiv.org/abs/2103.03230; facebookresearch/barlowtwins, main.py.

Family: without negatives.
"""

from dataclasses import dataclass

from ssl_jax.losses import barlow_twins
from ssl_jax.methods.base import Method, init_network, require_batch, std_collapse
from ssl_jax.models import mlp
from ssl_jax.network import apply_separately, stack


@dataclass(frozen=True)
class Config:
    off_diagonal: float = 0.005  # lambda (section 2.2); main.py: 0.0051
    hidden: int = 2048  # of the projector, as solo-learn has it for CIFAR-10; ImageNet: 8192 (main.py)
    out: int = 2048


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.2,
    "optim.vector_lr": 0.024,  # biases and norm scales
    "optim.weight_decay": 1e-6,
    "optim.warmup": "0.1 epochs",
}  # main.py


def make(config, encoder, run):
    del run
    network = stack(encoder=encoder, projector=mlp((config.hidden, config.hidden, config.out), last_bias=False))

    def forward(params, target, state, batch, key):
        del target, key
        require_batch(batch["views"], "barlow_twins")
        (a, b), stats = apply_separately(network, params, state.stats, batch["views"])
        return {"embedding": a["encoder"], "z": (a["projector"], b["projector"])}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        z = outputs["z"]
        return barlow_twins(*z, off_diagonal=config.off_diagonal), {"projection_std": z[0].std(axis=0).mean()}

    # The correlation does not see the scale until the 1e-5 beside the variance does.
    collapsed = std_collapse("a learning rate or weight decay too high", threshold=0.01)
    return Method(init_network(network), forward, loss, collapsed=collapsed)
