"""Context encoder: the pixels of a blanked quarter are predicted from what is around it.

Without the adversarial loss, as in its authors' model for features, and without overlap. The decoder reads the
embedding, as the official one reads a vector.

Source: https://arxiv.org/abs/1604.07379; pathak22/context-encoder.

Family: pretext tasks.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_jax.fields import option
from ssl_jax.methods.base import Method, init_network
from ssl_jax.models import mlp
from ssl_jax.network import stack


@dataclass(frozen=True)
class Config:
    # Ours: random.
    region: Literal["central", "random"] = option("central", "where half of the height and width are blanked")
    hidden: int = 1024  # of the decoder: ours, an MLP; official: five transposed convolutions


# train.lua: Adam with beta_1 0.5, and ten times its lr of 2e-4 when there is a reconstruction loss; batches of 64
RECIPE = {
    "optim.name": "adamw",
    "optim.lr": 2e-3,
    "optim.lr_batch": 0,
    "optim.momentum": 0.5,
    "optim.weight_decay": 0.0,
    "augment.preset": "light",
}
BLANK = 0.5  # gray; official: 0.46, 0.41, 0.48, for three channels


def blank(images, corner):
    """(images with a quarter blanked, the quarter as it was [B, s // 2, s // 2, C]). corner [B, 2]: its row, column."""
    half = images.shape[1] // 2

    def one(image, corner):
        start = (*corner, 0)
        region = jax.lax.dynamic_slice(image, start, (half, half, image.shape[-1]))
        return jax.lax.dynamic_update_slice(image, jnp.full_like(region, BLANK), start), region

    return jax.vmap(one)(images, corner)


def make(config, encoder, run):
    del run

    def network(images):
        half, channels = images.shape[1] // 2, images.shape[-1]
        return stack(encoder=encoder, decoder=mlp((config.hidden, half * half * channels)))

    def init(key, views):
        return init_network(network(views[0]))(key, views)

    def forward(params, target, state, batch, key):
        del target
        (images,) = batch["views"]
        side = images.shape[1]
        corner = jnp.full((len(images), 2), side // 4)
        if config.region == "random":
            corner = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, side - side // 2 + 1))(key)
        around, hidden = blank(images, corner)
        y, stats = network(images).apply(params, state.stats, around, train=True)
        pixels = 2 * hidden.reshape(len(images), -1) - 1  # in [-1, 1], as official
        return {"embedding": y["encoder"], "prediction": y["decoder"], "pixels": pixels}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        return jnp.square(outputs["prediction"] - outputs["pixels"]).mean(), {}

    return Method(init, forward, loss, views=1)
