"""The layers that all networks are made of, and the conversion of a flax module to a `Network`.

Convolution, NHWC with HWIO kernels, is written in the formulation that is fastest on the machine at hand. Accelerators
always get `jax.lax.conv_general_dilated`. On a CPU, the gradient of a kernel is a product with patches (im2col), and
small or, on request, all convolutions are products of patches with the kernel as a matrix.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssl_jax.errors import UserError, unknown
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


def kept(rate: float, keys: jax.Array | None, block: int) -> jax.Array | None:
    """Drop path (https://arxiv.org/abs/1603.09382) of one block: the factors [B, 2] of its two branches, 0 with
    probability `rate` or 1 / (1 - rate). None, which changes nothing, for rate 0 and without keys [B]."""
    if keys is None or not rate:
        return None
    own = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, block), 1 - rate, (2,)))(keys)
    return own / (1 - rate)


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


# Heads: what sits on top of an encoder while it is trained. Float32, [B, D] -> [B, D'].

# PyTorch's default for a linear layer: weights and biases uniform in +-1 / sqrt(inputs).
uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


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
        x = x @ self.param("kernel", zeros if self.zero else uniform, (x.shape[-1], self.features))
        if self.bias:
            x = x + self.param("bias", zeros if self.zero else bias_init, (self.features,))
        return x


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU. With erf, where its rounding does no harm: on CPUs it takes half the time of Flax's erfc."""
    if jnp.finfo(x.dtype).bits < 32:
        return nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class MLP(nn.Module):
    sizes: tuple[int, ...]
    norm: bool
    bias: bool
    last_norm: Literal[None, "affine", "plain"]
    last_bias: bool
    gelu: bool

    @nn.compact
    def __call__(self, x, *, train: bool, groups: int = 1):
        *places, width = x.shape
        x = x.reshape(-1, width)  # as in a ViT's blocks
        for i, size in enumerate(self.sizes[:-1], 1):
            x = Linear(size, self.bias, name=f"linear{i}")(x)
            if self.norm:
                x = BatchNorm(name=f"bn{i}")(x, train=train, groups=groups)
            x = gelu(x) if self.gelu else nn.relu(x)
        n = len(self.sizes)
        x = Linear(self.sizes[-1], self.last_bias, name=f"linear{n}")(x)
        if self.last_norm:
            x = BatchNorm(affine=self.last_norm == "affine", name=f"bn{n}")(x, train=train, groups=groups)
        return x.reshape(*places, -1)


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


# Convolution, in several formulations.

# Bytes of patches that `_by_patches` and the gradient of a kernel multiply at a time: a chunk of images. They have to
# stay in the cache from being written to being multiplied.
CHUNK_BYTES = 2_400_000


def resolve_conv(how: str = "auto", backend: str | None = None) -> str:
    """The formulation that `config.model.conv` means, as `conv` takes it; a resolved one is returned as it is.

    It changes the last bits of a result, so a run records it.

    backend: the platform the program is compiled for, such as "tpu"; None for this machine's.
    """
    if how not in ("auto", "native", "patches", "lax"):
        raise unknown("config.model.conv", how, ("auto", "native", "patches"))
    if how == "lax" or backend not in (None, "cpu"):
        return "lax"
    return "patches" if how == "patches" and jax.default_backend() == "cpu" else "native"


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0, how: str = "native") -> jax.Array:
    """Convolution of x [B, H, W, C] with kernel [k, k, C, D] -> [B, H', W', D], padded by `padding` on all sides.

    how: what `resolve_conv` returned. They agree up to rounding.
      "native"   XLA's convolution; on a CPU, with a kernel's gradient that is several times faster than XLA's, and
                 patches for the shapes that XLA is slow at
      "patches"  on a CPU, products of patches with the kernel, for every shape
      "lax"      XLA's convolution and gradients, also when a CPU traces the program for another platform
    """
    k = kernel.shape[0]
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    if jax.default_backend() == "cpu" and how != "lax":
        if k == 1 and padding == 0:
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        # XLA 0.12 computes outputs of less than 8x8 at 70 to 80 GFLOP/s, and earlier ones of less than 4x4 at 2, where
        # products of patches reach 140 to 220.
        if how == "patches" or min(height, width) < 8:
            return _by_patches(x, kernel, stride, padding)
        return _native(x, kernel, stride, padding)
    return _lax(x, kernel, stride, padding)


_convolve = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _lax(x, kernel, stride, padding):
    return _convolve(x, kernel, (stride, stride), [(padding, padding)] * 2)


# On CPUs XLA computes a convolution and the gradient of its input well, but that of its kernel at 4 to 60 GFLOP/s where
# 50 to 110 are possible. In a loop (micro-batches) both gradients are slower still, as XLA does not put the axes of
# JAX's own gradients right there (https://github.com/jax-ml/jax/issues/12868). So both are written out here.
_native = jax.custom_vjp(_lax, nondiff_argnums=(2, 3))


def _native_forward(x, kernel, stride, padding):
    return _lax(x, kernel, stride, padding), (x, kernel)


def _native_backward(stride, padding, saved, dy):
    x, kernel = saved
    k = kernel.shape[0]
    # Rows and columns at the end of the padded x that no window reaches.
    unread = [n + 2 * padding - k - (out - 1) * stride for n, out in zip(x.shape[1:3], dy.shape[1:3], strict=True)]
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    pads = [(k - 1 - padding, k - 1 - padding + n) for n in unread]
    dx = _convolve(dy, flipped, (1, 1), pads, lhs_dilation=(stride, stride))
    return dx, _kernel_gradient(x, kernel, dy, stride, padding)


def _kernel_gradient(x, kernel, dy, stride, padding):
    """dy, transposed, times the patches of x, a chunk of images at a time. With the patches transposed instead, on the
    left, the product takes twice as long."""
    k, _, c, d = kernel.shape
    height, width = dy.shape[1:3]
    wide = jnp.promote_types(kernel.dtype, jnp.float32)  # summed in float32 also under bfloat16
    if (k, stride, padding) == (3, 1, 1) and height % 2 == width % 2 == 0 and c >= 48:
        return _winograd_gradient(x, dy, wide).astype(kernel.dtype)
    chunks = _patch_chunks(x, kernel, stride, padding, at_least=2)
    parts, dparts = _cut(x, chunks), _cut(dy, chunks)

    def step(i, total):
        patches = _patches(parts[:, i], k, stride, padding)
        return total + dparts[:, i].reshape(-1, d).T @ patches.reshape(-1, k * k * c)

    total = lax.fori_loop(0, chunks, step, jnp.zeros((d, k * k * c), wide))
    return total.reshape(d, k, k, c).transpose(1, 2, 3, 0).astype(kernel.dtype)


# Winograd's F(2x2, 3x3), https://arxiv.org/abs/1509.09308: a tile of 4x4 inputs meets 2x2 outputs in 16 products, where
# patches need 36, and tiles take 4 times the memory of x, not 9. It was 1.2 to 1.6 times as fast as patches.
_FROM_TILE = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def _winograd_gradient(x, dy, wide):
    """The gradient [3, 3, C, D] of a 3x3 kernel with stride 1 and padding 1, for x [B, H, W, C] with even H and W."""
    c, d = x.shape[-1], dy.shape[-1]
    chunks = _chunks(len(x), 4 * (x.size + dy.size) // len(x) * x.dtype.itemsize, limit=6_000_000)
    parts, dparts = _cut(x, chunks), _cut(dy, chunks)

    def step(i, total):
        pairs = zip(_input_tiles(parts[:, i]), _output_tiles(dparts[:, i]), strict=True)
        return total + jnp.stack([v.reshape(-1, d).T @ u.reshape(-1, c) for u, v in pairs])

    total = lax.fori_loop(0, chunks, step, jnp.zeros((16, d, c), wide)).reshape(4, 4, d, c)
    return jnp.einsum("ia,jb,ijdc->abcd", _FROM_TILE, _FROM_TILE, total)


def _input_tiles(x):
    """16 values of each tile of x, each [B, H / 2, W / 2, C]."""

    def combine(s):
        return s[0] - s[2], s[1] + s[2], s[2] - s[1], s[1] - s[3]

    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = combine([x[:, i : i + height - 1 : 2] for i in range(4)])
    return [tile for row in rows for tile in combine([row[:, :, j : j + width - 1 : 2] for j in range(4)])]


def _output_tiles(dy):
    """The same of the gradient with respect to the outputs."""

    def combine(even, odd):
        return even, even + odd, even - odd, -odd

    rows = combine(dy[:, ::2], dy[:, 1::2])
    return [tile for row in rows for tile in combine(row[:, :, ::2], row[:, :, 1::2])]


_native.defvjp(_native_forward, _native_backward)


def _out(size: int, k: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - k) // stride + 1


def _patches(x, k, stride, padding):
    """Patches [B, H', W', k * k * C] of x [B, H, W, C]."""
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = [slice(i, i + (height - 1) * stride + 1, stride) for i in range(k)]
    columns = [slice(i, i + (width - 1) * stride + 1, stride) for i in range(k)]
    return jnp.concatenate([x[:, row, column] for row in rows for column in columns], -1)


def _product(x, kernel, stride, padding):
    """The convolution as one matrix product."""
    k, _, c, d = kernel.shape
    return _patches(x, k, stride, padding) @ kernel.reshape(k * k * c, d)


def _chunks(images: int, bytes_per_image: int, at_least: int = 1, limit: int = 0) -> int:
    """The number of equal chunks of images into which the batch is cut, a divisor of the batch.

    at_least: images that a device has of a chunk, even if they take more than `limit` bytes (0: CHUNK_BYTES).
    """
    # With several devices the batch is split over them, and so is each chunk.
    most = max(at_least, (limit or CHUNK_BYTES) // bytes_per_image) * jax.device_count()
    return next(n for n in range(-(-images // most), images + 1) if images % n == 0)


def _patch_chunks(x, kernel, stride, padding, at_least: int = 1) -> int:
    k, _, c, _ = kernel.shape
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    return _chunks(len(x), height * width * k * k * c * x.dtype.itemsize, at_least)


def _cut(x, chunks):
    """[B, ...] -> [B / chunks, chunks, ...]. Chunks are the second axis, so that a split over devices is preserved."""
    return x.reshape(len(x) // chunks, chunks, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_patches(x, kernel, stride, padding):
    chunks = _patch_chunks(x, kernel, stride, padding)
    if chunks == 1:
        return _product(x, kernel, stride, padding)
    parts = _cut(x, chunks)

    def step(i, y):
        return y.at[:, i].set(_product(parts[:, i], kernel, stride, padding))

    one = jax.eval_shape(lambda: _product(parts[:, 0], kernel, stride, padding))
    y = lax.fori_loop(0, chunks, step, jnp.zeros((one.shape[0], chunks, *one.shape[1:]), one.dtype))
    return y.reshape(len(x), *one.shape[1:])


def _forward(x, kernel, stride, padding):
    return _by_patches(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, saved, dy):
    """Both gradients in one loop that recomputes the patches: storing them would take k * k times the memory of x."""
    x, kernel = saved
    pull = _pull_stride_1 if stride == 1 else _pull
    chunks = _patch_chunks(x, kernel, stride, padding)
    parts, dparts = _cut(x, chunks), _cut(dy, chunks)

    def step(i, carry):
        dx, dkernel = carry
        dx_i, dkernel_i = pull(parts[:, i], kernel, dparts[:, i], stride, padding)
        return dx.at[:, i].set(dx_i), dkernel + dkernel_i

    wide = jnp.promote_types(kernel.dtype, jnp.float32)  # summed in float32 also under bfloat16
    start = jnp.zeros_like(parts), jnp.zeros(kernel.shape, wide)
    dx, dkernel = lax.fori_loop(0, chunks, step, start)
    return dx.reshape(x.shape), dkernel.astype(kernel.dtype)


def _pull(x, kernel, dy, stride, padding):
    """Gradients with respect to x and the kernel."""
    return jax.vjp(lambda x, kernel: _product(x, kernel, stride, padding), x, kernel)[1](dy)


def _pull_stride_1(x, kernel, dy, stride, padding):
    """The same, both from the patches of dy: their product with the kernel is the gradient of x, with x that of the
    kernel."""
    k, _, c, d = kernel.shape
    patches = _patches(dy, k, stride, k - 1 - padding)
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    dx = patches @ flipped.reshape(k * k * d, c)
    dkernel = jnp.einsum("bhwc,bhwp->cp", x, patches).reshape(c, k, k, d)
    return dx, dkernel.transpose(1, 2, 0, 3)[::-1, ::-1]


_by_patches.defvjp(_forward, _backward)
