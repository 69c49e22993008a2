"""Losses of self-supervised learning: pure functions of arrays, without networks, state or device counts.

Shapes: B batch, D features, K queue. Every loss returns a scalar, the mean over the batch, in the type of its inputs.
"""

from ssl_jax.losses.contrastive import info_nce, nt_xent, triplet
from ssl_jax.losses.negative_free import negative_cosine

__all__ = ["info_nce", "negative_cosine", "nt_xent", "triplet"]
