"""SimMIM: most patches are replaced by one token, and a linear layer predicts their pixels.

Source: https://arxiv.org/abs/2111.09886; microsoft/SimMIM. Needs a ViT. Wants long training.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.losses import masked_error
from ssl_jax.methods.base import Method, need_vit
from ssl_jax.models import linear, patchify


@dataclass(frozen=True)
class Config:
    mask: float = 0.6  # share of the blocks that is masked (data_simmim.py)
    block: int = 2  # patches along a side of a block: 32 px with the official patches of 16


# configs/vit_base__800ep: at batch 512 (its lr is 1e-4 there); views of data_simmim.py
RECIPE = {
    "model.name": "vit_tiny",
    "model.pool": "mean",
    "augment.preset": "light",
    "augment.crop_scale": (0.67, 1.0),
    "optim.name": "adamw",
    "optim.lr": 5e-4,
    "optim.weight_decay": 0.05,
    "optim.warmup": "0.5 epochs",
    "optim.clip_norm": 5.0,
}


def random_mask(rng, batch, side, *, mask, block):
    """[B, side * side] bool: of the blocks of block x block patches, the share `mask` (rounded up), for each image.

    Blocks in the last row and column are smaller where `block` does not divide `side`.
    """
    blocks = -(-side // block)
    rank = jnp.argsort(jax.random.uniform(rng, (batch, blocks * blocks)), axis=1)
    of_blocks = (rank < math.ceil(mask * blocks * blocks)).reshape(batch, blocks, blocks)
    return of_blocks.repeat(block, axis=1).repeat(block, axis=2)[:, :side, :side].reshape(batch, -1)


def make(config, encoder, run):
    del run
    patch = need_vit(encoder, "simmim")
    if not 0 < config.mask <= 1:
        raise UserError(f"config.method.mask={config.mask}: allowed: more than 0, at most 1")
    if config.block < 1:
        raise UserError(f"config.method.block={config.block}: allowed: 1 or more")

    def head(images):
        return linear(patch * patch * images.shape[-1])

    def init(rng, views):
        rng_encoder, rng_token, rng_head = jax.random.split(rng, 3)
        params, stats = encoder.init(rng_encoder, views[0])
        tokens = jax.eval_shape(lambda p, s: encoder.apply(p, s, views[0], train=True, dense=True)[0], params, stats)
        token = 0.02 * jax.random.truncated_normal(rng_token, -1, 1, tokens.shape[-1:])
        to_pixels, _ = head(views[0]).init(rng_head, jnp.zeros(tokens.shape))
        return {"encoder": params, "token": token, "head": to_pixels}, {"stats": {"encoder": stats}}

    def forward(params, target, extra, batch, rng):
        del target
        (images,) = batch["views"]
        mask = random_mask(rng, len(images), images.shape[1] // patch, mask=config.mask, block=config.block)
        tokens, stats = encoder.apply(
            params["encoder"],
            extra["stats"]["encoder"],
            images,
            train=True,
            dense=True,
            masked=(mask, params["token"]),
        )
        tokens = tokens.reshape(*mask.shape, -1)
        prediction, _ = head(images).apply(params["head"], {}, tokens, train=True)
        # The embedding of the masked image, under any pool: the whole one would have to be encoded again for it.
        outputs = {"embedding": tokens.mean(axis=1), "prediction": prediction, "mask": mask}
        return outputs | {"pixels": (patchify(images, patch) - 0.5) / 0.25}, {"stats": {"encoder": stats}}

    def loss(outputs, extra, batch):
        del extra, batch
        return masked_error(outputs["prediction"], outputs["pixels"], outputs["mask"], power=1), {}

    return Method(init, forward, loss, views=1)
