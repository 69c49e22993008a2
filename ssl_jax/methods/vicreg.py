r"""VICReg: views agree, every dimension keeps its variance, and no two dimensions say the same.

Its three terms are named for what they do: variance (no dimension dies), invariance (views agree), covariance (no two
dimensions repeat each other). The two branches need not share anything. Without the variance term it collapses.

$$25\,\mathrm{MSE}(z_1,z_2)+25\sum_z \overline{\max(0,1-\sigma_d)}+\sum_z \tfrac1D\sum_{i\ne j}\mathrm{Cov}_{ij}^2$$

Source: https://arxiv.org/abs/2105.04906; facebookresearch/vicreg, main_vicreg.py.

Family: without negatives.
"""

from dataclasses import dataclass

from ssl_jax.losses import vicreg
from ssl_jax.methods.base import Method, init_network, require_batch, std_collapse
from ssl_jax.models import mlp
from ssl_jax.network import apply_separately, stack


@dataclass(frozen=True)
class Config:
    invariance: float = 25.0  # weights of the three terms (main_vicreg.py)
    variance: float = 25.0  # 0 collapses
    covariance: float = 1.0  # against redundant dimensions
    hidden: int = 2048  # of the projector, as solo-learn has it for CIFAR-10; ImageNet: 8192 (main_vicreg.py)
    out: int = 2048


RECIPE = {
    "optim.name": "lars",
    "optim.lr": 0.2,
    "optim.weight_decay": 1e-6,
    "optim.warmup": "0.1 epochs",
}  # main_vicreg.py


def make(config, encoder, run):
    del run
    network = stack(encoder=encoder, projector=mlp((config.hidden, config.hidden, config.out), last_bias=False))
    weights = {"invariance": config.invariance, "variance": config.variance, "covariance": config.covariance}

    def forward(params, target, state, batch, key):
        del target, key
        require_batch(batch["views"], "vicreg")
        (a, b), stats = apply_separately(network, params, state.stats, batch["views"])
        return {"embedding": a["encoder"], "z": (a["projector"], b["projector"])}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        z = outputs["z"]
        return vicreg(*z, **weights), {"projection_std": z[0].std(axis=0).mean()}

    collapsed = std_collapse("config.method.variance too small")
    return Method(init_network(network), forward, loss, collapsed=collapsed)
