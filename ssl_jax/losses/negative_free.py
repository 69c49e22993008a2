"""Losses without negatives."""

import jax
import jax.numpy as jnp

from ssl_jax.losses.contrastive import normalize


def negative_cosine(prediction: jax.Array, target: jax.Array, *, stop_gradient: bool = True) -> jax.Array:
    """Mean of -cos(prediction, target). BYOL's 2 - 2 cos is twice this, plus 2.

    Args:
      prediction: [B, D] output of the predictor.
      target: [B, D] projection of the other view.
      stop_gradient: whether the target gets no gradient. Training collapses if it does (SimSiam, section 4.1).

    Source: SimSiam, equation 1, https://arxiv.org/abs/2011.10566; BYOL, equation 2, https://arxiv.org/abs/2006.07733.

    >>> round(float(negative_cosine(jnp.ones((2, 3)), jnp.ones((2, 3)))), 4)
    -1.0
    """
    target = jax.lax.stop_gradient(target) if stop_gradient else target
    return -jnp.sum(normalize(prediction) * normalize(target), axis=-1).mean()
