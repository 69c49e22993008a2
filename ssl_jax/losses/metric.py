"""Losses of metric learning: labels say which embeddings belong together."""

from typing import Literal

import jax
import jax.numpy as jnp


def mined_triplet(
    z: jax.Array, label: jax.Array, *, margin: float, mining: Literal["all", "hard", "semi_hard"]
) -> jax.Array:
    """Mean of max(0, |a - p| - |a - n| + margin) over all pairs (a, p) of one label and their negatives n.

    Args:
      z: [N, D] embeddings, not normalised.
      label: [N], -1 where unknown: such an example takes no part. A label with a single example gives no pair. If no
        pair has a negative, the loss is 0.
      margin: how much farther away the negative should be, in units of the distance.
      mining: the negatives of a pair: "all"; "hard": the one nearest to a; "semi_hard": the nearest of those farther
        from a than p is or, if there is none, the farthest.

    The distance is that of `triplet`. Source: FaceNet, section 3.2, https://arxiv.org/abs/1503.03832. For a pair
    without a semi-hard negative, which the paper leaves open, we follow TensorFlow's triplet_semihard_loss.

    >>> z = jnp.array([[0.0], [1.0], [1.5], [5.0]])
    >>> label = jnp.array([0, 0, 1, 1])
    >>> [round(float(mined_triplet(z, label, margin=1.0, mining=m)), 3) for m in ("all", "hard", "semi_hard")]
    [1.187, 1.625, 1.0]
    """
    distance = jnp.linalg.norm(z[:, None] - z[None] + 1e-6, axis=-1)
    same, known = label[:, None] == label, label >= 0
    positive = same & known & ~jnp.eye(len(z), dtype=bool)
    negative = ~same & known & known[:, None]
    if mining == "all":
        to_negative, valid = distance[:, None, :], positive[:, :, None] & negative[:, None, :]
    else:
        # The choice has no gradient, only the distance to the chosen negative does.
        fixed = jax.lax.stop_gradient(distance)
        if mining == "hard":
            chosen = jnp.where(negative, fixed, jnp.inf).argmin(axis=1)[:, None]
        else:
            farther = negative[:, None, :] & (fixed[:, None, :] > fixed[:, :, None])
            nearest = jnp.where(farther, fixed[:, None, :], jnp.inf).argmin(axis=2)
            farthest = jnp.where(negative, fixed, -jnp.inf).argmax(axis=1)[:, None]
            chosen = jnp.where(farther.any(axis=2), nearest, farthest)
        to_negative = jnp.take_along_axis(distance, chosen, axis=1)[:, :, None]
        valid = (positive & negative.any(axis=1, keepdims=True))[:, :, None]
    terms = jnp.maximum(0, distance[:, :, None] - to_negative + margin)
    return jnp.where(valid, terms, 0).sum() / jnp.maximum(valid.sum(), 1)
