"""Small networks, images and configs: what compiles in no time and still has all that a method may need."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import train
from ssl_jax.augment import make_views
from ssl_jax.config import default, method_module, resolve
from ssl_jax.data import Source, order
from ssl_jax.network import Network
from ssl_jax.parallel import batch_sharding, make_mesh, replicated

# Of any method that has such a field. VICReg's weights are a 25th: as if the loss and the learning rate were. TiCo's
# covariance and DINO's centre are full at once, or the loss would rise while they fill.
SMALL = {
    "hidden": 16, "out": 8, "bottleneck": 4, "queue": 24, "bn_groups": 2, "permutations": 6, "prototypes": 6,
    "negatives": 24, "predictor_hidden": 16, "width": 16, "depth": 1,
    "freeze_steps": 3, "local": 8, "invariance": 1.0, "variance": 1.0, "covariance": 0.04, "beta": 0.1,
    "centre_momentum": 0.0, "teacher_temperature": 0.01, "warmup_temperature": 0.01,
}  # fmt: skip


@functools.cache
def tiny_encoder():
    """Images -> BatchNorm MLP -> embeddings [B, 12]: a network with statistics that compiles in no time."""
    from ssl_jax.models import mlp

    body = mlp((24, 12), last_norm="affine")

    def flat(x, width):
        """Pixels in a row; those of a smaller view are followed by zeros."""
        x = x.reshape(len(x), -1) - 0.5
        return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))

    def apply(params, stats, x, dense=False, **kwargs):
        """dense: also [B, 2, 2, 12], the embedding of each quarter, the others black; their mean comes first."""
        if dense:
            rows, columns = (jnp.arange(side) * 2 // side for side in x.shape[1:3])
            quarter = rows[:, None] * 2 + columns == jnp.arange(4)[:, None, None]
            x = (x[:, None] * quarter[:, :, :, None]).reshape(-1, *x.shape[1:])
        y, stats = body.apply(params, stats, flat(x, params["linear1"]["kernel"].shape[0]), **kwargs)
        maps = y.reshape(-1, 2, 2, y.shape[1]) if dense else y
        return ((maps.mean((1, 2)), maps) if dense else y), stats

    return Network(lambda rng, x: body.init(rng, flat(x, x[0].size)), apply)


class Images(Source):
    """Random images of three classes that differ in where they are bright. Tests may replace images and labels."""

    labels: Any = None

    def __init__(self, n=48, size=8, channels=1, labels=True, seed=0):
        y = np.arange(n) % 3
        images = np.random.default_rng(seed).integers(0, 90, (n, size, size, channels))
        for i, label in enumerate(y):
            images[i, label * size // 3 : (label + 1) * size // 3] += 160
        self.images = images.astype(np.uint8)
        shape, classes = (size, size, channels), ["a", "b", "c"] if labels else []
        super().__init__([str(i) for i in range(n)], shape, lambda i: self.images[i], classes=classes)
        self.labels = y.astype(np.int32) if labels else None

    def arrays(self, progress=None):
        return self.images


def tiny_config(method, **changes):
    """A resolved config of `method` at toy size; changes are written section__key=value.

    A method that needs something else here (views of a certain size, say) has it in a dict `TINY` of its module.
    """
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
    if resolve(config).model.name.startswith("vit"):
        config.model.update({"width": 1 / 16, "depth": 1, "patch": 2})
    else:
        config.model.update({"name": "resnet_thin", "width": 0.25})
    config.update_from_flattened_dict(getattr(method_module(method), "TINY", {}))
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return resolve(config)


def tiny_network(config):
    """The encoder that stands in for a ResNet; None, the config's own, for a ViT."""
    return None if config.model.name.startswith("vit") else tiny_encoder()


def set_up(config, source):
    """`train.set_up` on `tiny_network`."""
    return train.set_up(config, source, tiny_network(config))


def views_of(setup, images, seed=1):
    """What a method's forward gets of images uint8 [B, H, W, C]: its views, and how they were drawn."""
    views, drawn = jax.jit(make_views(setup.views, setup.method.shares))(jax.random.key(seed), images)
    return {"views": views, "drawn": drawn}


def batch_of(config, source, step, mesh):
    """The batch of a step, on the devices of `mesh`."""
    index = order(config.train.seed, len(source), config.train.batch, step, source.blocks)
    batch = {"image": source.images[index], "index": index.astype(np.int32)}
    if source.labels is not None:
        batch["label"] = source.labels[index]
    return jax.device_put(batch, batch_sharding(mesh))


STARTED: dict[
    str, tuple
] = {}  # what was compiled once serves all tests of a config; the newest, as programs take memory


def watched(setup):
    """`setup`, but the metrics of a step also hold what forward got and gave, and the loss's random key.

    "batch" and "target"; "outputs"; "key".
    """
    method = setup.method

    def forward(params, target, state, batch, key):
        outputs, stats = method.forward(params, target, state, batch, key)
        return {"outputs": outputs, "embedding": outputs["embedding"], "batch": batch, "target": target}, stats

    def loss(outputs, state, batch, ctx):
        value, metrics = method.loss(outputs["outputs"], state, batch, ctx)
        return value, {**metrics, **outputs, "key": ctx.key}

    def post_update(outputs, state, ctx):
        return method.post_update(outputs["outputs"], state, ctx)

    return setup._replace(method=method._replace(forward=forward, loss=loss, post_update=post_update))


def start(config, source, devices=1, watch=False):
    """(initial state, jitted step, mesh); watch: the step of the `watched` method."""
    key = repr((config, source.images.shape, source.labels is None, devices, watch))
    if key not in STARTED:
        setup, mesh = set_up(config, source), make_mesh(devices, config.train.batch)
        setup = watched(setup) if watch else setup
        state = jax.device_put(train.init_state(setup, config.train.seed), replicated(mesh))
        STARTED[key] = state, jax.jit(train.make_step(setup, config, mesh)), mesh
        if len(STARTED) > 4:
            del STARTED[next(iter(STARTED))]
    return STARTED[key]
