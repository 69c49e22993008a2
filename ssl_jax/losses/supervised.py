"""Losses against labels: one label an image, or several (multi-label)."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, label: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """Mean of -w[y] log softmax(logits)[y] over the images whose label y is known; 0 without any.

    Args:
      logits: [B, K].
      label: int [B], -1 where it is not known.
      weights: [K], of each class; None: all 1. The sum is divided by the number of images, not by their weights.

    >>> float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 3, -1]))) == float(jnp.log(4.0))
    True
    """
    known, class_of = label >= 0, jnp.maximum(label, 0)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, class_of)
    if weights is not None:
        each *= weights[class_of]
    return jnp.where(known, each, 0).sum() / jnp.maximum(known.sum(), 1)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """Mean of -(w1 y log p + w0 (1 - y) log(1 - p)) over the labels y that are known, p = sigmoid(logits); 0 without.

    Args:
      logits: [B, K].
      labels: [B, K] in [0, 1], soft targets too; NaN where it is not known: such an entry counts nowhere.
      weights: [2, K], w0 of absent and w1 of present, for each class; None: all 1.

    Source: CheXpert, section 3.2, https://arxiv.org/abs/1901.07031, whose U-Ignore leaves out unknown labels.

    >>> labels = jnp.array([[1.0, jnp.nan], [0.0, jnp.nan]])
    >>> float(binary_cross_entropy(jnp.zeros((2, 2)), labels)) == float(jnp.log(2.0))
    True
    """
    known = ~jnp.isnan(labels)
    y = jnp.where(known, labels, 0)  # before it is used: a NaN would pass through the gradient of a later choice
    absent, present = (1, 1) if weights is None else weights
    each = -(present * y * jax.nn.log_sigmoid(logits) + absent * (1 - y) * jax.nn.log_sigmoid(-logits))
    return jnp.where(known, each, 0).sum() / jnp.maximum(known.sum(), 1)
