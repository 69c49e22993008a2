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
from ssl_jax.losses import binary_cross_entropy, cross_entropy
from ssl_jax.network import Network

if TYPE_CHECKING:
    from ssl_jax.encoder import Encoder

WARMUP = 0.05  # share of the steps over which the learning rate rises
ADAM = optax.scale_by_adam()


class Classifier(NamedTuple):
    """An encoder with a linear head on top.

    encoder: where it started (network, size and channels are read from it)
    params:  {"encoder": ..., "head": {"w" [D, K], "b" [K]}};  stats: of the encoder
    chosen:  lr, backbone_ratio, validation (accuracy there, or mean AUC; absent if there was nothing to choose) and
             every trial
    held_out: logits and labels of the images on which that was chosen, by a model that did not learn from them; None
             if there was nothing to choose
    """

    encoder: "Encoder"
    params: Any
    stats: Any
    chosen: dict[str, Any]
    held_out: tuple[np.ndarray, np.ndarray] | None = None


def finetune(
    encoder: "Encoder",
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    settings: Finetune,
    seed: int,
    groups: np.ndarray | None = None,
) -> Classifier:
    """Trains encoder and head on images uint8 [N, H, W, C] with labels int [N] in 0 .. classes - 1, by softmax
    cross-entropy, or with labels float [N, classes], NaN where not known, by binary cross-entropy for each class.

    AdamW with a short warm-up and a cosine to zero, for settings.steps steps or settings.epochs passes over the labels,
    whichever is longer; the model after the last step is returned. Every pair of
    settings.lr and settings.backbone_ratio is trained without a stratified settings.validation share of the labels and
    judged on it (most hits, or the larger mean AUC; then the least cross-entropy); the best one is trained again on all
    labels. groups [N], equal for images of one patient, are held out as a whole. With a single pair there is nothing to
    choose. The same seed gives the same model. One process compiles a training step once for all
    calls that agree in encoder structure, batch, classes and augmentation, whatever the number of labels.

    Raises UserError if labels and images do not fit, or if training diverges with every pair.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check(encoder, images, labels, classes)
    labels = labels.astype(np.int32 if labels.ndim == 1 else np.float32)
    weights = balance(labels, classes) if settings.class_weights == "balanced" else None
    features = encoder.embed(images) if settings.head == "probe" else None
    pairs = list(itertools.product(settings.lr, settings.backbone_ratio))
    if not pairs:
        raise UserError("config.finetune: lr or backbone_ratio is empty; allowed: at least one value each")

    def trained(chosen: np.ndarray, head: dict[str, np.ndarray], lr: float, ratio: float) -> Classifier:
        params, stats = _train(encoder, images[chosen], labels[chosen], head, weights, settings, lr, ratio, seed)
        return Classifier(encoder, params, stats, {"lr": lr, "backbone_ratio": ratio})

    def head_of(chosen: np.ndarray) -> dict[str, np.ndarray]:
        if features is None:
            width = encoder.embed(images[:1]).shape[1]
            return {"w": np.zeros((width, classes), np.float32), "b": np.zeros(classes, np.float32)}
        of = None if groups is None else groups[chosen]
        options: Any = {"seed": seed, "groups": of, "class_weights": settings.class_weights}
        probe = linear_probe(features[chosen], labels[chosen], classes=classes, **options)
        return {"w": probe.weights, "b": probe.bias}

    best, more, held_out = pairs[0], {}, None
    if len(pairs) > 1:
        fit, held = holdout(labels, settings.validation, seed, groups)
        head = head_of(fit)
        logits = [predict(trained(fit, head, *pair), images[held]) for pair in pairs]
        ranks = [rank(found, labels[held]) for found in logits]
        won = max(range(len(pairs)), key=lambda i: ranks[i])  # the first of equals
        best = pairs[won]
        trials = [
            {"lr": lr, "backbone_ratio": r, "validation": a} for (lr, r), (a, _) in zip(pairs, ranks, strict=True)
        ]
        more, held_out = {"validation": ranks[won][0], "trials": trials}, (logits[won], labels[held])
    everything = np.arange(len(labels))
    made = trained(everything, head_of(everything), *best)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params)):
        raise UserError(f"config.finetune.lr={settings.lr}: training diverged; allowed: smaller learning rates")
    return made._replace(chosen=made.chosen | more, held_out=held_out)


def predict(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """Logits float32 [N, K] of images uint8 [N, H, W, C]: of a softmax, or of K sigmoids if labels were [N, K]."""
    tuned = classifier.encoder._replace(params=classifier.params["encoder"], stats=classifier.stats)
    head = classifier.params["head"]
    return tuned.embed(images) @ np.asarray(head["w"]) + np.asarray(head["b"])


def _check(encoder: "Encoder", images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"labels: {len(labels)} for {len(images)} images; allowed: one for each, at least one")
    if labels.ndim == 2:
        if labels.shape[1] != classes or np.isnan(labels).all():
            raise UserError(
                f"labels: {list(labels.shape)}; allowed: {classes} columns, at least one label that is known"
            )
        low, high, most = np.nanmin(labels), np.nanmax(labels), 1
    else:
        low, high, most = labels.min(), labels.max(), classes - 1
    if low < 0 or high > most:
        raise UserError(f"labels: {low if low < 0 else high}; allowed: 0 to {most}")
    if images.shape[-1] != encoder.channels:
        raise UserError(f"images: {images.shape[-1]} channels; allowed: {encoder.channels}, as the encoder was trained")


def balance(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights with which all kinds of labels weigh the same together: [K] for labels int [N]; for labels [N, K] [2, K],
    those of absent and of present in each class. They average 1 over the labels; kinds that are not there weigh 1.

    Source: King and Zeng, Political Analysis 9, 2001, as in scikit-learn's class_weight="balanced".

    >>> balance(np.array([0, 0, 0, 1]), 3).round(3)
    array([0.667, 2.   , 1.   ], dtype=float32)
    """
    if labels.ndim == 2:
        present = np.nansum(labels, axis=0)
        counts, kinds = np.stack([(~np.isnan(labels)).sum(axis=0) - present, present]), 2
    else:
        counts = np.bincount(labels, minlength=classes)
        kinds = (counts > 0).sum()
    total = counts.sum(axis=0)
    return np.where(counts > 0, total / (kinds * np.maximum(counts, 1e-9)), 1).astype(np.float32)


def _train(encoder, images, labels, head, weights, settings: Finetune, lr: float, ratio: float, seed: int):
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
        data = images[chosen], labels[chosen], weights
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
    images, labels, weights = data
    loss = binary_cross_entropy if labels.ndim == 2 else cross_entropy
    (x,), _ = make_views(views)(jax.random.fold_in(key, step), images)

    def loss_of(params):
        features, after = network.apply(params["encoder"], stats, x, train=not frozen)
        logits = features @ params["head"]["w"] + params["head"]["b"]
        return loss(logits, labels, weights=weights), after

    grads, after = jax.grad(loss_of, has_aux=True)(params)
    updates, adam = ADAM.update(grads, adam)
    rates = {"encoder": lr * ratio, "head": lr}

    def moved(rate):
        # Biases and norm scales, the vectors, are not decayed.
        return lambda p, u: p - rate * (u + decay * p if p.ndim > 1 else u)

    params = {part: jax.tree.map(moved(rates[part]), params[part], updates[part]) for part in params}
    return params, stats if frozen else after, adam
