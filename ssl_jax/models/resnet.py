"""ResNets with torchvision's structure, and a thin one for small images on CPUs.

Source: https://arxiv.org/abs/1512.03385; bottlenecks have their stride in the 3x3 convolution, as torchvision's (v1.5).
Modules have torchvision's names with _ for a dot (conv1, bn1, layer1_0, downsample_0), from which `torch_weights`
derives the names of weights.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.config import Model
from ssl_jax.errors import unknown
from ssl_jax.models.layers import BatchNorm, Conv, network, rematerialized, resolve_conv
from ssl_jax.network import Network

SMALL_UP_TO = 64  # px: the largest images for which stem=auto selects the small stem


class Block(nn.Module):
    """A residual block of convolutions with BatchNorm.

    convs: (features, size, stride) of each. ReLU follows the last one only after the addition.
    """

    convs: tuple[tuple[int, int, int], ...]
    how: str
    zero_init: bool

    @nn.compact
    def __call__(self, x, train: bool, groups: int):
        y, stride = x, 1
        for i, (features, size, step) in enumerate(self.convs, 1):
            last = i == len(self.convs)
            scale = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
            y = Conv(features, size, step, self.how, name=f"conv{i}")(y)
            y = BatchNorm(scale_init=scale, name=f"bn{i}")(y, train=train, groups=groups)
            y = y if last else nn.relu(y)
            stride *= step
        if stride > 1 or x.shape[-1] != y.shape[-1]:
            x = Conv(y.shape[-1], 1, stride, self.how, name="downsample_0")(x)
            x = BatchNorm(name="downsample_1")(x, train=train, groups=groups)
        return nn.relu(x + y)


def basic(width: int, stride: int) -> tuple[tuple[int, int, int], ...]:
    return (width, 3, stride), (width, 3, 1)


def bottleneck(width: int, stride: int) -> tuple[tuple[int, int, int], ...]:
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class ResNet(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> embeddings float32 [B, D], D the channels of the last stage.

    dense: also return the feature map [B, h, w, D] of the last stage, before the mean over places.
    """

    widths: tuple[int, ...]  # of the stages
    depths: tuple[int, ...]  # blocks in each
    block: Callable[[int, int], tuple[tuple[int, int, int], ...]]
    stem: tuple[int, int]  # size and stride of the first convolution
    pool: bool  # max-pool 3x3, stride 2, after it
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    how: str
    zero_init: bool
    remat: str

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1, dense: bool = False):
        block = rematerialized(Block, self.remat, static=(2, 3))
        size, stride = self.stem
        # Not folded into the first convolution, because its zero padding is added after the normalisation.
        x = ((x - jnp.array(self.mean)) / jnp.array(self.std)).astype(self.dtype)
        x = Conv(self.widths[0], size, stride, self.how, name="conv1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train=train, groups=groups))
        if self.pool:
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True), 1):
            for i in range(depth):
                convs = self.block(width, 2 if stage > 1 and i == 0 else 1)
                x = block(convs, self.how, self.zero_init, name=f"layer{stage}_{i}")(x, train, groups)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (x.mean((1, 2)), x) if dense else x.mean((1, 2))


# name: (widths, depths, block)
ARCHITECTURES: dict[str, tuple] = {
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), basic),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3), basic),
    "resnet50": ((64, 128, 256, 512), (3, 4, 6, 3), bottleneck),
    "resnet101": ((64, 128, 256, 512), (3, 4, 23, 3), bottleneck),
    "resnet152": ((64, 128, 256, 512), (3, 8, 36, 3), bottleneck),
    "resnet_thin": ((24, 48, 96), (2, 2, 2), basic),  # 25 million multiplications at 28 px: for CPUs
}


def build_resnet(model: Model, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Network:
    """The ResNet that `config.model` describes. `size` matters only for stem="auto".

    Embeddings have 512 (resnet18, resnet34), 2048 (from resnet50 on) or 96 (resnet_thin) features, times model.width.
    resnet_thin always has the same stem, 5x5 with stride 2. Raises UserError for an unknown stem.
    """
    stem, pool = _stem(model, size)
    widths, depths, block = ARCHITECTURES[model.name]
    return network(
        ResNet(
            widths=tuple(max(1, round(width * model.width)) for width in widths),
            depths=depths,
            block=block,
            stem=stem,
            pool=pool,
            mean=mean,
            std=std,
            dtype=jnp.dtype(model.dtype),
            how=resolve_conv(model.conv),
            zero_init=model.zero_init,
            remat=model.remat,
        )
    )


def _stem(model: Model, size: int) -> tuple[tuple[int, int], bool]:
    """((size, stride) of the first convolution, whether to pool after it)."""
    name = model.stem
    if name == "auto":
        name = "small" if size <= SMALL_UP_TO else "imagenet"
    if name not in ("imagenet", "small"):
        raise unknown("config.model.stem", name, ("auto", "imagenet", "small"))
    if model.name == "resnet_thin":
        return (5, 2), False
    return ((7, 2), True) if name == "imagenet" else ((3, 1), False)
