"""Signs that an encoder gives every image the same embedding, or uses few of its dimensions."""

import jax
import jax.numpy as jnp

STD_COLLAPSED = 0.01  # `embedding_std` below which the embedding counts as collapsed


def embedding_std(features: jax.Array) -> jax.Array:
    """Standard deviation of the L2-normalised embeddings [N, D], a scalar: about 1 if every direction is used, 0
    after a collapse. It says nothing about what the embedding knows.

    Mean over dimensions of the standard deviation over examples, times sqrt(D), because an isotropic embedding has
    1 / sqrt(D) in each dimension. Source: SimSiam, section 4.1, https://arxiv.org/abs/2011.10566.
    """
    normed = features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return jnp.sqrt(features.shape[1]) * normed.std(axis=0).mean()


@jax.jit
def rank_me(features: jax.Array) -> jax.Array:
    """Effective rank of the embeddings [N, D], a scalar between 1 and min(N, D).

    exp of the entropy of the normalised singular values. Source: RankMe, equation 1, https://arxiv.org/abs/2210.02885.

    >>> float(rank_me(jnp.eye(4))), round(float(rank_me(jnp.ones((4, 4)))), 2)
    (4.0, 1.0)
    """
    values = jnp.linalg.svd(features, compute_uv=False)
    share = values / jnp.maximum(values.sum(), 1e-12)
    return jnp.exp(jax.scipy.special.entr(share).sum())


def direction_rank(features: jax.Array) -> jax.Array:
    """The number of directions in which the embeddings [N, D] point, between 1 (collapse) and min(N, D).

    1 / mean cos^2 over all pairs: the participation ratio of the second moment of the normalised embeddings. It detects
    a collapse that `embedding_std` misses: embeddings behind a BatchNorm that all lie on one line through the origin.

    >>> float(direction_rank(jnp.eye(4))), round(float(direction_rank(jnp.array([[3.0, 3.0], [-1.0, -1.0]]))), 4)
    (4.0, 1.0)
    """
    normed = features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return 1 / jnp.maximum(jnp.square(normed @ normed.T).mean(), 1e-12)
