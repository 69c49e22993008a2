"""One compiled step of fine-tuning: views, loss, AdamW, and the average of the weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.augment import make_views
from ssl_jax.config import View
from ssl_jax.evaluate.mixing import Mix, least_loss, loss_of_targets, mix_images, soft_labels
from ssl_jax.losses import binary_cross_entropy, cross_entropy
from ssl_jax.network import Network
from ssl_jax.transforms import by_layer, matrices


def loss_of_labels(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    smoothing: float = 0.0,
    mix: Mix | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax or, for labels [B, K], binary cross-entropy; and by how much it is above the smallest that there is."""
    several = labels.ndim == 2
    if not smoothing and mix is None:
        loss = (binary_cross_entropy if several else cross_entropy)(logits, labels, weights=weights)
        return loss, loss
    targets = soft_labels(labels, logits.shape[-1], smoothing, mix)
    loss = loss_of_targets(logits, targets, weights, several)
    return loss, loss - least_loss(targets, weights, several)


@dataclass(frozen=True)
class Supervised:
    """The objective of a `Batch` of nothing but labelled images, which are mixed if `Batch.more` gives a `Mix`."""

    views: tuple[View, ...]
    smoothing: float = 0.0

    def __call__(self, predict: Callable[..., Any], data: tuple[Any, ...], key: jax.Array) -> tuple[jax.Array, Any]:
        images, labels, weights, *mix = data
        (x,), _ = make_views(self.views)(key, images)
        logits, stats = predict(mix_images(x, *mix) if mix else x)
        loss, above = loss_of_labels(logits, labels, weights, self.smoothing, *mix)
        return loss, (stats, above)


@dataclass(frozen=True)
class How:
    """What a step of training is compiled for. objective: see `Batch`; frozen: BatchNorm; the rest: see the options."""

    objective: Callable[..., Any]
    frozen: bool = False
    layer_decay: float = 1.0
    clip_norm: float = 0.0
    ema: float = 0.0


def rates(lr: float, steps: int, share: float) -> np.ndarray:
    """The learning rate at each step, float32 [steps]: a linear warm-up over a share times a cosine from lr to 0.

    In NumPy: optax's schedules would compile eleven programs for each number of steps.
    """
    step = np.arange(steps)
    warmup = np.minimum(1, (step + 1) / max(1, round(share * steps)))
    return (lr * warmup * (1 + np.cos(np.pi * step / steps)) / 2).astype(np.float32)


def _adamw(lr: Any, ratio: Any, decay: Any, how: How) -> optax.GradientTransformation:
    """AdamW at rate lr for the head and lr * ratio for the encoder; decay applies to matrices only.

    All three may be traced, so one compiled step serves every pair of a grid and every point of the schedule.
    """
    parts = {"encoder": lr * ratio, "head": lr}
    adamw = {part: optax.adamw(rate, weight_decay=decay, mask=matrices) for part, rate in parts.items()}
    core = optax.partition(adamw, {part: part for part in parts})
    if how.clip_norm == 0 and how.layer_decay == 1:
        return core
    before = optax.clip_by_global_norm(how.clip_norm) if how.clip_norm else optax.identity()
    after = by_layer(how.layer_decay, 0) if how.layer_decay != 1 else optax.identity()
    return optax.chain(before, core, after)


@functools.partial(jax.jit, static_argnums=3)
def start(params, stats, head, how: How):
    """(params, stats, the optimizer's state), and with how.ema the average of the first two."""
    params = {"encoder": params, "head": head}
    state = (params, stats, _adamw(0, 0, 0, how).init(params), *[(params, stats)] * bool(how.ema))
    return jax.tree.map(jnp.copy, state)  # copies, because a step donates them


@jax.jit
def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnums=(7, 8), donate_argnums=0)
def take_step(state, data, key, step, lr, ratio, decay, network: Network, how: How):
    """(state, loss) after a step. data: (images, labels, class weights), and what the objective takes beside them."""
    params, stats, opt_state, *average = state
    frozen = how.frozen

    own = jax.random.fold_in(key, step)

    def loss_of(params):
        def predict(x):
            drops = {}
            if network.drop_path and not frozen:
                drops["keys"] = jax.random.split(jax.random.fold_in(own, 1), len(x))
            features, new_stats = network.apply(params["encoder"], stats, x, train=not frozen, **drops)
            return features @ params["head"]["w"] + params["head"]["b"], new_stats

        return how.objective(predict, data, own)

    (_, (new_stats, loss)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = _adamw(lr, ratio, decay, how).update(grads, opt_state, params)
    made = optax.apply_updates(params, updates), stats if frozen else new_stats
    if average:
        keep = averaging(how.ema, step)
        average = [jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average[0], made)]
    return (*made, opt_state, *average), loss


def averaging(decay: float, step: Any) -> Any:
    """The weight of the average of the model so far, after step 0, 1, ...: min(decay, (1 + step) / (10 + step)).

    At first it follows the model closely, so that a short training does not keep the weights that it began with.
    Source: tf.train.ExponentialMovingAverage with num_updates.
    """
    return jnp.minimum(decay, (1 + step) / (10 + step))
