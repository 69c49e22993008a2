r"""MAE: a ViT sees a quarter of the patches, a small decoder predicts the pixels of the others.

A step costs a fraction of one over all patches. Needs a ViT and long training; weak without fine-tuning.

$$\text{mean over hidden patches of } (\hat x - n(x))^2$$

Source: https://arxiv.org/abs/2111.06377; facebookresearch/mae.

Family: pretext tasks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.fields import option
from ssl_jax.methods.base import Method, init_with_head, masked_loss, require_vit
from ssl_jax.models import decoder, patchify


@dataclass(frozen=True)
class Config:
    mask: float = option(0.75, "share of the patches that is hidden", above=0, below=1)  # section 4.1
    normalize: bool = True  # each patch's pixels by their own mean and deviation (--norm_pix_loss of PRETRAIN.md)
    width: int = 128  # of the decoder: ours, for vit_tiny; official for vit_base: 512
    depth: int = 2  # its blocks; official: 8
    heads: int = 4  # official: 16


# The defaults of main_pretrain.py. PRETRAIN.md takes an lr of 1.5e-4 for vit_base, with batches of 4096, and warms up
# for a twentieth of 800 epochs; ours suits short runs.
RECIPE = {
    "model.name": "vit_tiny",
    "model.pool": "mean",
    "augment.preset": "light",
    "augment.crop_scale": (0.2, 1.0),
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.b2": 0.95,
    "optim.weight_decay": 0.05,
    "optim.warmup": "0.5 epochs",
}


def normalized(pixels):
    """[B, N, P] -> each patch's P values with mean 0 and deviation 1: what is left to predict is its structure."""
    mean, variance = pixels.mean(axis=-1, keepdims=True), pixels.var(axis=-1, ddof=1, keepdims=True)
    return (pixels - mean) * jax.lax.rsqrt(variance + 1e-6)


def make(config, encoder, run):
    del run
    patch = require_vit(encoder, "mae")

    def head(images):
        return decoder(config.width, config.depth, config.heads, patch * patch * images.shape[-1])

    def forward(params, target, state, batch, key):
        del target
        (images,) = batch["views"]
        pixels = patchify(encoder.scaled(images), patch)
        count = pixels.shape[1]
        kept = max(1, int(count * (1 - config.mask)))
        order = jax.vmap(lambda key: jax.random.permutation(key, count))(key)  # the first `kept` are visible
        tokens, stats = encoder.apply(
            params["encoder"], state.stats["encoder"], images, train=True, visible=order[:, :kept]
        )
        prediction, _ = head(images).apply(params["head"], {}, tokens, train=True, order=order)
        outputs = {
            # Of what was visible, under any pool: for the embedding of the whole it would have to be encoded again.
            "embedding": tokens[:, 1:].mean(axis=1),
            "prediction": prediction,
            "pixels": normalized(pixels) if config.normalize else pixels,
            "mask": jnp.argsort(order, axis=1) >= kept,
        }
        return outputs, {"encoder": stats}

    return Method(init_with_head(encoder, head), forward, masked_loss(power=2), views=1)
