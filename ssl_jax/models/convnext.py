"""ConvNeXt, with timm's structure and names: depthwise convolutions between LayerNorm and pointwise products.

Source: https://arxiv.org/abs/2201.03545. Initial values as in facebookresearch/ConvNeXt: normal with deviation 0.02,
LayerScale 1e-6. Modules have timm's names with _ for a dot, from which `torch_weights` derives the names of weights.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssl_jax.config import Model
from ssl_jax.models.layers import conv, gelu, kept, network, rematerialized, resolve_conv
from ssl_jax.models.vit import Norm
from ssl_jax.network import Network

init = nn.initializers.truncated_normal(0.02)


class Downsample(nn.Module):
    """Convolution with bias whose stride is its size, [B, H, W, C] -> [B, H // size, W // size, features]."""

    features: int
    size: int
    how: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv(x, kernel.astype(x.dtype), self.size, 0, self.how) + bias.astype(x.dtype)


class Depthwise(nn.Module):
    """7x7 convolution of each channel by itself, with bias; height and width stay."""

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        kernel = self.param("kernel", init, (7, 7, 1, channels)).astype(x.dtype)
        axes = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes, feature_group_count=channels)
        return y + self.param("bias", nn.initializers.zeros, (channels,)).astype(x.dtype)


class Block(nn.Module):
    """Depthwise convolution, LayerNorm, an MLP four times as wide, LayerScale. The stream stays float32 or wider.

    keep: factors [B, 2] of the branch, see `kept`; the second is not used.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x, keep=None):
        width = x.shape[-1]
        y = Norm(dtype=self.dtype, name="norm")(Depthwise(name="conv_dw")(x.astype(self.dtype)))
        y = y.reshape(-1, width)  # as in a ViT's blocks
        y = gelu(nn.Dense(4 * width, kernel_init=init, dtype=self.dtype, name="mlp_fc1")(y))
        y = nn.Dense(width, kernel_init=init, dtype=self.dtype, name="mlp_fc2")(y).reshape(x.shape)
        y = y * self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + (y if keep is None else y * keep[:, 0, None, None, None].astype(y.dtype))


class Stage(nn.Module):
    width: int
    depth: int
    first: bool
    dtype: Any
    how: str
    remat: str

    @nn.compact
    def __call__(self, x, keep):
        """keep: of each block."""
        if not self.first:
            x = Norm(dtype=self.dtype, name="downsample_0")(x)
            x = Downsample(self.width, 2, self.how, name="downsample_1")(x)
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for i in range(self.depth):
            x = rematerialized(Block, self.remat)(self.dtype, name=f"blocks_{i}")(x, keep[i])
        return x


class ConvNeXt(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> embeddings float32 [B, D], the LayerNorm of the mean over places.

    dense: also return the feature map [B, H // 32, W // 32, D] of the last stage, each place after the same LayerNorm
    (as DINOv3 does). Sides have 32 px or more.
    keys: [B], for drop path, whose rate grows from 0 in the first block to drop_path in the last.
    """

    widths: tuple[int, ...]  # of the stages
    depths: tuple[int, ...]  # blocks in each
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    how: str
    remat: str
    drop_path: float

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1, dense: bool = False, keys=None):
        del train, groups
        x = ((x - jnp.array(self.mean)) / jnp.array(self.std)).astype(self.dtype)
        x = Downsample(self.widths[0], 4, self.how, name="stem_0")(x)
        x = Norm(name="stem_1")(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        rates = np.linspace(0, self.drop_path, sum(self.depths))
        keep = [kept(rate, keys, i) for i, rate in enumerate(rates)]
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            x = Stage(width, depth, i == 0, self.dtype, self.how, self.remat, name=f"stages_{i}")(x, keep[:depth])
            keep = keep[depth:]
        norm = Norm(name="head_norm")
        y = norm(x.mean((1, 2)))
        return (y, norm(x)) if dense else y


# name: (widths, depths)
ARCHITECTURES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
}


def build_convnext(model: Model, mean: tuple[float, ...], std: tuple[float, ...]) -> Network:
    """The ConvNeXt that `config.model` describes. Embeddings have 768, 1024 or 1536 features, times model.width."""
    widths, depths = ARCHITECTURES[model.name]
    return network(
        ConvNeXt(
            widths=tuple(max(1, round(width * model.width)) for width in widths),
            depths=depths,
            mean=mean,
            std=std,
            dtype=jnp.dtype(model.dtype),
            how=resolve_conv(model.conv),
            remat=model.remat,
            drop_path=model.drop_path,
        )
    )._replace(drop_path=model.drop_path)
