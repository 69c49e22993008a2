"""Losses over many prototypes, for rows of many images and patches: the matrix of all scores is never kept.

Scores are products of unit vectors with prototypes. Where rows x prototypes is large, they are computed for a chunk of
rows at a time, and once more for the gradient: memory grows with rows + chunk x prototypes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax.losses.contrastive import DENSE_UP_TO, normalize


def prototype_cross_entropy(
    student: jax.Array,
    teacher: jax.Array,
    weights: jax.Array,
    prototypes: jax.Array,
    target_prototypes: jax.Array,
    shift: jax.Array,
    *,
    temperature: float,
    teacher_temperature: float | jax.Array,
) -> jax.Array:
    """Sum over rows r, targets t and predictions v of weights[r, t, v] times the cross-entropy of p_rv under q_rt.

    p = softmax(student . prototypes / temperature); q = softmax(teacher . target_prototypes / teacher_temperature +
    shift), which gets no gradient.

    Args:
      student: [R, V, D], teacher: [R, T, D] unit vectors.
      weights: [R, T, V]; 0 leaves a pair out.
      prototypes, target_prototypes: [K, D] unit vectors of the student and of its moving average.
      shift: [K]; -centre / teacher_temperature centres the targets (DINO), `sinkhorn_shift` balances them.

    Source: DINO, equations 1 to 3, https://arxiv.org/abs/2104.14294; for patches: iBOT, equation 2,
    https://arxiv.org/abs/2111.07832.

    >>> same = jnp.eye(4)[:2, None]
    >>> sharp = {"temperature": 0.1, "teacher_temperature": 0.04}
    >>> weights, eye = jnp.ones((2, 1, 1)) / 2, jnp.eye(4)
    >>> round(float(prototype_cross_entropy(same, same, weights, eye, eye, jnp.zeros(4), **sharp)), 3)
    0.0
    """
    teacher, target_prototypes, shift = jax.lax.stop_gradient((teacher, target_prototypes, shift))

    def part(rows):
        student, teacher, weights = rows
        scores = student @ prototypes.T / temperature
        q = jax.nn.softmax(teacher @ target_prototypes.T / teacher_temperature + shift)
        errors = jax.nn.logsumexp(scores, axis=-1)[:, None] - jnp.einsum("rtk,rvk->rtv", q, scores)
        return jnp.sum(weights * errors)

    each = (student.shape[1] + teacher.shape[1]) * len(prototypes)
    return _in_chunks(part, (student, teacher, weights), each).sum()


def sinkhorn_shift(
    rows: jax.Array,
    prototypes: jax.Array,
    where: jax.Array,
    *,
    temperature: float | jax.Array,
    iterations: int = 3,
) -> jax.Array:
    """[K], with which softmax(rows . prototypes / temperature + shift) is what `sinkhorn` assigns to the rows.

    rows: [R, D] and prototypes: [K, D], unit vectors. where: bool [R], the rows that share the prototypes evenly. If
    there is none, the shift is 0. It gets no gradient.

    Source: SwAV, section 3.1, https://arxiv.org/abs/2006.09882; facebookresearch/dinov2, dinov2/loss, which takes it
    over the class tokens of both views, and over the masked patches.

    >>> both = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> shift = sinkhorn_shift(both, jnp.eye(2), jnp.array([True, True]), temperature=0.1)
    >>> [round(float(q), 2) for q in jax.nn.softmax(both[0] / 0.1 + shift)]  # never all in one
    [0.5, 0.5]
    """
    rows, prototypes = jax.lax.stop_gradient((rows, prototypes))
    shift = jnp.zeros(len(prototypes), rows.dtype)

    def part(block, shift, first):
        x, where = block
        scores = x @ prototypes.T / temperature
        if not first:  # each row sums to 1
            scores = scores - jax.nn.logsumexp(scores + shift, axis=1, keepdims=True)
        return jax.nn.logsumexp(jnp.where(where[:, None], scores, -jnp.inf), axis=0)

    for i in range(iterations):
        each = functools.partial(part, shift=shift, first=i == 0)
        totals = _in_chunks(each, (rows, where), len(prototypes))
        total = jax.nn.logsumexp(totals, axis=0)
        shift = -jnp.where(jnp.isfinite(total), total, 0)
    return jax.lax.stop_gradient(shift)


def _in_chunks(part: Callable[[Any], jax.Array], rows: Any, each: int) -> jax.Array:
    """`part` of chunks of rows (arrays [R, ...]), stacked; each: numbers that a row needs. Padding is 0 and False."""
    count = len(jax.tree.leaves(rows)[0])
    chunks = -(-count * each // DENSE_UP_TO)
    if chunks <= 1:
        return part(rows)[None]
    size = -(-count // chunks)

    def split(x):
        """Every chunks-th row: rows that are split among devices stay there."""
        x = jnp.pad(x, [(0, size * chunks - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(size, chunks, *x.shape[1:]).swapaxes(0, 1)

    return jax.lax.map(jax.checkpoint(part), jax.tree.map(split, rows))


def koleo(x: jax.Array) -> jax.Array:
    """Kozachenko and Leonenko's entropy: mean of -log |x_i - nearest other x_j| over unit vectors. It spreads them.

    x: [B, D], normalised here. The nearest is found without a gradient.

    Source: https://arxiv.org/abs/1806.03198, equation 2; facebookresearch/dinov2, dinov2/loss/koleo_loss.py (both
    1e-8), which looks for neighbours among the images of one GPU.

    >>> round(float(koleo(jnp.array([[1.0, 0.0], [0.0, 1.0]]))), 4)  # -log sqrt(2)
    -0.3466
    """
    x = normalize(x)
    cosines = jax.lax.stop_gradient(x @ x.T)
    nearest = jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -1, cosines), axis=1)
    return -jnp.log(jnp.linalg.norm(x - x[nearest] + 1e-8, axis=1) + 1e-8).mean()
