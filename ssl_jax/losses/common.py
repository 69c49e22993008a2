"""Functions that several losses share."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

DENSE_UP_TO = 2**22  # similarities held at once: 16 MB in float32


def normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Unit vectors x / max(|x|, epsilon) over the last axis; the gradient at x = 0 is finite.

    >>> [round(v, 4) for v in normalize(jnp.array([3.0, 4.0])).tolist()]
    [0.6, 0.8]
    """
    # rsqrt of a clamped square, not a clamped norm: the derivative of the norm itself is infinite at zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon**2))


def interleave(views: Sequence[jax.Array]) -> jax.Array:
    """V arrays [B, ...] as one, [B * V, ...], in which the views of an image are neighbours.

    Concatenating the views would be the more obvious order. But if the batch is split over devices, half of all images
    would then move to another device.

    >>> interleave([jnp.array([1, 2]), jnp.array([10, 20])]).tolist()
    [1, 10, 2, 20]
    """
    return jnp.stack(list(views), axis=1).reshape(-1, *views[0].shape[1:])


def log_sum_exp(query: jax.Array, keys: jax.Array, *, skip_own: bool = False, chunk: int = 0) -> jax.Array:
    """Log sum_j exp(query_i . keys_j), [N] of query [N, D] and keys [K, D], without the N x K matrix if that is large.

    skip_own: leave out j = i, for keys that are the queries themselves.
    chunk: keys compared at a time; 0: all if N x K is at most DENSE_UP_TO, else DENSE_UP_TO / N, but at least 128.

    In chunks, forward and gradient need memory for N x D + N x chunk numbers: the sum is carried along with the largest
    exponent so far, and the gradient recomputes each chunk of the softmax.

    >>> [round(float(v), 4) for v in log_sum_exp(jnp.zeros((2, 3)), jnp.ones((5, 3)), chunk=2)]  # log 5
    [1.6094, 1.6094]
    """
    if not chunk:
        few = len(query) * len(keys) <= DENSE_UP_TO
        chunk = len(keys) if few else max(128, DENSE_UP_TO // len(query))
    if chunk >= len(keys):
        return jax.nn.logsumexp(_products(query, keys, 0, len(keys), skip_own), axis=1)
    return _streamed(query, keys, skip_own, chunk)


def _products(query, block, start, count, skip_own):
    """Products [N, c] of query and block; a huge negative number for padding and, if skipped, the query itself."""
    column = start + jnp.arange(len(block))
    valid = (column < count)[None]
    if skip_own:
        valid &= column[None] != jnp.arange(len(query))[:, None]
    # Not -inf: if a row's first chunk held nothing else, its difference to itself would be nan.
    return jnp.where(valid, query @ block.T, jnp.finfo(query.dtype).min / 2)


def _blocks(keys, chunk):
    """(first number, keys [c, D]) of each chunk, the last one padded."""
    count = -(-len(keys) // chunk)
    padded = jnp.pad(keys, ((0, count * chunk - len(keys)), (0, 0)))
    return jnp.arange(count) * chunk, padded.reshape(count, chunk, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _streamed(query, keys, skip_own, chunk):
    def add(carry, block):
        largest, total = carry
        products = _products(query, block[1], block[0], len(keys), skip_own)
        new = jnp.maximum(largest, products.max(axis=1))
        return (new, total * jnp.exp(largest - new) + jnp.exp(products - new[:, None]).sum(axis=1)), None

    start = jnp.full(len(query), jnp.finfo(query.dtype).min / 2), jnp.zeros(len(query), query.dtype)
    (largest, total), _ = jax.lax.scan(add, start, _blocks(keys, chunk))
    return largest + jnp.log(total)


def _streamed_forward(query, keys, skip_own, chunk):
    result = _streamed(query, keys, skip_own, chunk)
    return result, (query, keys, result)


def _streamed_backward(skip_own, chunk, saved, cotangent):
    query, keys, result = saved

    def add(grad_query, block):
        products = _products(query, block[1], block[0], len(keys), skip_own)
        softmax = jnp.exp(products - result[:, None]) * cotangent[:, None]
        return grad_query + softmax @ block[1], softmax.T @ query

    grad_query, grad_keys = jax.lax.scan(add, jnp.zeros_like(query), _blocks(keys, chunk))
    return grad_query, grad_keys.reshape(-1, keys.shape[1])[: len(keys)]


_streamed.defvjp(_streamed_forward, _streamed_backward)
