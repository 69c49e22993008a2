"""The narrow transformer that predicts the features of hidden patches, built from a ViT's blocks."""

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.layers import network
from ssl_jax.models.vit import Block, BlockOptions, Norm, sin_cos, token_init, xavier
from ssl_jax.network import Network


class Predictor(nn.Module):
    """Tokens [B, n, D] of visible patches -> features [B, m, out] of hidden ones.

    visible: indices [B, n], hidden: indices [B, m], both in a square grid of side * side patches. Source:
    facebookresearch/ijepa, src/models/vision_transformer.py, whose blocks' output layers start smaller with depth.
    """

    width: int
    depth: int
    heads: int
    out: int

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1, visible=None, hidden=None, side: int = 0):
        del train, groups
        if visible is None:  # for the initial values, which do not depend on it
            side, visible = x.shape[1], jnp.zeros(x.shape[:2], int)
        hidden = visible if hidden is None else hidden
        positions = jnp.asarray(sin_cos(side, side, self.width))
        token = self.param("token", token_init, (self.width,))
        x = nn.Dense(self.width, kernel_init=xavier, name="embed")(x) + positions[visible]
        x = jnp.concatenate([x, token + positions[hidden]], axis=1)
        for i in range(self.depth):
            x = Block(BlockOptions(self.heads, x.dtype), name=f"blocks_{i}")(x)
        return nn.Dense(self.out, kernel_init=xavier, name="proj")(Norm(name="norm")(x[:, visible.shape[1] :]))


def predictor(width: int, depth: int, heads: int, out: int) -> Network:
    """A `Predictor`. Its apply needs visible=, hidden= and side=.

    Raises UserError if `width` is not divisible by 4 and by `heads`.
    """
    if width % 4 or width % heads:
        raise UserError(f"config.method.width={width}: allowed: multiples of 4 and of config.method.heads={heads}")
    return network(Predictor(width, depth, heads, out))
