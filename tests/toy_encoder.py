"""An encoder of one layer, its embedding included: for tests of what is done with encoders."""

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.encoder import Encoder
from ssl_jax.network import Network

WIDTH = 12


def _init(rng, x):
    w = jax.random.normal(rng, (x[0].size, WIDTH)) / x[0].size ** 0.5
    return {"w": w, "scale": jnp.ones(WIDTH)}, {"mean": jnp.zeros(WIDTH), "var": jnp.ones(WIDTH)}


def _apply(params, stats, x, *, train, groups=1):
    TRACES.append(train)
    y = (x.reshape(len(x), -1) - 0.5) @ params["w"]
    mean, var = (y.mean(0), y.var(0)) if train else (stats["mean"], stats["var"])
    if train:
        stats = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var}
    return jax.nn.relu((y - mean) * params["scale"] * jax.lax.rsqrt(var + 1e-5)), stats


TRACES: list[bool] = []  # one entry whenever the network is traced: train or not
NETWORK = Network(_init, _apply)


def toy_encoder(seed=0, size=8, channels=1):
    params, stats = NETWORK.init(jax.random.key(seed), jnp.zeros((1, size, size, channels)))
    return Encoder(NETWORK, params, stats, size, channels, {})


def toy_images(n=90, size=8, seed=0, classes=3, weights=None):
    """Noise with a brighter band whose height tells the class: uint8 [n, size, size, 1], int32 [n]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes if weights is None else rng.choice(classes, n, p=weights)
    images = rng.integers(0, 150, (n, size, size, 1))
    for image, label in zip(images, labels, strict=True):
        image[label * size // classes : (label + 1) * size // classes] += 60
    return images.astype(np.uint8), labels.astype(np.int32)
