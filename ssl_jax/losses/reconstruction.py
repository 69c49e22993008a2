"""Losses of methods that predict hidden pixels."""

import jax
import jax.numpy as jnp


def masked_error(prediction: jax.Array, target: jax.Array, mask: jax.Array, *, power: int) -> jax.Array:
    """Mean of |prediction - target|^power over the values of all masked patches of the batch; 0 if there are none.

    Args:
      prediction, target: [B, N, P], P values in each of N patches.
      mask: [B, N], true where the patch was hidden; other patches do not count.
      power: 1 or 2.

    Source: MAE, section 3, https://arxiv.org/abs/2111.06377 (power 2); SimMIM, equation 1,
    https://arxiv.org/abs/2111.09886 (power 1).

    >>> hidden = jnp.array([[True, False]])
    >>> round(float(masked_error(jnp.zeros((1, 2, 3)), 3 * jnp.ones((1, 2, 3)), hidden, power=2)), 4)
    9.0
    """
    errors = (jnp.abs(prediction - target) ** power).mean(axis=-1)
    return jnp.where(mask, errors, 0).sum() / jnp.maximum(mask.sum(), 1)


def smooth_l1(prediction: jax.Array, target: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of d^2 / 2 for |d| < 1, else |d| - 1/2, with d = prediction - target [..., D], over tokens in `where` [...].

    The target gets no gradient. Source: I-JEPA, https://arxiv.org/abs/2301.08243; facebookresearch/ijepa, src/train.py.

    >>> float(smooth_l1(jnp.array([[0.5], [3.0]]), jnp.zeros((2, 1)), jnp.array([True, True])))  # (0.125 + 2.5) / 2
    1.3125
    """
    d = jnp.abs(prediction - jax.lax.stop_gradient(target))
    error = jnp.where(d < 1, 0.5 * d * d, d - 0.5).mean(axis=-1)
    return jnp.sum(error * where) / jnp.maximum(1, where.sum())
