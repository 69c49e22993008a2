r"""Supervised contrastive: every view of an image finds all views of its class among the batch.

SimCLR in which all views of a class are positives. Often better than cross-entropy where classes have many images; each
class should have several in a batch. An image without a label (-1) has only its other view as a positive.

$$-\frac{1}{|P(i)|}\sum_{p\in P(i)} \log \frac{e^{z_i z_p/T}}{\sum_{a\ne i} e^{z_i z_a/T}}$$

Source: https://arxiv.org/abs/2004.11362; HobbitLong/SupContrast.

Family: with labels.
"""

from dataclasses import dataclass

from ssl_jax.losses import sup_con
from ssl_jax.methods.base import Method, init_network, one_label
from ssl_jax.models import mlp
from ssl_jax.network import apply_jointly, stack


@dataclass(frozen=True)
class Config:
    temperature: float = 0.1  # section 4.4
    hidden: int = 2048  # of the projector (section 3.1)
    out: int = 128


RECIPE = {"optim.lr": 0.05, "optim.weight_decay": 1e-4}  # main_supcon.py's defaults, at batch 256


def make(config, encoder, run):
    del run
    projector = mlp((config.hidden, config.out), norm=False, bias=True)  # section 3.1: no BatchNorm
    network = stack(encoder=encoder, projector=projector)

    def forward(params, target, state, batch, key):
        del target, key
        (a, b), stats = apply_jointly(network, params, state.stats, batch["views"])
        return {"embedding": a["encoder"], "z": (a["projector"], b["projector"])}, stats

    def loss(outputs, state, batch, ctx):
        del state, ctx
        z_a, z_b = outputs["z"]
        return sup_con(z_a, z_b, one_label(batch), temperature=config.temperature), {}

    return Method(init_network(network), forward, loss, needs=frozenset({"label"}))
