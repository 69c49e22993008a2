"""SIGReg: how far embeddings are from an isotropic Gaussian, looked at in random directions."""

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.losses.contrastive import normalize


def sig_reg(z: jax.Array, directions: jax.Array, *, knots: int = 17, limit: float = 3.0) -> jax.Array:
    """The Epps-Pulley statistic of z [B, D] along directions [S, D], averaged over the directions.

    B times the integral over t from -limit to limit of |mean_i exp(i t x_i) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), where x
    is z along one direction: 0 only if x is standard normal. By the trapezoidal rule with `knots` points from 0 on,
    doubled.

    directions: normalised here.

    Source: LeJEPA, https://arxiv.org/abs/2511.08544; rbalestr-lab/lejepa, lejepa/univariate/epps_pulley.py.

    >>> one = jnp.ones((4, 2))
    >>> round(float(sig_reg(0 * one, one)), 3)  # collapsed: 4 times the integral of (1 - exp(-t^2 / 2))^2 exp(-t^2 / 2)
    1.608
    """
    t = np.linspace(0, limit, knots)
    normal = np.exp(-(t**2) / 2)
    step = np.full(knots, 2 * limit / (knots - 1))
    step[[0, -1]] /= 2
    angles = (z @ normalize(directions).T)[..., None] * t.astype(z.dtype)  # [B, S, knots]
    error = (jnp.cos(angles).mean(axis=0) - normal.astype(z.dtype)) ** 2 + jnp.sin(angles).mean(axis=0) ** 2
    return len(z) * (error @ (step * normal).astype(z.dtype)).mean()


def lejepa(z: jax.Array, directions: jax.Array, *, weight: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(1 - weight) mean (z_v - centre)^2 + weight mean_v SIGReg(z_v), and both terms; centre: the mean over views.

    z: [V, B, D], the projections of V views. Nothing is stopped: gradients flow into the centre, too.

    Source: rbalestr-lab/lejepa, MINIMAL.md.

    >>> float(lejepa(jnp.ones((2, 4, 3)), jnp.eye(3), weight=0.0)[0])
    0.0
    """
    invariance = jnp.square(z - z.mean(axis=0)).mean()
    gaussian = jnp.stack([sig_reg(view, directions) for view in z]).mean()
    return (1 - weight) * invariance + weight * gaussian, {"invariance": invariance, "sig_reg": gaussian}
