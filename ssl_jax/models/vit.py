"""Vision transformers with timm's structure, and the decoder of a masked autoencoder, built from the same blocks.

Source: https://arxiv.org/abs/2010.11929. Pre-norm, LayerNorm with eps 1e-6, exact GELU, queries, keys and values with
bias. Initial values as in facebookresearch/mae: linear layers xavier uniform, tokens normal with deviation 0.02.
Modules have timm's names with _ for a dot (blocks_0, attn_qkv), from which `torch_weights` derives weight names.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.config import Model
from ssl_jax.errors import UserError
from ssl_jax.models.layers import network, rematerialized
from ssl_jax.network import Network

SMALL_UP_TO = 64  # px: the largest images for which patch=0 is not 16
xavier = nn.initializers.xavier_uniform()
token_init = nn.initializers.normal(0.02)
Norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)

ARCHITECTURES = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}  # heads, of 64 features each


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / patch * W / patch, patch * patch * C], patches row by row from left to right."""
    batch, height, width, channels = images.shape
    cut = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return cut.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


def sin_cos(height: int, width: int, features: int) -> np.ndarray:
    """Fixed positions float32 [height * width, features]: sin(row), cos(row), sin(column), cos(column), a quarter each.

    Frequencies fall from 1 towards 1 / 10000. `features` is divisible by 4. Source: facebookresearch/moco-v3, vits.py.
    """
    frequency = 10000.0 ** -(np.arange(features // 4) / (features // 4))
    rows, columns = np.indices((height, width)).reshape(2, -1, 1) * frequency
    return np.concatenate([np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], 1).astype(np.float32)


class Block(nn.Module):
    """A pre-norm transformer block, with an MLP four times as wide. The residual stream stays float32 or wider."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape
        dense = functools.partial(nn.Dense, kernel_init=xavier, dtype=self.dtype)
        y = dense(3 * width, name="attn_qkv")(Norm(dtype=self.dtype, name="norm1")(x))
        q, k, v = jnp.moveaxis(y.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + dense(width, name="attn_proj")(y)
        y = dense(4 * width, name="mlp_fc1")(Norm(dtype=self.dtype, name="norm2")(x))
        return x + dense(width, name="mlp_fc2")(nn.gelu(y, approximate=False))


class Projection(nn.Module):
    """Patches to tokens. frozen: the initial values are fixed and not parameters: no gradient, decay or target.

    Source of freezing: MoCo v3, section 4.2, https://arxiv.org/abs/2104.02057.
    """

    features: int
    patch: int
    frozen: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        shape = (self.patch, self.patch, x.shape[-1], self.features)

        def kernel_init(rng):  # that of a linear layer; a convolution's would count positions as outputs
            return xavier(rng, (self.patch * self.patch * x.shape[-1], self.features)).reshape(shape)

        if self.frozen:
            kernel = self.variable("batch_stats", "kernel", lambda: kernel_init(self.make_rng("params"))).value
            bias = self.variable("batch_stats", "bias", jnp.zeros, self.features).value
        else:
            kernel = self.param("kernel", kernel_init)
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = kernel.reshape(-1, self.features).astype(self.dtype)
        return patchify(x, self.patch).astype(self.dtype) @ kernel + bias


class ViT(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> embeddings float32 [B, D]; N = H / patch * W / patch tokens and a class token.

    dense: also return the patches' tokens [B, H / patch, W / patch, D].
    visible: indices [B, n] of the only patches to process; returns tokens [B, 1 + n, D] with the class token first.
    masked: (mask [B, N], token [D]): the token replaces masked patches; their positions are added to it.
    """

    width: int
    heads: int
    depth: int
    patch: int
    side: int  # patches along a side for which positions are learned; those of other sizes are interpolated
    positions: str
    freeze_patch: bool
    pool: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1, dense: bool = False, visible=None, masked=None):
        del train, groups
        block = rematerialized(Block, self.remat)
        check_patch(self.patch, x.shape[1:3])
        batch, height, width = len(x), x.shape[1] // self.patch, x.shape[2] // self.patch
        x = (x - jnp.array(self.mean)) / jnp.array(self.std)
        x = Projection(self.width, self.patch, self.freeze_patch, self.dtype, name="patch_embed_proj")(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if masked is not None:
            mask, token = masked
            x = jnp.where(mask[..., None], token, x)
        class_position, patch_positions = self._positions(height, width)
        x = x + patch_positions
        if visible is not None:
            x = jnp.take_along_axis(x, visible[..., None], axis=1)
        class_token = self.param("cls_token", token_init, (1, 1, self.width)) + class_position
        x = jnp.concatenate([jnp.broadcast_to(class_token, (batch, 1, self.width)), x], axis=1)
        for i in range(self.depth):
            x = block(self.heads, self.dtype, name=f"blocks_{i}")(x)
        x = Norm(name="norm")(x)
        if visible is not None:
            return x
        y = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1)
        return (y, x[:, 1:].reshape(batch, height, width, self.width)) if dense else y

    def _positions(self, height, width):
        """Positions of the class token [D] and of the patches [N, D]."""
        if self.positions == "fixed":
            return 0.0, sin_cos(height, width, self.width)
        table = self.param("pos_embed", token_init, (1, 1 + self.side**2, self.width))[0]
        grid = table[1:].reshape(self.side, self.side, self.width)
        if (height, width) != (self.side, self.side):
            grid = jax.image.resize(grid, (height, width, self.width), "bicubic")
        return table[0], grid.reshape(-1, self.width)


class Decoder(nn.Module):
    """Tokens [B, 1 + n, D] of a ViT's class token and visible patches -> pixels [B, N, out] of all patches.

    order: [B, N], all patches of a square image, starting with the n visible ones in the order of their tokens. None:
    all N patches are visible and in order.
    """

    width: int
    depth: int
    heads: int
    out: int

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1, order=None):
        del train, groups
        x = nn.Dense(self.width, kernel_init=xavier, name="embed")(x)
        token = self.param("token", token_init, (self.width,))
        class_token, x = x[:, :1], x[:, 1:]
        if order is not None:
            batch, patches = order.shape
            missing = jnp.broadcast_to(token, (batch, patches - x.shape[1], self.width))
            x = jnp.concatenate([x, missing], axis=1)
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        side = round(x.shape[1] ** 0.5)
        x = jnp.concatenate([class_token, x + sin_cos(side, side, self.width)], axis=1)
        for i in range(self.depth):
            x = Block(self.heads, x.dtype, name=f"blocks_{i}")(x)
        return nn.Dense(self.out, kernel_init=xavier, name="pixels")(Norm(name="norm")(x[:, 1:]))


def decoder(width: int, depth: int, heads: int, out: int) -> Network:
    """The `Decoder` of a masked autoencoder. Its apply accepts order=.

    Raises UserError if `width` is not divisible by 4 and by `heads`.
    """
    if width % 4 or width % heads:
        raise UserError(f"config.method.width={width}: allowed: multiples of 4 and of config.method.heads={heads}")
    return network(Decoder(width, depth, heads, out))


def check_patch(patch: int, sides: tuple[int, ...]) -> None:
    """Raises UserError if `patch` does not divide every one of `sides` (px)."""
    for side in sides:
        if side % patch:
            allowed = ", ".join(str(p) for p in range(1, side + 1) if side % p == 0)
            raise UserError(f"config.model.patch={patch}: does not divide images of {side} px; allowed: {allowed}")


def build_vit(model: Model, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Network:
    """The ViT that `config.model` describes, for images of `size` px.

    Embeddings have 192, 384 or 768 features, times model.width, which scales the features of each head.
    Raises UserError if the patch does not divide `size`.
    """
    heads = ARCHITECTURES[model.name]
    patch = model.patch or 16
    if not model.patch and size <= SMALL_UP_TO:
        patch = next(p for p in range(max(1, size // 7), 0, -1) if size % p == 0)
    check_patch(patch, (size,))
    vit = network(
        ViT(
            width=heads * 4 * max(1, round(16 * model.width)),  # divisible by 4, which fixed positions need
            heads=heads,
            depth=model.depth,
            patch=patch,
            side=size // patch,
            positions=model.positions,
            freeze_patch=model.freeze_patch,
            pool=model.pool,
            mean=mean,
            std=std,
            dtype=jnp.dtype(model.dtype),
            remat=model.remat,
        )
    )
    return vit._replace(patch=patch)
