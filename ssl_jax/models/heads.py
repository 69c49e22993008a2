"""Heads, which sit on top of an encoder while it is trained. Inputs and outputs are float32, [B, D] -> [B, D']."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax

from ssl_jax.models.layers import BatchNorm, network
from ssl_jax.network import Network

# PyTorch's default for a linear layer: weights and biases uniform in +-1 / sqrt(inputs).
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Linear(nn.Module):
    features: int
    bias: bool = True
    zero: bool = False

    @nn.compact
    def __call__(self, x):
        bound = x.shape[-1] ** -0.5

        def bias_init(rng, shape):
            return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)

        zeros = nn.initializers.zeros
        x = x @ self.param("kernel", zeros if self.zero else _uniform, (x.shape[-1], self.features))
        if self.bias:
            x = x + self.param("bias", zeros if self.zero else bias_init, (self.features,))
        return x


class MLP(nn.Module):
    sizes: tuple[int, ...]
    norm: bool
    bias: bool
    last_norm: Literal[None, "affine", "plain"]
    last_bias: bool
    gelu: bool

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1):
        for i, size in enumerate(self.sizes[:-1], 1):
            x = Linear(size, self.bias, name=f"linear{i}")(x)
            if self.norm:
                x = BatchNorm(name=f"bn{i}")(x, train=train, groups=groups)
            x = nn.gelu(x, approximate=False) if self.gelu else nn.relu(x)
        n = len(self.sizes)
        x = Linear(self.sizes[-1], self.last_bias, name=f"linear{n}")(x)
        if self.last_norm:
            x = BatchNorm(affine=self.last_norm == "affine", name=f"bn{n}")(x, train=train, groups=groups)
        return x


class LinearHead(nn.Module):
    size: int
    bias: bool
    zero: bool

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1):
        del train, groups
        return Linear(self.size, self.bias, self.zero, name="linear")(x)


def mlp(
    sizes: Sequence[int],
    *,
    norm: bool = True,
    bias: bool = False,
    last_norm: Literal[None, "affine", "plain"] = None,
    last_bias: bool = True,
    gelu: bool = False,
) -> Network:
    """A projector or predictor: Linear, BatchNorm and ReLU for each size but the last, which is a Linear alone.

    Args:
      norm: whether there is BatchNorm in between.
      bias: whether the Linear layers but the last have a bias (without effect before a BatchNorm).
      last_bias: whether the last Linear has a bias.
      last_norm: BatchNorm after the last Linear, with ("affine") or without ("plain") a learned scale and bias.
      gelu: GELU instead of ReLU.

    Weights and biases start uniform in +-1 / sqrt(inputs), as PyTorch's do.
    """
    return network(MLP(tuple(sizes), norm, bias, last_norm, last_bias, gelu))


def linear(size: int, bias: bool = True, zero: bool = False) -> Network:
    """One linear layer with `size` outputs. zero: start at 0 (a classifier), else uniform in +-1 / sqrt(inputs)."""
    return network(LinearHead(size, bias, zero))
