"""Losses against labels: one label per image, or several (multi-label)."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, label: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """Mean of -w[y] log softmax(logits)[y] over the images whose label y is known; 0 if none is.

    Args:
      logits: [B, K].
      label: int [B], -1 where unknown.
      weights: [K], one per class; None: all 1. The sum is divided by the number of images, not by their weights.

    >>> float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 3, -1]))) == float(jnp.log(4.0))
    True
    """
    known, y = label >= 0, jnp.maximum(label, 0)
    terms = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    if weights is not None:
        terms *= weights[y]
    return jnp.where(known, terms, 0).sum() / jnp.maximum(known.sum(), 1)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """Mean of -(w1 y log p + w0 (1 - y) log(1 - p)) over the known labels y, p = sigmoid(logits); 0 if none is known.

    Args:
      logits: [B, K].
      labels: [B, K] in [0, 1], possibly soft; NaN where unknown: such an entry is ignored.
      weights: [2, K], w0 for absent and w1 for present, per class; None: all 1.

    Source: CheXpert, section 3.2 (U-Ignore), https://arxiv.org/abs/1901.07031.

    >>> labels = jnp.array([[1.0, jnp.nan], [0.0, jnp.nan]])
    >>> float(binary_cross_entropy(jnp.zeros((2, 2)), labels)) == float(jnp.log(2.0))
    True
    """
    known = ~jnp.isnan(labels)
    y = jnp.where(known, labels, 0)  # here, because a NaN would pass through the gradient of the `where` below
    absent, present = (1, 1) if weights is None else weights
    terms = -(present * y * jax.nn.log_sigmoid(logits) + absent * (1 - y) * jax.nn.log_sigmoid(-logits))
    return jnp.where(known, terms, 0).sum() / jnp.maximum(known.sum(), 1)
