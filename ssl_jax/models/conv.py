"""Convolution, NHWC with HWIO kernels, in the formulation that is fastest on the machine at hand.

Accelerators always get `jax.lax.conv_general_dilated`. On a CPU, XLA's own convolution is at 10 to 60 % of the speed of
its matrix product, so there a convolution can also be written as patches (im2col) times the kernel as a matrix.
"""

import functools
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.errors import unknown

# Patches of one chunk of images, in bytes: they have to stay in the cache between being written and being multiplied.
# Forward and both gradients of a 3x3 convolution, 14x14, 24 channels, 512 images, 2 cores with 32 MB of level-3 cache:
# 32 ms with 1 to 5 MB, 77 ms with 10 MB, 119 ms with 20 MB; natively 53 ms.
CHUNK_BYTES = 3_000_000


def resolve_conv(how: str = "auto") -> str:
    """The formulation that `config.model.conv` means on this machine: "native" or "patches".

    It changes the last bits of a result, so a run records it.
    """
    if how not in ("auto", "native", "patches"):
        raise unknown("config.model.conv", how, ("auto", "native", "patches"))
    if jax.default_backend() != "cpu":
        return "native"
    if how != "auto":
        return how
    return "native" if _has_avx512() else "patches"


@functools.cache
def _has_avx512() -> bool:
    """Whether XLA's own convolution is fast here; where nothing is known about the processor, we trust it."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        return True
    return "avx512f" in info.read_text()


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0, how: str = "native") -> jax.Array:
    """Convolution of x [B, H, W, C] with kernel [k, k, C, D] -> [B, H', W', D], padded by `padding` on all sides.

    how: what `resolve_conv` returned. "native" still means patches for the shapes that XLA's CPU
    convolution is slow at.
    """
    k = kernel.shape[0]
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    if jax.default_backend() == "cpu":
        if k == 1 and padding == 0:
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        # On AVX-512 native is the faster one for a stem's 1 to 4 channels (6 ms against 9 ms, 28x28x1 to 24 channels,
        # 512 images) and about equal from 128 channels on; in between it takes 1.4 to 1.8 times as long as patches.
        # Outputs under 4x4 run natively at 2 GFLOP/s, patches at 80 to 140.
        if how == "patches" or min(height, width) < 4 or 16 <= x.shape[-1] < 128:
            return _by_patches(x, kernel, stride, padding)
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _out(size: int, k: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - k) // stride + 1


def _patches(x, k, stride, padding):
    """Patches [B, H', W', k * k * C] of x [B, H, W, C]."""
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    # One gather: XLA's CPU code for it is 2 to 10 times as fast as for a concatenation of k * k slices.
    image = jnp.arange(len(x))[:, None, None, None, None]
    row = stride * jnp.arange(height)[:, None, None, None] + jnp.arange(k)[:, None]
    column = stride * jnp.arange(width)[:, None, None] + jnp.arange(k)
    return x.at[image, row, column].get(mode="promise_in_bounds").reshape(len(x), height, width, -1)


def _overlap_add(patches, k, stride, padding, shape):
    """The transpose of `_patches`: patches [B, H', W', k * k * C] added up where they lay in an x of that shape."""
    _, height, width, _ = patches.shape
    patches = patches.reshape(*patches.shape[:3], k, k, -1)
    total = 0.0
    for i in range(k):
        for j in range(k):
            rows = (i - padding, shape[1] + padding - i - (height - 1) * stride - 1, stride - 1)
            columns = (j - padding, shape[2] + padding - j - (width - 1) * stride - 1, stride - 1)
            total += lax.pad(patches[..., i, j, :], jnp.zeros((), patches.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))
    return total


def _product(x, kernel, stride, padding):
    """The convolution as one matrix product."""
    k, _, c, d = kernel.shape
    return _patches(x, k, stride, padding) @ kernel.reshape(k * k * c, d)


def _chunks(x, kernel, stride, padding) -> int:
    """Into how many equal chunks of images to cut the batch: a divisor of it."""
    k, _, c, _ = kernel.shape
    height, width = (_out(n, k, stride, padding) for n in x.shape[1:3])
    bytes_per_image = height * width * k * k * c * x.dtype.itemsize
    # With several devices the batch is split over them, and so is each chunk.
    most = max(1, CHUNK_BYTES * jax.device_count() // bytes_per_image)
    return next(n for n in range(-(-len(x) // most), len(x) + 1) if len(x) % n == 0)


def _cut(x, chunks):
    """[B, ...] -> [B / chunks, chunks, ...]. Chunks are the second axis, so that a split over devices stays one."""
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
    """Both gradients in one loop over patches made anew: keeping them would take k * k times the memory of x."""
    x, kernel = saved
    pull = _pull_stride_1 if stride == 1 else _pull
    chunks = _chunks(x, kernel, stride, padding)
    parts, dparts = _cut(x, chunks), _cut(dy, chunks)

    def step(i, carry):
        dx, dkernel = carry
        dx_i, dkernel_i = pull(parts[:, i], kernel, dparts[:, i], stride, padding)
        return dx.at[:, i].set(dx_i), dkernel + dkernel_i

    dx, dkernel = lax.fori_loop(0, chunks, step, (jnp.zeros_like(parts), jnp.zeros_like(kernel)))
    return dx.reshape(x.shape), dkernel


def _pull(x, kernel, dy, stride, padding):
    """Gradients with respect to x and the kernel."""
    k, _, c, d = kernel.shape
    dpatches = dy @ kernel.reshape(k * k * c, d).T
    dkernel = jnp.einsum("bhwp,bhwd->pd", _patches(x, k, stride, padding), dy)
    return _overlap_add(dpatches, k, stride, padding, x.shape), dkernel.reshape(kernel.shape)


def _pull_stride_1(x, kernel, dy, stride, padding):
    """Both gradients from the patches of dy: x's is a convolution of dy, the kernel's a product of x with them."""
    k, _, c, d = kernel.shape
    patches = _patches(dy, k, stride, k - 1 - padding)
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    dx = patches @ turned.reshape(k * k * d, c)
    dkernel = jnp.einsum("bhwc,bhwp->cp", x, patches).reshape(c, k, k, d)
    return dx, dkernel.transpose(1, 2, 0, 3)[::-1, ::-1]


_by_patches.defvjp(_forward, _backward)
