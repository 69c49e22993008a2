"""Losses in which one view predicts the soft cluster that another view is assigned to."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def sinkhorn(scores: jax.Array, *, epsilon: float, iterations: int) -> jax.Array:
    """Soft assignments [B, K] of scores [B, K]: each row sums to 1, each column to about B / K.

    exp(scores / epsilon), whose columns and then rows are scaled to equal sums, `iterations` times. It is computed in
    logarithms, so that no score overflows. iterations = 0 gives softmax(scores / epsilon), which may collapse to one
    cluster.

    Source: SwAV, section 3.1 and appendix A, https://arxiv.org/abs/2006.09882; facebookresearch/swav, main_swav.py.

    >>> [[round(v, 2) for v in row] for row in sinkhorn(jnp.eye(2), epsilon=0.05, iterations=3).tolist()]
    [[1.0, 0.0], [0.0, 1.0]]
    >>> sinkhorn(jnp.array([[500.0, 0.0], [500.0, 0.0]]), epsilon=0.05, iterations=3).tolist()  # never all in one
    [[0.5, 0.5], [0.5, 0.5]]
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = jax.nn.log_softmax(jax.nn.log_softmax(log_q, axis=0), axis=1)
    return jax.nn.softmax(log_q, axis=1)


def swapped(logits: Sequence[jax.Array], targets: Sequence[jax.Array]) -> jax.Array:
    """Mean over views v and targets t != v of the cross-entropy -sum_k target_k log softmax(logits_v)_k.

    Args:
      logits: V arrays [B, K], one per view.
      targets: T <= V arrays [B, K] of probabilities, of the first T views; they get no gradient.

    SwAV and DINO share it. Source: SwAV, equation 2 and section 3.2, https://arxiv.org/abs/2006.09882; DINO,
    equation 3, https://arxiv.org/abs/2104.14294.

    >>> round(float(swapped([jnp.zeros((2, 4))] * 3, [jnp.eye(4)[:2]] * 2)), 4)  # uniform prediction: log K
    1.3863
    """
    terms = [
        -jnp.sum(jax.lax.stop_gradient(target) * jax.nn.log_softmax(z), axis=-1).mean()
        for t, target in enumerate(targets)
        for v, z in enumerate(logits)
        if v != t
    ]
    return jnp.stack(terms).mean()


def swav(scores: Sequence[jax.Array], assignments: Sequence[jax.Array], *, temperature: float) -> jax.Array:
    """SwAV's swapped prediction: `swapped` with logits scores / temperature.

    Args:
      scores: V arrays [B, K], dot products of unit projections and unit prototypes.
      assignments: [B, K] of the first views, from `sinkhorn`.
      temperature: of the prediction.

    Source: SwAV, equation 2, https://arxiv.org/abs/2006.09882; facebookresearch/swav, main_swav.py.

    >>> q = sinkhorn(jnp.eye(2), epsilon=0.05, iterations=3)
    >>> round(float(swav([jnp.eye(2), jnp.eye(2)], [q, q], temperature=0.1)), 4)
    0.0
    """
    return swapped([s / temperature for s in scores], assignments)


def dino(
    student: Sequence[jax.Array],
    teacher: Sequence[jax.Array],
    centre: jax.Array,
    *,
    temperature: float,
    teacher_temperature: float | jax.Array,
) -> jax.Array:
    """Self-distillation: `swapped` with logits student / temperature and targets from `dino_targets`.

    Args:
      student: V arrays [B, K], teacher: [B, K] of the first views.
      centre: [K], subtracted from the teacher's.
      temperature: of the student; teacher_temperature: of the teacher, lower, so that its targets are sharper.

    Source: DINO, equations 1 to 3, https://arxiv.org/abs/2104.14294; facebookresearch/dino, main_dino.py.

    >>> same = [jnp.ones((2, 8))] * 2
    >>> round(float(dino(same, same, jnp.ones(8), temperature=0.1, teacher_temperature=0.04)), 4)  # collapsed: log K
    2.0794
    """
    targets = dino_targets(teacher, centre, temperature=teacher_temperature)
    return swapped([s / temperature for s in student], targets)


def dino_targets(teacher: Sequence[jax.Array], centre: jax.Array, *, temperature: float | jax.Array) -> list[jax.Array]:
    """softmax((teacher - centre) / temperature) of each of the arrays [B, K]; centre [K].

    >>> dino_targets([jnp.array([[3.0, 1.0]])], jnp.array([3.0, 1.0]), temperature=0.04)[0].tolist()
    [[0.5, 0.5]]
    """
    return [jax.nn.softmax((t - centre) / temperature) for t in teacher]


def msn_targets(scores: jax.Array, *, sharpen: float, iterations: int) -> jax.Array:
    """MSN's targets [B, K] of scores [B, K]: softmax(scores / sharpen), balanced by `sinkhorn`.

    scores: cosines with the prototypes / temperature. Each row sums to 1 before it is balanced. With few iterations
    that is not the same as balancing exp(scores / sharpen), where confident images would weigh more.

    Source: facebookresearch/msn, src/losses.py.

    >>> [[round(v, 2) for v in row] for row in msn_targets(jnp.eye(2), sharpen=0.25, iterations=3).tolist()]
    [[0.98, 0.02], [0.02, 0.98]]
    """
    return sinkhorn(jax.nn.log_softmax(scores / sharpen), epsilon=1.0, iterations=iterations)


def msn(scores: Sequence[jax.Array], targets: jax.Array, *, weight: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of softmax(scores) under targets, plus weight (log K - entropy of the mean prediction).

    Args:
      scores: V arrays [B, K], cosines with the prototypes / temperature.
      targets: [B, K], probabilities; they get no gradient.

    Returns the loss and both terms. Source: MSN, equation 1, https://arxiv.org/abs/2204.07141; facebookresearch/msn,
    src/losses.py.

    >>> round(float(msn([jnp.zeros((2, 4))] * 3, jnp.eye(4)[:2], weight=1.0)[0]), 4)  # uniform: log K, and all are used
    1.3863
    """
    log_p = jnp.stack([jax.nn.log_softmax(s) for s in scores])
    error = -jnp.sum(jax.lax.stop_gradient(targets) * log_p, axis=-1).mean()
    mean = jnp.exp(log_p).mean(axis=(0, 1))
    unused = jnp.log(float(len(mean))) - jax.scipy.special.entr(mean).sum()
    return error + weight * unused, {"assignment": error, "unused": unused}
