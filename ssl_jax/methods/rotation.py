"""Rotation prediction: by which of four quarter turns has an image been turned?

The turns are exact, so that no interpolated border gives the answer away. Useless for images that have no upright
position.

Source: RotNet, https://arxiv.org/abs/1803.07728; gidariss/FeatureLearningRotNet.

Family: pretext tasks.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from ssl_jax.losses import interleave
from ssl_jax.methods.base import Method, init_network
from ssl_jax.models import linear
from ssl_jax.network import stack


@dataclass(frozen=True)
class Config:
    pass


# The official CIFAR-10 configuration: batches of 128 images, each turned four times.
RECIPE = {
    "optim.lr": 0.1,
    "optim.lr_batch": 128,
    "optim.nesterov": True,
    "optim.weight_decay": 5e-4,
    "augment.preset": "light",
}


def quarter_turns(images):
    """[B, s, s, C] -> [4 B, s, s, C], each image turned by 0, 90, 180 and 270 degrees.

    By transposing and flipping: an interpolated border would give the answer away.
    """
    return interleave([jnp.rot90(images, k, axes=(1, 2)) for k in range(4)])


def make(config, encoder, run):
    del config, run
    network = stack(encoder=encoder, classifier=linear(4))

    def forward(params, target, state, batch, key):
        del target, key
        (images,) = batch["views"]
        y, stats = network.apply(params, state.stats, quarter_turns(images), train=True)
        logits = y["classifier"].reshape(-1, 4, 4)  # [B, turn, 4]
        return {"embedding": y["encoder"][::4], "logits": logits}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        logits = outputs["logits"]
        turns = jnp.broadcast_to(jnp.arange(4), logits.shape[:2])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, turns)
        return each.mean(), {"accuracy": (logits.argmax(-1) == turns).mean()}

    return Method(init_network(network), forward, loss, views=1)
