"""MAE: a ViT sees a quarter of the patches, a small decoder predicts the pixels of the others.

Source: https://arxiv.org/abs/2111.06377; facebookresearch/mae. Needs a ViT. Wants long training.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.losses import masked_error
from ssl_jax.methods.base import Method, need_vit
from ssl_jax.models import decoder, patchify


@dataclass(frozen=True)
class Config:
    mask: float = 0.75  # share of the patches that is hidden (section 4.1)
    normalize: bool = True  # each patch's pixels by their own mean and deviation (--norm_pix_loss)
    width: int = 128  # of the decoder: ours, for vit_tiny; official for vit_base: 512
    depth: int = 2  # its blocks; official: 8
    heads: int = 4  # official: 16


# main_pretrain.py; crops and flips only. Its README pretrains at 1.5e-4 with batch 4096, 1e-3 is the code's default.
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


def make(config, encoder, run):
    del run
    patch = need_vit(encoder, "mae")
    if not 0 < config.mask < 1:
        raise UserError(f"config.method.mask={config.mask}: allowed: more than 0, less than 1")

    def decoder_of(images):
        return decoder(config.width, config.depth, config.heads, patch * patch * images.shape[-1])

    def init(rng, views):
        rng_encoder, rng_decoder = jax.random.split(rng)
        params, stats = encoder.init(rng_encoder, views[0])
        tokens = jax.eval_shape(lambda p, s: encoder.apply(p, s, views[0], train=True, dense=True)[0], params, stats)
        patches, width = tokens.shape[1] * tokens.shape[2], tokens.shape[3]
        pixels, _ = decoder_of(views[0]).init(rng_decoder, jnp.zeros((1, 1 + patches, width)))
        return {"encoder": params, "decoder": pixels}, {"stats": {"encoder": stats}}

    def forward(params, target, extra, batch, rng):
        del target
        (images,) = batch["views"]
        pixels = patchify(images, patch)
        count = pixels.shape[1]
        kept = max(1, int(count * (1 - config.mask)))
        order = jnp.argsort(jax.random.uniform(rng, (len(images), count)), axis=1)
        tokens, stats = encoder.apply(
            params["encoder"], extra["stats"]["encoder"], images, train=True, visible=order[:, :kept]
        )
        prediction, _ = decoder_of(images).apply(params["decoder"], {}, tokens, train=True, order=order)
        if config.normalize:
            mean, variance = pixels.mean(axis=-1, keepdims=True), pixels.var(axis=-1, ddof=1, keepdims=True)
            pixels = (pixels - mean) * jax.lax.rsqrt(variance + 1e-6)
        mask = jnp.argsort(order, axis=1) >= kept
        # The embedding of what was visible, under any pool: the whole image would have to be encoded for it.
        outputs = {"embedding": tokens[:, 1:].mean(axis=1), "prediction": prediction, "pixels": pixels, "mask": mask}
        return outputs, {"stats": {"encoder": stats}}

    def loss(outputs, extra, batch):
        del extra, batch
        return masked_error(outputs["prediction"], outputs["pixels"], outputs["mask"], power=2), {}

    return Method(init, forward, loss, views=1)
