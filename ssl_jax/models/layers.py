"""Layers shared by all networks, and the conversion of a flax module to a `Network`."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.errors import UserError
from ssl_jax.models.conv import conv
from ssl_jax.network import Network

# Weights as in torchvision's ResNet: normal with variance 2 / (k * k * output channels) (kaiming, fan out).
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """Convolution without bias, [B, H, W, C] -> [B, H', W', features], padded by (size - 1) // 2."""

    features: int
    size: int
    stride: int = 1
    how: str = "native"

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", kaiming_normal, (self.size, self.size, x.shape[-1], self.features))
        return conv(x, kernel.astype(x.dtype), self.stride, (self.size - 1) // 2, self.how)


def rematerialized(block: type[nn.Module], remat: str, static: tuple[int, ...] = ()) -> type[nn.Module]:
    """The block itself, or with remat="blocks" one that recomputes its intermediate values for the gradient instead of
    storing them (https://arxiv.org/abs/1604.06174). static: positions of non-array arguments; self is 0.
    """
    return nn.remat(block, static_argnums=static) if remat == "blocks" else block


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (https://arxiv.org/abs/1502.03167), with PyTorch's conventions.

    eps is 1e-5; running statistics move by 0.1 per step, and their variance is the unbiased one. With groups > 1, that
    many equal parts of the batch each have their own statistics, and the running ones follow their mean. Statistics are
    computed and stored in float32 or wider; the output has the dtype of x.

    Raises UserError if the groups do not divide the batch.
    """

    affine: bool = True
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1):
        features = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        var = self.variable("batch_stats", "var", jnp.ones, features)
        parts = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train and not self.is_initializing():
            parts = _split(parts, groups)
            m, v = _statistics(parts, mean.value)
            count = parts.size // v.size
            for running, current in ((mean, m), (var, v * (count / max(count - 1, 1)))):
                current = lax.stop_gradient(current.reshape(groups, -1).mean(0))
                running.value = (0.9 * running.value + 0.1 * current).astype(running.value.dtype)
        else:
            m, v = mean.value, var.value
        factor = lax.rsqrt(v + 1e-5)
        if self.affine:
            factor = factor * self.param("scale", self.scale_init, features)
        shift = -m * factor
        if self.affine:
            shift = shift + self.param("bias", nn.initializers.zeros, features)
        return (parts * factor + shift).reshape(x.shape).astype(x.dtype)


def _split(x, groups):
    """[B, ..., C] -> [groups, B / groups, ..., C]."""
    if groups < 1 or len(x) % groups:
        allowed = ", ".join(str(n) for n in range(1, len(x) + 1) if len(x) % n == 0)
        raise UserError(
            f"config.method.bn_groups={groups}: does not divide the {len(x)} images that BatchNorm sees at a time "
            f"(config.train.batch, micro_batch or bn_group); allowed: {allowed}"
        )
    return x.reshape(groups, -1, *x.shape[1:])


def _statistics(parts, near):
    """Mean and biased variance of parts [groups, n, ..., C], each [groups, 1, ..., C].

    One pass over memory computes mean and mean square, both of the distance to `near` [C], so that their difference
    does not cancel if a channel's mean is far larger than its deviation.
    """
    axes = tuple(range(1, parts.ndim - 1))
    parts = parts - near
    m = parts.mean(axes, keepdims=True)
    v = jnp.square(parts).mean(axes, keepdims=True) - jnp.square(m)
    return m + near, jnp.maximum(v, 0.0)


def network(module: nn.Module) -> Network:
    """A flax module as a `Network`. Its __call__ takes (x, *, train, groups) and any further keywords."""

    draw = jax.jit(functools.partial(module.init, train=False))

    def init(rng, x):
        variables = draw(rng, x[:1])
        return variables["params"], variables.get("batch_stats", {})

    def apply(params, stats, x, *, train: bool, groups: int = 1, **kwargs) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": stats}
        mutable = ["batch_stats"] if train else []
        y, new = module.apply(variables, x, train=train, groups=groups, mutable=mutable, **kwargs)
        return y, new.get("batch_stats", {}) if train else stats

    return Network(init, apply)
