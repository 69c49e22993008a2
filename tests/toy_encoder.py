"""An encoder of one layer, its embedding included: for tests of what is done with encoders."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import center_view
from ssl_jax.methods.base import Network

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(network, size, params, stats, images):
    return network.apply(params, stats, center_view(images, size), train=False)[0]


class ToyEncoder(NamedTuple):
    network: Network
    params: Any
    stats: Any
    size: int
    channels: int
    about: dict

    def embed(self, images, batch=64):
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            filled = np.pad(part, [(0, batch - len(part)), (0, 0), (0, 0), (0, 0)])
            parts.append(np.asarray(_embed(self.network, self.size, self.params, self.stats, filled))[: len(part)])
        return np.concatenate(parts)


def toy_encoder(seed=0, size=8, channels=1):
    params, stats = NETWORK.init(jax.random.key(seed), jnp.zeros((1, size, size, channels)))
    return ToyEncoder(NETWORK, params, stats, size, channels, {})


def toy_images(n=90, size=8, seed=0, classes=3, weights=None):
    """Noise with a brighter band whose height tells the class: uint8 [n, size, size, 1], int32 [n]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes if weights is None else rng.choice(classes, n, p=weights)
    images = rng.integers(0, 150, (n, size, size, 1))
    for image, label in zip(images, labels, strict=True):
        image[label * size // classes : (label + 1) * size // classes] += 60
    return images.astype(np.uint8), labels.astype(np.int32)
