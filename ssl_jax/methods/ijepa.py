r"""I-JEPA: from a part of an image, predict the features that a slow copy of the encoder gives to other blocks of it.

There is no transform but a crop, so colours and textures are not learnt to be ignored. The context is a quarter of the
patches, so a step is cheap. Needs a ViT, and is best with large ones and long
training. The embedding is the mean of the patches; the class token is not trained. The moving average is what is
exported.

$$\mathrm{mean}_{i \in \mathrm{blocks}}\ \mathrm{smooth}_{L_1}\big(q(f(\mathrm{context}))_i - \mathrm{LN}(g(x))_i\big)$$

Source: https://arxiv.org/abs/2301.08243; facebookresearch/ijepa, src/train.py.

Family: without negatives.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from ssl_jax.collapse import embedding_std
from ssl_jax.fields import option
from ssl_jax.losses import smooth_l1
from ssl_jax.methods.base import Method, State, require_vit, select_entries, std_collapse, target_encoder
from ssl_jax.methods.masks import multi_block
from ssl_jax.models import predictor
from ssl_jax.network import dense_shapes
from ssl_jax.transforms import track_target


@dataclass(frozen=True)
class Config:
    targets: int = option(4, "blocks to predict", min=1)  # configs/in1k_vith14_ep300.yaml, as everything below
    target_scale: tuple[float, float] = option((0.15, 0.2), "share of the image that a block covers", above=0, below=1)
    aspect: tuple[float, float] = option((0.75, 1.5), "height of a block / its width", above=0)
    context_scale: tuple[float, float] = option((0.85, 1.0), "share of the square that is seen", above=0, max=1)
    # Official batches of 128 keep the smallest context: 0.25 on average, counted for 14 x 14 patches.
    context: float = option(0.25, "share of the patches that is seen, without the blocks", above=0, below=1)
    momentum: float = 0.996  # of the target, rises to 1 in a straight line
    width: int = 96  # of the predictor: ours, half of vit_tiny's; official: 384 of 1280
    depth: int = 6  # its blocks (ViT-B, appendix A.1); 12 for larger ones
    heads: int = 3  # ours, of 32 features


# Official: lr 1e-3 at batch 2048, 40 of 300 epochs of warm-up; ours suits short runs.
RECIPE = {
    "model.name": "vit_tiny",
    "model.pool": "mean",
    "augment.preset": "light",
    "augment.crop_scale": (0.3, 1.0),
    "optim.name": "adamw",
    "optim.lr": 5e-4,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.warmup": "0.5 epochs",
}
TINY = {"method.heads": 1}  # for the contract test


def make(config, encoder, run):
    patch = require_vit(encoder, "ijepa")

    def init(key, views):
        key_net, key_predictor = jax.random.split(key)
        params, stats = encoder.init(key_net, views[0])
        width = dense_shapes(encoder, params, stats, views[0][:1])[1].shape[-1]
        made, _ = head(width).init(key_predictor, jnp.zeros((1, 1, width)))
        target = jax.tree.map(jnp.copy, stats)
        return {"encoder": params, "predictor": made}, State({"encoder": stats, "target": {"encoder": target}}, {})

    def head(features):
        return predictor(config.width, config.depth, config.heads, features)

    def forward(params, target, state, batch, key):
        (images,) = batch["views"]
        side = images.shape[1] // patch
        ranges = {name: getattr(config, name) for name in ("targets", "target_scale", "aspect", "context_scale")}
        context = max(1, int(side * side * config.context))
        visible, hidden, counted = multi_block(key, side, context=context, **ranges)
        (embedding, features), target_stats = encoder.apply(
            target["encoder"], state.stats["target"]["encoder"], images, train=True, dense=True
        )
        features = layer_norm(features.reshape(len(images), 1, -1, features.shape[-1]))
        features = jnp.take_along_axis(features, hidden[..., None], axis=2)
        tokens, stats = encoder.apply(params["encoder"], state.stats["encoder"], images, train=True, visible=visible)
        each = [jnp.repeat(x, config.targets, axis=0) for x in (tokens[:, 1:], visible)]
        prediction, _ = head(features.shape[-1]).apply(
            params["predictor"],
            {},
            each[0],
            train=True,
            visible=each[1],
            hidden=hidden.reshape(-1, hidden.shape[-1]),
            side=side,
        )
        outputs = {
            "embedding": embedding,
            "prediction": prediction.reshape(features.shape),
            "features": features,
            "counted": counted,
        }
        return outputs, {"encoder": stats, "target": {"encoder": target_stats}}

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        value = smooth_l1(outputs["prediction"], outputs["features"], outputs["counted"])
        return value, {"projection_std": embedding_std(outputs["embedding"])}

    momentum = optax.linear_schedule(config.momentum, 1.0, run.steps)
    return Method(
        init,
        forward,
        loss,
        views=1,
        transform=track_target(momentum, select_entries("encoder")),
        encoder=target_encoder,
        collapsed=std_collapse("a target that moves too fast, or a learning rate too high"),
    )


def layer_norm(x):
    """Each token's features with mean 0 and variance 1, as torch.nn.functional.layer_norm has it."""
    return (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + 1e-5)
