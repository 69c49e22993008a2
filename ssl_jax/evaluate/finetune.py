"""Fine-tuning an encoder on few labels: the model that a practitioner came for."""

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.config import Finetune, View
from ssl_jax.errors import UserError
from ssl_jax.evaluate.linear import linear_probe, rank
from ssl_jax.evaluate.subsets import holdout
from ssl_jax.methods.base import Network

if TYPE_CHECKING:
    from ssl_jax.encoder import Encoder

WARMUP = 0.05  # share of the steps over which the learning rate rises
ADAM = optax.scale_by_adam()


class Classifier(NamedTuple):
    """An encoder with a linear head on top.

    encoder: where it started (network, size and channels are read from it)
    params:  {"encoder": ..., "head": {"w" [D, K], "b" [K]}};  stats: of the encoder
    chosen:  lr, backbone_ratio, validation (accuracy there; absent if there was nothing to choose) and every trial
    """

    encoder: "Encoder"
    params: Any
    stats: Any
    chosen: dict[str, Any]


def finetune(
    encoder: "Encoder", images: np.ndarray, labels: np.ndarray, *, classes: int, settings: Finetune, seed: int
) -> Classifier:
    """Trains encoder and head on images uint8 [N, H, W, C] with labels int [N] in 0 .. classes - 1.

    AdamW with a short warm-up and a cosine to zero, for settings.steps steps or settings.epochs passes over the labels,
    whichever is longer; the model after the last step is returned. Every pair of
    settings.lr and settings.backbone_ratio is trained without a stratified settings.validation share of the labels and
    judged on it (most hits, then least cross-entropy); the best one is trained again on all labels. With a single pair
    there is nothing to choose. The same seed gives the same model. One process compiles a training step once for all
    calls that agree in encoder structure, batch, classes and augmentation, whatever the number of labels.

    Raises UserError if labels and images do not fit, or if training diverges with every pair.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check(encoder, images, labels, classes)
    features = encoder.embed(images) if settings.head == "probe" else None
    pairs = list(itertools.product(settings.lr, settings.backbone_ratio))
    if not pairs:
        raise UserError("config.finetune: lr or backbone_ratio is empty; allowed: at least one value each")

    def trained(chosen: np.ndarray, head: dict[str, np.ndarray], lr: float, ratio: float) -> Classifier:
        params, stats = _train(encoder, images[chosen], labels[chosen], head, settings, lr, ratio, seed)
        return Classifier(encoder, params, stats, {"lr": lr, "backbone_ratio": ratio})

    def head_of(chosen: np.ndarray) -> dict[str, np.ndarray]:
        if features is None:
            width = encoder.embed(images[:1]).shape[1]
            return {"w": np.zeros((width, classes), np.float32), "b": np.zeros(classes, np.float32)}
        probe = linear_probe(features[chosen], labels[chosen], classes=classes, seed=seed)
        return {"w": probe.weights, "b": probe.bias}

    best, more = pairs[0], {}
    if len(pairs) > 1:
        fit, held = holdout(labels, settings.validation, seed)
        head = head_of(fit)
        ranks = [rank(predict(trained(fit, head, *pair), images[held]), labels[held]) for pair in pairs]
        won = max(range(len(pairs)), key=lambda i: ranks[i])  # the first of equals
        best = pairs[won]
        trials = [
            {"lr": lr, "backbone_ratio": r, "validation": a} for (lr, r), (a, _) in zip(pairs, ranks, strict=True)
        ]
        more = {"validation": ranks[won][0], "trials": trials}
    everything = np.arange(len(labels))
    made = trained(everything, head_of(everything), *best)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params)):
        raise UserError(f"config.finetune.lr={settings.lr}: training diverged; allowed: smaller learning rates")
    return made._replace(chosen=made.chosen | more)


def predict(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """Logits float32 [N, K] of images uint8 [N, H, W, C]."""
    tuned = classifier.encoder._replace(params=classifier.params["encoder"], stats=classifier.stats)
    head = classifier.params["head"]
    return tuned.embed(images) @ np.asarray(head["w"]) + np.asarray(head["b"])


def _check(encoder: "Encoder", images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"labels: {len(labels)} for {len(images)} images; allowed: one for each, at least one")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"labels: {wrong}; allowed: 0 to {classes - 1}")
    if images.shape[-1] != encoder.channels:
        raise UserError(f"images: {images.shape[-1]} channels; allowed: {encoder.channels}, as the encoder was trained")


def _train(encoder, images, labels, head, settings: Finetune, lr: float, ratio: float, seed: int):
    """(params, stats) after the last step. Only batches of one shape enter the compiled step."""
    from ssl_jax.augment import resolve

    views = resolve(settings.augment, 1, encoder.size)
    batch = settings.batch
    steps = max(settings.steps, math.ceil(settings.epochs * len(labels) / batch))
    order = _order(len(labels), steps * batch, seed)
    state = _start(encoder.params, encoder.stats, head)
    key = jax.random.key(seed)
    rates = (lr * _schedule(steps)).astype(np.float32)
    constants = np.float32(ratio), np.float32(settings.weight_decay)
    fixed = encoder.network, views, settings.batch_norm == "frozen"
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        data = images[chosen], labels[chosen].astype(np.int32)
        state = _step(state, data, key, np.int32(step), rates[step], *constants, *fixed)
    params, stats, _ = jax.device_get(state)
    return params, stats


def _order(examples: int, count: int, seed: int) -> np.ndarray:
    """`count` indices: one shuffle of all examples after the other, so each is used equally often."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(examples) for _ in range(-(-count // examples))])[:count]


def _schedule(steps: int) -> np.ndarray:
    """Factor of the learning rate at each step: a linear rise, then a cosine to almost zero."""
    done = np.arange(steps)
    return np.minimum(1, (done + 1) / max(1, round(WARMUP * steps))) * (1 + np.cos(np.pi * done / steps)) / 2


@jax.jit
def _start(params, stats, head):
    params = {"encoder": params, "head": head}
    return jax.tree.map(jnp.copy, (params, stats, ADAM.init(params)))  # copies: the step gives its buffers away


@functools.partial(jax.jit, static_argnums=(7, 8, 9), donate_argnums=0)
def _step(state, data, key, step, lr, ratio, decay, network: Network, views: tuple[View, ...], frozen: bool):
    from ssl_jax.augment import make_views

    params, stats, adam = state
    images, labels = data
    (x,), _ = make_views(views)(jax.random.fold_in(key, step), images)

    def loss_of(params):
        features, after = network.apply(params["encoder"], stats, x, train=not frozen)
        logits = features @ params["head"]["w"] + params["head"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

    grads, after = jax.grad(loss_of, has_aux=True)(params)
    updates, adam = ADAM.update(grads, adam)
    rates = {"encoder": lr * ratio, "head": lr}

    def moved(rate):
        # Biases and norm scales, the vectors, are not decayed.
        return lambda p, u: p - rate * (u + decay * p if p.ndim > 1 else u)

    params = {part: jax.tree.map(moved(rates[part]), params[part], updates[part]) for part in params}
    return params, stats if frozen else after, adam
