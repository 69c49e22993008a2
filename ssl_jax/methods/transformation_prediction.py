"""Transformation prediction: how far was an image turned, sheared, zoomed, moved, bent and recoloured?

A regression of the drawn parameters from both views. It keeps what contrastive methods ignore. The first view is to
stay as it is, except for a flip: the second one's parameters are predicted, not the difference.

Source: AET, https://arxiv.org/abs/1901.04596; maple-research-lab/AET, cifar (affine and projective). Colours are ours.

Family: pretext tasks.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.methods.base import Method, init_network, refuse_randaugment
from ssl_jax.models import mlp
from ssl_jax.network import siamese, stack


@dataclass(frozen=True)
class Config:
    hidden: int = 512  # of the head over both embeddings: ours; official: one linear layer and a tanh


# cifar/affine/main.py
RECIPE = {
    "optim.lr": 0.1,
    "optim.lr_batch": 512,
    "optim.nesterov": True,
    "optim.weight_decay": 5e-4,
    "augment.preset": "transformation",
}
# name -> numbers to predict, and the range by which they are divided: that of the preset, so they lie within +-1.
PARTS = {
    "angle": (2, 1.0), "shear": (1, 30.0), "zoom": (1, 0.3), "shift": (2, 0.2), "corners": (8, 1 / 8),
    "brightness": (1, 0.4), "contrast": (1, 0.4), "saturation": (1, 0.4), "hue": (1, 0.1),
}  # fmt: skip
CHANGES_NOTHING = {"zoom": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
MIRRORED = (1, 0, 3, 2)  # upper left <-> upper right, lower right <-> lower left
TINY = {"augment.second.rotate": 90.0, "augment.second.shear": 20.0}  # for the contract test: something to predict


def targets_of(drawn, channels):
    """What the second view was drawn with, {name: [B, numbers]} for those of PARTS that were drawn.

    Both views are cut and flipped alike, but only after the second has been warped: in a flipped pair the network sees
    the mirror image of the warp. Saturation and hue change nothing where there are no three channels.
    """
    flip = drawn["flip"]
    sign = jnp.where(flip, -1.0, 1.0)
    side = drawn["source"][:, ::-1].astype(jnp.float32)  # width, height
    colourless = () if channels == 3 else ("saturation", "hue")
    made = {name: drawn[name] for name in PARTS if name in drawn and name not in colourless}
    if "angle" in made:
        angle = jnp.deg2rad(sign * made["angle"])
        made["angle"] = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=1)
    if "shear" in made:
        made["shear"] = sign * made["shear"]
    if "shift" in made:
        made["shift"] = made["shift"] / side * jnp.stack([sign, jnp.ones_like(sign)], axis=1)
    if "corners" in made:
        start = jnp.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (side[:, None] - 1)
        moved = (made["corners"] - start) / side[:, None]
        mirrored = moved[:, jnp.array(MIRRORED)] * jnp.array([-1.0, 1.0])
        made["corners"] = jnp.where(flip[:, None, None], mirrored, moved)
    return {
        name: ((value - CHANGES_NOTHING.get(name, 0.0)) / PARTS[name][1]).reshape(len(flip), -1)
        for name, value in made.items()
    }


def make(config, encoder, run):
    del run
    # One output for every number there may be: which ones are drawn is for the views to say.
    network = stack(encoder=siamese(encoder), head=mlp((config.hidden, sum(count for count, _ in PARTS.values()))))

    def init(key, views):
        return init_network(network)(key, [jnp.stack(views, axis=1)])

    def forward(params, target, state, batch, key):
        del target, key
        refuse_randaugment(batch.get("drawn", ()), "transformation_prediction")
        pair = jnp.stack(batch["views"], axis=1)
        y, stats = network.apply(params, state.stats, pair, train=True)
        embedding = jnp.split(y["encoder"], 2, axis=1)[0]
        targets = targets_of(batch["drawn"][1], batch["views"][1].shape[-1])
        if not targets:
            raise UserError(
                "config.augment: the second view has nothing to predict; allowed: preset=transformation, or any of "
                "second.rotate, shear, zoom, translate, perspective, brightness, contrast"
            )
        return {"embedding": embedding, "prediction": y["head"], "targets": targets}, stats

    def loss(outputs, state, batch, ctx):
        del state, batch, ctx
        targets = outputs["targets"]
        errors, start = {}, 0
        for name, (count, _) in PARTS.items():
            if name in targets:
                errors[name] = (outputs["prediction"][:, start : start + count] - targets[name]) ** 2
            start += count
        metrics = {f"{name}_error": error.mean() for name, error in errors.items()}
        return jnp.concatenate(list(errors.values()), axis=1).mean(), metrics

    return Method(init, forward, loss, shares=((), ("crop", "flip")))
