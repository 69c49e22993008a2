"""Convolution, NHWC with HWIO kernels, in the formulation that is fastest on this machine.

Accelerators always use `jax.lax.conv_general_dilated`. On a CPU, XLA's own convolution reaches 10 to 60 % of the speed
of its matrix product, so a convolution can also be written as patches (im2col) times the kernel as a matrix.
"""

import functools
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.errors import unknown

# Patches of one chunk of images, in bytes. They have to stay in the cache from being written to being multiplied.
# Forward and both gradients of a 3x3 convolution, 14x14, 24 channels, 512 images, 2 cores with 32 MB of level-3 cache:
# 32 ms with 1 to 5 MB, 77 ms with 10 MB, 119 ms with 20 MB; natively 53 ms.
CHUNK_BYTES = 3_000_000
CPU_INFO = Path("/proc/cpuinfo")


def resolve_conv(how: str = "auto", in_loop: bool = False, backend: str | None = None) -> str:
    """The formulation that `config.model.conv` means, as `conv` takes it; a resolved one is returned as it is.

    It changes the last bits of a result, so a run records it.

    in_loop: the program runs it inside a loop; on a CPU "native" is then "looped".
    backend: the platform the program is compiled for, such as "tpu"; None for this machine's.
    """
    if how in ("lax", "looped"):
        return how
    if how not in ("auto", "native", "patches"):
        raise unknown("config.model.conv", how, ("auto", "native", "patches"))
    if backend not in (None, "cpu"):
        return "lax"
    if jax.default_backend() != "cpu":
        return "native"
    if how == "auto":
        how = "native" if _native_is_fast() else "patches"
    return "looped" if in_loop and how == "native" else how


def _native_is_fast() -> bool:
    """Whether the processor has AVX-512. Where that is unknown (macOS), XLA's own convolution is used."""
    if platform.machine() not in ("x86_64", "AMD64") or not CPU_INFO.exists():
        return True
    return "avx512f" in CPU_INFO.read_text()


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0, how: str = "native") -> jax.Array:
    """Convolution of x [B, H, W, C] with kernel [k, k, C, D] -> [B, H', W', D], padded by `padding` on all sides.

    how: what `resolve_conv` returned. They agree up to rounding.
      "native"   XLA's convolution, but on a CPU patches for the shapes that XLA is slow at
      "looped"   the same, with gradients that are fast inside a loop on a CPU
      "patches"  on a CPU patches for every shape
      "lax"      XLA's convolution for every shape, also when a CPU traces the program for another platform
    """
    k = kernel.shape[0]
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    if jax.default_backend() == "cpu" and how != "lax":
        if k == 1 and padding == 0:
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        # Natively, 16 to 127 channels run on one thread. Forward and both gradients on 2 cores with AVX-512, native
        # versus patches: 512 images of 14x14, 24 channels: 53 and 30 ms; 7x7, 48 channels: 40 and 24; 4x4, 96 channels:
        # 39 and 28; 64 images of 32x32, 64 channels: 180 and 107. A stem's few channels and 128 or more: about equal.
        # Outputs under 4x4: 2 GFLOP/s natively, 80 to 140 with patches.
        if how == "patches" or min(height, width) < 4 or 16 <= x.shape[-1] < 128:
            return _by_patches(x, kernel, stride, padding)
        if how == "looped":
            return _looped(x, kernel, stride, padding)
    return _native(x, kernel, stride, padding)


_convolve = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _native(x, kernel, stride, padding):
    return _convolve(x, kernel, (stride, stride), [(padding, padding)] * 2)


# For the body of a loop on a CPU: gradients with explicit transposes. JAX's own have their axes in another order, which
# XLA corrects, but not in a loop: there it falls back to a convolution more than 13 times slower
# (https://github.com/jax-ml/jax/issues/12868). Outside of loops JAX's own are better: under `vmap` (train.bn_group)
# these compute the kernel's gradient once per group.
_looped = jax.custom_vjp(_native, nondiff_argnums=(2, 3))


def _looped_forward(x, kernel, stride, padding):
    return _native(x, kernel, stride, padding), (x, kernel)


def _looped_backward(stride, padding, saved, dy):
    x, kernel = saved
    k, dilation = kernel.shape[0], (stride, stride)
    # Rows and columns at the end of the padded x that no window reaches.
    unread = [n + 2 * padding - k - (out - 1) * stride for n, out in zip(x.shape[1:3], dy.shape[1:3], strict=True)]
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    pads = [(k - 1 - padding, k - 1 - padding + n) for n in unread]
    dx = _convolve(dy, flipped, (1, 1), pads, lhs_dilation=dilation)
    pads = [(padding, padding - n) for n in unread]
    dkernel = _convolve(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), pads, rhs_dilation=dilation)
    return dx, dkernel.transpose(1, 2, 0, 3)


_looped.defvjp(_looped_forward, _looped_backward)


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


def _chunks(x, kernel, stride, padding) -> int:
    """The number of equal chunks of images into which the batch is cut, a divisor of the batch."""
    k, _, c, _ = kernel.shape
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    bytes_per_image = height * width * k * k * c * x.dtype.itemsize
    # With several devices the batch is split over them, and so is each chunk.
    limit = max(1, CHUNK_BYTES * jax.device_count() // bytes_per_image)
    return next(n for n in range(-(-len(x) // limit), len(x) + 1) if len(x) % n == 0)


def _cut(x, chunks):
    """[B, ...] -> [B / chunks, chunks, ...]. Chunks are the second axis, so that a split over devices is preserved."""
    return x.reshape(len(x) // chunks, chunks, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_patches(x, kernel, stride, padding):
    chunks = _chunks(x, kernel, stride, padding)
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
    chunks = _chunks(x, kernel, stride, padding)
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
