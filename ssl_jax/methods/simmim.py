r"""SimMIM: most patches are replaced by one token, and a linear layer predicts their pixels.

Simpler than MAE, but each step is slower. Needs a ViT and long training.

$$\text{mean over hidden patches of } |\hat x - x|$$

Source: https://arxiv.org/abs/2111.09886; microsoft/SimMIM.

Family: pretext tasks.
"""

import math
from dataclasses import dataclass

import jax

from ssl_jax.fields import option
from ssl_jax.methods.base import Method, init_with_head, masked_loss, require_vit
from ssl_jax.models import linear, patchify


@dataclass(frozen=True)
class Config:
    mask: float = option(0.6, "share of the blocks that is masked", above=0, max=1)  # data_simmim.py
    block: int = option(2, "patches along a side of a block", min=1)  # 32 px with the official patches of 16


# The defaults of config.py, views of data_simmim.py. configs/vit_base__800ep takes an lr of 1e-4. Warm-up: ours.
RECIPE = {
    "model.name": "vit_tiny",
    "model.pool": "mean",
    "augment.preset": "light",
    "augment.crop_scale": (0.67, 1.0),
    "optim.name": "adamw",
    "optim.lr": 5e-4,
    "optim.lr_batch": 512,
    "optim.weight_decay": 0.05,
    "optim.warmup": "0.5 epochs",
    "optim.clip_norm": 5.0,
}


def random_mask(key, side, *, mask, block):
    """[B, side * side] bool of key [B], one per image: the share `mask` (rounded up) of the block x block blocks.

    Blocks in the last row and column are smaller where `block` does not divide `side`.
    """
    blocks = -(-side // block)
    rank = jax.vmap(lambda k: jax.random.permutation(k, blocks * blocks))(key)
    of_blocks = (rank < math.ceil(mask * blocks * blocks)).reshape(-1, blocks, blocks)
    return of_blocks.repeat(block, axis=1).repeat(block, axis=2)[:, :side, :side].reshape(len(key), -1)


def make(config, encoder, run):
    del run
    patch = require_vit(encoder, "simmim")

    def head(images):
        return linear(patch * patch * images.shape[-1])

    def init(key, views):
        key_net, key_token = jax.random.split(key)
        params, state = init_with_head(encoder, head)(key_net, views)
        width = params["head"]["linear"]["kernel"].shape[0]
        # Cut off at one deviation, as in the official ViT.
        return params | {"token": 0.02 * jax.random.truncated_normal(key_token, -1, 1, (width,))}, state

    def forward(params, target, state, batch, key):
        del target
        (images,) = batch["views"]
        mask = random_mask(key, images.shape[1] // patch, mask=config.mask, block=config.block)
        masked = (mask, params["token"])
        (_, tokens), stats = encoder.apply(
            params["encoder"], state.stats["encoder"], images, train=True, dense=True, masked=masked
        )
        tokens = tokens.reshape(*mask.shape, -1)
        prediction, _ = head(images).apply(params["head"], {}, tokens, train=True)
        outputs = {
            # Of the masked image, under any pool: for the embedding of the whole it would have to be encoded again.
            "embedding": tokens.mean(axis=1),
            "prediction": prediction,
            "pixels": patchify(encoder.scaled(images), patch),
            "mask": mask,
        }
        return outputs, {"encoder": stats}

    return Method(init, forward, masked_loss(power=1), views=1)
