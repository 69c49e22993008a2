"""Small things that several tests train on."""

import numpy as np

from ssl_jax.config import default, resolve
from ssl_jax.methods.base import Network

SMALL = {"hidden": 16, "out": 8, "bottleneck": 4, "queue": 24, "bn_groups": 2}  # of any method that has such a field


def tiny_encoder():
    """Images -> BatchNorm MLP -> embeddings [B, 12]: a network with statistics that compiles in no time."""
    from ssl_jax.models import mlp

    body = mlp((24, 12), last_norm="affine")

    def flat(x):
        return x.reshape(len(x), -1) - 0.5

    return Network(
        lambda rng, x: body.init(rng, flat(x)),
        lambda params, stats, x, **kwargs: body.apply(params, stats, flat(x), **kwargs),
    )


class Images:
    """A data source of random images of three classes that differ in where they are bright."""

    def __init__(self, n=48, size=8, channels=1, labels=True, seed=0):
        y = np.arange(n) % 3
        images = np.random.default_rng(seed).integers(0, 90, (n, size, size, channels))
        for i, label in enumerate(y):
            images[i, label * size // 3 : (label + 1) * size // 3] += 160
        self.images, self.shape = images.astype(np.uint8), (size, size, channels)
        self.labels = y.astype(np.int32) if labels else None
        self.classes = ["a", "b", "c"] if labels else []
        self.names, self.skipped, self.objects = [str(i) for i in range(n)], [], None

    def __len__(self):
        return len(self.names)

    def load(self, i):
        return self.images[i]

    def arrays(self, progress=None):
        return self.images


def tiny_config(method, **changes):
    """A resolved config of `method` at toy size; changes are written section__key=value."""
    config = default(method)
    for key in SMALL:
        if key in config.method:
            config.method[key] = SMALL[key]
    config.augment.preset = "none"
    config.augment.crop_scale = (0.5, 1.0)
    config.augment.flip = 0.5
    # No two views are ever equal: at distance 0 the triplet loss has no direction, and rounding would choose one.
    config.augment.brightness = 0.4
    config.augment.jitter_prob = 1.0
    config.optim.update({"name": "sgd", "lr": 0.05, "lr_batch": 0, "warmup": "0 steps"})
    config.train.update({"batch": 16, "duration": "20 steps", "log_every": "1 steps", "devices": 1})
    config.data.name = "synthetic"
    config.model.update({"name": "resnet_thin", "width": 0.25})
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return resolve(config)
