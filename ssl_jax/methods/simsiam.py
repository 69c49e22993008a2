r"""SimSiam: two views through one network, one predicts the other behind a stop-gradient; no negatives, no target.

BYOL without the moving average: the stop-gradient alone prevents the collapse. The lightest of its family, but
sensitive to learning rate and weight decay. The predictor's learning rate does not decay.

$$-\tfrac12\left(\cos(p_1,\mathrm{sg}\,z_2)+\cos(p_2,\mathrm{sg}\,z_1)\right)$$

Source: https://arxiv.org/abs/2011.10566; facebookresearch/simsiam.

Family: without negatives.
"""

from dataclasses import dataclass

from ssl_jax.collapse import direction_rank
from ssl_jax.losses import negative_cosine
from ssl_jax.methods.base import Method, init_network
from ssl_jax.models import mlp
from ssl_jax.network import apply_separately, stack


@dataclass(frozen=True)
class Config:
    hidden: int = 2048  # of the projector (builder.py: the width of ResNet-50's embedding)
    out: int = 2048  # builder.py, dim
    bottleneck: int = 512  # of the predictor (builder.py, pred_dim)
    stop_gradient: bool = True  # False shows the collapse of section 4.1


RECIPE = {"optim.lr": 0.05, "optim.decay_all": True}  # main_simsiam.py: SGD, weight decay 1e-4 on everything


def make(config, encoder, run):
    del run
    network = stack(
        encoder=encoder,
        projector=mlp((config.hidden, config.hidden, config.out), last_norm="plain", last_bias=False),
        predictor=mlp((config.bottleneck, config.out)),
    )

    def forward(params, target, state, batch, key):
        del target, key
        (a, b), stats = apply_separately(network, params, state.stats, batch["views"])
        pairs = ((a["predictor"], b["projector"]), (b["predictor"], a["projector"]))
        return {"embedding": a["encoder"], "pairs": pairs}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        pairs = outputs["pairs"]
        value = sum(negative_cosine(*pair, stop_gradient=config.stop_gradient) for pair in pairs) / 2
        return value, {"projection_rank": direction_rank(pairs[1][1])}

    def collapsed(metrics):
        rank = metrics["projection_rank"]
        words = f"projection_rank {rank:.3f}: projections lie near one line; likely cause: no stop-gradient, or a "
        return words + "learning rate too high" if rank < 1.2 else ""

    # A predictor whose rate does not decay follows the projections better (section 4.2).
    return Method(init_network(network), forward, loss, constant_lr=frozenset({"predictor"}), collapsed=collapsed)
