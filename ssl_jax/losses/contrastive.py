"""Losses that pull positives together and push negatives apart.

A large matrix of all similarities is never materialised (`log_sum_exp`): memory grows with B, not B².
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def nt_xent(z_a: jax.Array, z_b: jax.Array, *, temperature: float) -> jax.Array:
    """Normalised temperature-scaled cross-entropy of SimCLR over all 2B views.

    Each view must find its partner among the 2B - 1 others: mean_i of -log softmax_{j != i}(z_i . z_j / T)_{partner(i)}

    Args:
      z_a, z_b: [B, D] projections of the two views, normalised here.
      temperature: T > 0.

    Source: SimCLR, equation 1, https://arxiv.org/abs/2002.05709. The official code adds the means of the two halves,
    twice this value.

    >>> round(float(nt_xent(jnp.ones((4, 8)), jnp.ones((4, 8)), temperature=0.5)), 4)  # collapsed: log(2B - 1)
    1.9459
    """
    z_a, z_b = normalize(z_a), normalize(z_b)
    z = interleave([z_a, z_b])
    return log_sum_exp(z / temperature, z, skip_own=True).mean() - jnp.sum(z_a * z_b, axis=-1).mean() / temperature


def info_nce(
    query: jax.Array, key: jax.Array, negatives: jax.Array, own: jax.Array | None = None, *, temperature: float
) -> jax.Array:
    """InfoNCE with explicit negatives: mean of -log softmax([q . k, q . negatives, q . own] / T)_0.

    Args:
      query: [B, D], normalised here.
      key: [B, D] the positive of each query, normalised here; pass it through stop_gradient if it is a target.
      negatives: [K, D] shared by all queries (MoCo's queue), normalised here.
      own: [B, M, D] further negatives of each query alone (LooC's other keys of its image), normalised here.
      temperature: T > 0.

    Source: MoCo, equation 1, https://arxiv.org/abs/1911.05722; InfoNCE from https://arxiv.org/abs/1807.03748.

    >>> one = jnp.ones((2, 3))
    >>> round(float(info_nce(one, one, jnp.ones((7, 3)), temperature=0.1)), 4)  # collapsed: log(1 + K)
    2.0794
    """
    near = similarities(query, key, negatives[:0], own) / temperature  # [B, 1 + M]
    far = log_sum_exp(normalize(query) / temperature, normalize(negatives))
    return (jnp.logaddexp(jax.nn.logsumexp(near, axis=1), far) - near[:, 0]).mean()


def similarities(query: jax.Array, key: jax.Array, negatives: jax.Array, own: jax.Array | None = None) -> jax.Array:
    """Cosines [B, 1 + K + M] of each query with its key, with the K negatives and with its own M (see `info_nce`)."""
    query = normalize(query)
    others = [] if own is None else [jnp.einsum("bd,bmd->bm", query, normalize(own))]
    positive = jnp.sum(query * normalize(key), axis=-1, keepdims=True)
    return jnp.concatenate([positive, query @ normalize(negatives).T, *others], axis=1)


def indexed_info_nce(
    query: jax.Array, keys: jax.Array, index: jax.Array | None = None, *, temperature: float
) -> jax.Array:
    """InfoNCE in which all queries share one set of keys: mean of -log softmax(q . keys / T)_index.

    Args:
      query: [B, D], normalised here.
      keys: [K, D], normalised here.
      index: [B], the positive key of each query; None: key i for query i.
      temperature: T > 0.

    Source: instance discrimination, equation 2 (keys: a memory bank), https://arxiv.org/abs/1805.01978; NNCLR,
    equation 4 (keys: the predictions of the batch), https://arxiv.org/abs/2104.14548.

    >>> round(float(indexed_info_nce(jnp.ones((2, 3)), jnp.ones((8, 3)), jnp.array([0, 5]), temperature=0.1)), 4)
    2.0794
    """
    query, keys = normalize(query) / temperature, normalize(keys)
    positive = keys if index is None else keys[index]
    return (log_sum_exp(query, keys) - jnp.sum(query * positive, axis=-1)).mean()


def nce(
    query: jax.Array,
    positive: jax.Array,
    noise: jax.Array,
    *,
    normalizer: jax.Array | float,
    examples: int,
    temperature: float,
) -> jax.Array:
    """Noise-contrastive estimation: is a row of the bank the query's image, or one of K drawn uniformly from N?

    Mean of -log h(positive) - sum_k log(1 - h(noise_k)), with h(v) = P / (P + K / N) and P = exp(q . v / T) / Z.

    Args:
      query: [B, D], normalised here.
      positive: [B, D], rows of the bank, not normalised here.
      noise: [K, D], rows of the bank, not normalised here, shared by all queries.
      normalizer: Z, a constant, from `nce_normalizer`.
      examples: N, rows in the bank.
      temperature: T > 0.

    Source: instance discrimination, equations 4 to 7, https://arxiv.org/abs/1805.01978;
    zhirongw/lemniscate.pytorch, lib/NCECriterion.py, which draws K for each query and adds 1e-7 to the denominators.

    >>> one = jnp.ones((2, 1))
    >>> z = nce_normalizer(one, one, jnp.ones((1, 1)), examples=5, temperature=0.1)  # h = (1 / 5) / (1 / 5 + 1 / 5)
    >>> round(float(nce(one, one, jnp.ones((1, 1)), normalizer=z, examples=5, temperature=0.1)), 4)  # 2 log 2
    1.3863
    """
    query = normalize(query)
    # log P - log(K / N), whose sigmoid is h, needs neither exp(1 / T) nor a division.
    shift = jnp.log(normalizer) + jnp.log(len(noise) / examples)
    to_positive = jnp.sum(query * positive, axis=-1) / temperature - shift
    to_noise = query @ noise.T / temperature - shift
    return (jax.nn.softplus(-to_positive) + jax.nn.softplus(to_noise).sum(axis=1)).mean()


def nce_normalizer(
    query: jax.Array, positive: jax.Array, noise: jax.Array, *, examples: int, temperature: float
) -> jax.Array:
    """The estimate of Z in `nce`, with the same arguments: N times the mean of exp(q . v / T) over the batch.

    Source: instance discrimination, equation 8, https://arxiv.org/abs/1805.01978; lemniscate.pytorch,
    lib/NCEAverage.py, which includes the positives too.
    """
    query = normalize(query)
    cosines = jnp.concatenate([jnp.sum(query * positive, axis=-1, keepdims=True), query @ noise.T], axis=1)
    return examples * jnp.exp(cosines / temperature).mean()


def triplet(anchor: jax.Array, positive: jax.Array, negative: jax.Array, *, margin: float) -> jax.Array:
    """Triplet loss: mean of max(0, |a - p| - |a - n| + margin), Euclidean; inputs are not normalised.

    Args:
      anchor, positive, negative: [B, D].
      margin: how much farther away the negative should be, in units of the distance.

    Source: FaceNet, https://arxiv.org/abs/1503.03832, with the plain distance of torch.nn.TripletMarginLoss, which
    adds 1e-6 to each difference so that the gradient exists at distance 0.

    >>> a = jnp.array([[0.0, 0.0]])
    >>> round(float(triplet(a, a, jnp.array([[3.0, 4.0]]), margin=6.0)), 3)
    1.0
    """

    def distance(x, y):
        return jnp.linalg.norm(x - y + 1e-6, axis=-1)

    return jnp.maximum(0, distance(anchor, positive) - distance(anchor, negative) + margin).mean()


def in_batch_info_nce(query: jax.Array, key: jax.Array, *, temperature: float) -> jax.Array:
    """InfoNCE within the batch: query i must find key i among all keys, mean of -log softmax(q . keys / T)_i.

    Args:
      query: [B, D], normalised here.
      key: [B, D], normalised here; gets no gradient.
      temperature: T > 0.

    Source: MoCo v3, algorithm 1, https://arxiv.org/abs/2104.02057, which multiplies it by 2 T.

    >>> one = jnp.ones((4, 3))
    >>> round(float(in_batch_info_nce(one, one, temperature=0.2)), 4)  # collapsed: log(B)
    1.3863
    """
    return indexed_info_nce(query, jax.lax.stop_gradient(key), temperature=temperature)


def sup_con(z_a: jax.Array, z_b: jax.Array, label: jax.Array, *, temperature: float) -> jax.Array:
    """Supervised contrastive: mean over all 2B views i of -mean_p log softmax_{j != i}(z_i . z_j / T)_p.

    The positives p are all other views of the class of i; the other view of the same image is always one.

    Args:
      z_a, z_b: [B, D] projections of the two views, normalised here.
      label: [B], -1 where unknown: such an image is a class of its own.
      temperature: T > 0.

    Source: SupCon, equation 2, https://arxiv.org/abs/2004.11362. The official code multiplies by T / 0.07; not here.

    >>> round(float(sup_con(jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.zeros(4, int), temperature=0.5)), 4)  # log(2B - 1)
    1.9459
    """
    z = normalize(interleave([z_a, z_b]))
    own = jnp.where(label >= 0, label, -1 - jnp.arange(len(label)))
    group = interleave([own, own])
    # The mean product with a view's positives is the product with the mean of its class, the view itself excluded.
    _, number = jnp.unique(group, return_inverse=True, size=len(group))
    total = jax.ops.segment_sum(z, number, len(group))[number] - z
    count = jnp.bincount(number, length=len(group))[number] - 1
    positives = jnp.sum(z * total, axis=-1) / count
    return log_sum_exp(z / temperature, z, skip_own=True).mean() - positives.mean() / temperature


# What other losses share as well.

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
