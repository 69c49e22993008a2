"""Losses that prevent collapse by statistics of the batch: variances and covariances."""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from ssl_jax.losses.contrastive import normalize


def barlow_twins(z_a: jax.Array, z_b: jax.Array, *, off_diagonal: float) -> jax.Array:
    """Sum_i (c_ii - 1)^2 + off_diagonal * sum_{i != j} c_ij^2, with c the cross-correlation of the two views.

    Args:
      z_a, z_b: [B, D] projections; each dimension is normalised over the batch here (biased variance + 1e-5).
      off_diagonal: lambda, the weight of redundancy.

    Source: Barlow Twins, equations 1 and 2, https://arxiv.org/abs/2103.03230; facebookresearch/barlowtwins, main.py.

    >>> z = jnp.array([[1.0, 1.0], [-1.0, -1.0]])  # one dimension twice: two elements off the diagonal are 1
    >>> round(float(barlow_twins(z, z, off_diagonal=0.5)), 3)
    1.0
    """

    @jax.checkpoint  # the gradient recomputes the intermediate values, which take 64 MB each at 2,048 x 8,192
    def standardize(z):
        centred = z - z.mean(axis=0)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=0) + 1e-5)

    a, b = standardize(z_a), standardize(z_b)
    diagonal = (a * b).mean(axis=0)
    return jnp.sum(jnp.square(diagonal - 1)) + off_diagonal * _off_diagonal_squares(a, b) / len(a) ** 2


def vicreg(z_a: jax.Array, z_b: jax.Array, *, invariance: float, variance: float, covariance: float) -> jax.Array:
    """The weighted sum of the mean square of a - b, the mean of both variance terms, and both covariance terms.

    Args:
      z_a, z_b: [B, D] projections, B > 1. For maps [B, P, D], variance and covariance are computed at each of the P
        places and averaged.
      invariance, variance, covariance: the three weights.

    See `variance_term` and `covariance_term`. Source: VICReg, equations 1 to 6, https://arxiv.org/abs/2105.04906;
    facebookresearch/vicreg, main_vicreg.py.

    >>> z = jnp.array([[1.0, 1.0], [-1.0, -1.0]])  # variance 2 in both dimensions, covariance 2
    >>> round(float(vicreg(z, z, invariance=25.0, variance=25.0, covariance=1.0)), 3)
    8.0
    """
    return (
        invariance * jnp.square(z_a - z_b).mean()
        + variance * (variance_term(z_a) + variance_term(z_b)) / 2
        + covariance * (covariance_term(z_a) + covariance_term(z_b))
    )


def variance_term(z: jax.Array) -> jax.Array:
    """VICReg's hinge on z [B, ..., D]: mean of max(0, 1 - sqrt(v + 1e-4)), v the unbiased variance over the batch.

    Source: VICReg, equations 1 and 2, https://arxiv.org/abs/2105.04906.

    >>> round(float(variance_term(jnp.ones((4, 3)))), 4)  # collapsed
    0.99
    """
    return jax.nn.relu(1 - jnp.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean()


def covariance_term(z: jax.Array) -> jax.Array:
    """VICReg's redundancy of z [B, ..., D]: sum_{i != j} C_ij^2 / D, C the unbiased covariance; the mean over places.

    Source: VICReg, equations 3 and 4, https://arxiv.org/abs/2105.04906.

    >>> float(covariance_term(jnp.array([[1.0, 1.0], [-1.0, -1.0]])))  # both covariances are 2
    4.0
    """
    centred = z - z.mean(axis=0)
    return _off_diagonal_squares(centred, centred).mean() / (len(z) - 1) ** 2 / z.shape[-1]


def _off_diagonal_squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum_{i != j} (a'b)_ij^2 of a, b [B, ..., D], for each place.

    If D > B, the [D, D] products are avoided: the squares of a'b sum to the elements of aa' times bb', each [B, B].
    """
    if a.shape[-1] > len(a):
        gram_a, gram_b = (_gram(x) for x in (a, b))
        diagonal = jnp.sum(a * b, axis=0)
        return jnp.sum(gram_a * gram_b, axis=(-2, -1)) - jnp.sum(jnp.square(diagonal), axis=-1)
    products = jnp.einsum("b...i,b...j->...ij", a, b)
    return jnp.sum(jnp.square(products) * (1 - jnp.eye(a.shape[-1], dtype=a.dtype)), axis=(-2, -1))


@jax.custom_vjp
def _gram(x: jax.Array) -> jax.Array:
    """Products of all pairs of images, [..., B, B] of x [B, ..., D]."""
    return jnp.einsum("b...i,c...i->...bc", x, x)


def _gram_backward(x, cotangent):
    # One product instead of the two (one per factor) of automatic differentiation: half the time and memory.
    return (jnp.einsum("...bc,c...i->b...i", cotangent + jnp.swapaxes(cotangent, -2, -1), x),)


_gram.defvjp(lambda x: (_gram(x), x), _gram_backward)


def vicregl(
    z: Sequence[jax.Array],
    maps: Sequence[jax.Array],
    positions: Sequence[jax.Array],
    *,
    alpha: float,
    matches: tuple[int, ...],
    invariance: float,
    variance: float,
    covariance: float,
) -> jax.Array:
    """Weighted sum alpha * global + (1 - alpha) * local: VICReg of embeddings and of matching places in feature maps.

    Pairs are (i, j != i) with i one of the first two views. Global: the mean squared difference over pairs, and the
    mean variance and covariance terms over views. Local: the mean over pairs and both directions of two VICReg losses,
    added, with half the covariance weight. The first matches every place with its nearest place in feature space, the
    second the `matches` places with the smallest distance in the image with their nearest place there.

    Args:
      z: V arrays [B, D], V > 1.
      maps: V arrays [B, P, D'] of projected places; P may differ between views.
      positions: V arrays [B, P, 2], the position of each place in the image, px.
      alpha: weight of the global part.
      matches: number of places matched by position, in the first two views and in the others (all if there are fewer).
      invariance, variance, covariance: the weights of VICReg.

    Source: VICRegL, section 3, https://arxiv.org/abs/2210.01571; facebookresearch/VICRegL, main_vicregl.py, which also
    takes the mean over pairs. It uses matches[0] from the first view of a pair to the second and matches[1] back, even
    between the first two views; the numbers here follow the paper.

    >>> one = jnp.ones((2, 3))  # collapsed: only the variance is left, 1 - 0.01, global once and local twice
    >>> p, m = jnp.zeros((2, 4, 2)), jnp.ones((2, 4, 3))
    >>> weights = {"invariance": 25.0, "variance": 1.0, "covariance": 1.0}
    >>> round(float(vicregl([one, one], [m, m], [p, p], alpha=0.75, matches=(2, 1), **weights)), 4)
    1.2375
    """
    pairs = [(i, j) for i in range(2) for j in range(len(z)) if i != j]
    global_loss = (
        invariance * _mean(jnp.square(z[i] - z[j]).mean() for i, j in pairs)
        + variance * _mean(map(variance_term, z))
        + covariance * _mean(map(covariance_term, z))
    )

    @functools.cache
    def one_way(i, j):
        weights = {"invariance": invariance, "variance": variance, "covariance": covariance / 2}
        by_feature = vicreg(maps[i], _take(maps[j], _nearest(maps[i], maps[j])[0]), **weights)
        nearest, distance = _nearest(positions[i], positions[j])
        # The closest matches, in the order of the map.
        closest = jnp.sort(jnp.argsort(distance, axis=1)[:, : matches[i > 1]], axis=1)
        matched = _take(maps[j], jnp.take_along_axis(nearest, closest, axis=1))
        return by_feature + vicreg(_take(maps[i], closest), matched, **weights)

    local_loss = _mean((one_way(i, j) + one_way(j, i)) / 2 for i, j in pairs)
    return alpha * global_loss + (1 - alpha) * local_loss


def _mean(terms: Iterable[jax.Array]) -> jax.Array:
    return jnp.stack(list(terms)).mean()


def _nearest(a, b):
    """For each of a [B, P, D] the index of its nearest in b [B, Q, D] and their squared distance, both [B, P]."""
    squares = jnp.square(jax.lax.stop_gradient(a[:, :, None] - b[:, None])).sum(axis=-1)
    return squares.argmin(axis=2), squares.min(axis=2)


def _take(x, index):
    """The places of x [B, P, D] at index [B, N]."""
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


def tico(z: jax.Array, target: jax.Array, covariance: jax.Array, *, beta: float, rho: float) -> jax.Array:
    """1 - mean z . target + rho * mean z' M z, with z and target normalised and M = `tico_covariance`, a constant.

    Args:
      z: [B, D] projections; target: [B, D] those of the other view by the momentum encoder. Both are normalised here.
      covariance: [D, D], of earlier batches.
      beta: momentum of the covariance; rho: weight of its term.

    Neither the target nor M gets a gradient. For the part of M that comes from this batch this is lightly's choice.
    Source: TiCo, section 3, https://arxiv.org/abs/2206.10698; lightly, loss/tico_loss.py.

    >>> round(float(tico(jnp.ones((4, 3)), jnp.ones((4, 3)), jnp.zeros((3, 3)), beta=0.9, rho=8.0)), 4)  # collapsed
    0.8
    """
    m = tico_covariance(z, covariance, beta=beta)
    z, target = normalize(z), normalize(jax.lax.stop_gradient(target))
    return 1 - jnp.sum(z * target, axis=-1).mean() + rho * jnp.sum(z @ m * z, axis=-1).mean()


def tico_covariance(z: jax.Array, covariance: jax.Array, *, beta: float) -> jax.Array:
    """The moving average beta * covariance + (1 - beta) * z' z / B [D, D] of z [B, D], normalised here; no gradient.

    >>> tico_covariance(jnp.eye(2), jnp.zeros((2, 2)), beta=0.5).tolist()
    [[0.25, 0.0], [0.0, 0.25]]
    """
    z = jax.lax.stop_gradient(normalize(z))
    return beta * covariance + (1 - beta) * z.T @ z / len(z)
