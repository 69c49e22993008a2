"""Fine-tuning an encoder on few labels: the model that a practitioner came for."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import resolve_views
from ssl_jax.config import Finetune
from ssl_jax.data.feed import ahead
from ssl_jax.data.images import as_images, as_pixels
from ssl_jax.data.source import Images, LazyImages, images_at
from ssl_jax.encoder import Encoder, with_drop_path
from ssl_jax.errors import UserError
from ssl_jax.evaluate.linear import Probe, linear_probe
from ssl_jax.evaluate.mixing import draw_mix
from ssl_jax.evaluate.references import digest, pixels, regression, weights_digest
from ssl_jax.evaluate.saved import Saved
from ssl_jax.evaluate.scores import log_frequencies, selection_score
from ssl_jax.evaluate.subsets import holdout
from ssl_jax.evaluate.tuning_step import How, Supervised, copied, rates, start, take_step
from ssl_jax.parallel import batch_sharding, mesh_within, replicated

FALLING, FITTED = 0.05, 0.15  # parts of the loss of guessing: see `still_falling`
PIECE = 1_024  # images whose pixels are read at a time
SHARE = 32  # images of a batch that a device gets at least, or fewer devices are used
Watch = Callable[[float], None]


class Classifier(NamedTuple):
    """An encoder with a linear head on top.

    encoder:  the encoder that training started from; its network, size and channels still apply
    params:   {"encoder": ..., "head": {"w" [D, K], "b" [K]}};  stats: of the encoder
    chosen:   lr and backbone_ratio; if there was a choice, also validation (accuracy or mean AUC) and all trials
    held_out: logits and labels of the images that decided the choice, from a model that was not trained on them; None
              if there was no choice
    losses:   float32 [steps], the training loss of each step relative to that of guessing: of the best prediction that
              looks at no image. 1: nothing has been learnt. None if images were mixed: nobody can tell mixtures apart
    multilabel: whether an image can have several of the K classes, or none
    about:    the content of classifier.json, if it was loaded: "classes" (their names), "thresholds", "test", ...
    pixels:   the regression on raw pixels that votes beside the network (settings.pixels); None: there is none
    """

    encoder: Encoder
    params: Any
    stats: Any
    chosen: dict[str, Any]
    held_out: tuple[np.ndarray, np.ndarray] | None = None
    losses: np.ndarray | None = None
    multilabel: bool = False
    about: Mapping[str, Any] = MappingProxyType({})
    pixels: Probe | None = None

    @property
    def fitted_encoder(self) -> Encoder:
        """The encoder as it is after fine-tuning."""
        return self.encoder._replace(params=self.params["encoder"], stats=self.stats)

    @property
    def classes(self) -> list[str]:
        """The names of the K classes, in the order of the columns of `predict`; [] if it was not loaded."""
        return list(self.about.get("classes", ()))

    def embed(self, images: Any, batch: int = 256) -> np.ndarray:
        """Embeddings float32 [N, D] by the fine-tuned encoder, of images as `Encoder.embed` takes them."""
        return self.fitted_encoder.embed(images, batch)

    def logits(self, images: Any, batch: int = 256, fixed: bool = False) -> np.ndarray:
        """Logits float32 [N, K]: of a softmax, or of K sigmoids if it is multi-label. fixed: as of `Encoder.embed`.

        With a regression on raw pixels, the mean of its logits and the network's.
        """
        head = self.params["head"]
        own = self.fitted_encoder.embed(images, batch, fixed) @ np.asarray(head["w"]) + np.asarray(head["b"])
        if self.pixels is None or not len(own):
            return own
        starts = range(0, len(own), PIECE)
        shape = self.encoder.size, self.encoder.channels, self.encoder.test_side
        parts = [self.pixels.scores(pixels(as_images(images, slice(start, start + PIECE), *shape))) for start in starts]
        return (own + np.concatenate(parts)) / 2

    def predict(self, images: Any, batch: int = 256) -> np.ndarray:
        """Probabilities float64 [N, K], of images as `Encoder.embed` takes them.

        Each row sums to 1; of a multi-label classifier, each class has a probability of its own.
        """
        return probabilities(self.logits(images, batch), self.multilabel)


def finetune(
    encoder: Encoder,
    images: Images,
    labels: np.ndarray,
    *,
    classes: int,
    settings: Finetune,
    seed: int,
    groups: np.ndarray | None = None,
    watch: Watch = lambda share: None,
    saved: Path | None = None,
) -> Classifier:
    """Trains encoder and head on images uint8 [N, H, W, C].

    Labels int [N] in 0 .. classes - 1 are trained with softmax cross-entropy; labels float [N, classes], NaN where
    unknown, with binary cross-entropy per class.

    images may also be `LazyImages`: then the next batch is decoded while a step computes.

    AdamW with a short warm-up and a cosine to zero, for settings.steps steps or settings.epochs passes over the labels,
    whichever is longer. A batch is split over the devices of this process, if each gets at least SHARE images of it.
    The model after the last step is returned, or, with settings.ema, the average over the steps.

    If settings.lr and settings.backbone_ratio give more than one pair, each pair is first trained without a stratified
    settings.validation share of the labels. The pair with the best `selection_score` on that share is then trained
    again on all labels. Images of one patient have equal groups [N] and are held out together.

    The same seed gives the same model. A process compiles one training step for all calls that agree in encoder
    structure, batch, classes and augmentation, whatever the number of labels.

    watch is called after each step, with the share of its training that is done; there are `trainings(settings)`.

    saved: a folder. A training of more than a minute leaves its state there, and the same call goes on from it,
    bit-identically. Whoever calls removes it.

    Raises UserError if labels and images do not fit, or if training diverges with every pair.
    """
    pairs = list(itertools.product(settings.lr, settings.backbone_ratio))
    if not pairs:
        raise UserError("config.finetune: lr or backbone_ratio is empty; give at least one value for each")
    options: Any = {"classes": classes, "settings": settings, "seed": seed, "groups": groups}
    task = task_of(encoder, images, labels, **options, watch=watch, saved=saved)
    best, choice, held_out = pairs[0], {}, None
    if len(pairs) > 1:
        kept, held = task.holdout()
        shown = images_at(task.images, held)
        logits = [made.logits(shown, fixed=True) for made in task.fit(kept, pairs)]
        scores = [selection_score(each, task.labels[held]) for each in logits]
        winner = max(range(len(pairs)), key=lambda i: scores[i])  # the first of equals
        trials = [
            {"lr": lr, "backbone_ratio": ratio, "validation": score}
            for (lr, ratio), (score, _) in zip(pairs, scores, strict=True)
        ]
        best, held_out = pairs[winner], (logits[winner], task.labels[held])
        choice = {"validation": scores[winner][0], "trials": trials}
    [classifier] = task.fit(task.everything, [best])
    check_finite(classifier, f"config.finetune.lr={settings.lr}: training diverged; use smaller learning rates")
    return classifier._replace(chosen=classifier.chosen | choice, held_out=held_out)


def length(settings: Finetune, labels: int) -> int:
    """Steps of one training."""
    return max(settings.steps, math.ceil(settings.epochs * labels / settings.batch))


def trainings(settings: Finetune) -> tuple[int, int]:
    """How many times `train_classifier` trains: on labelled images only, and a student on the others, too."""
    pairs = len(settings.lr) * len(settings.backbone_ratio)
    choice, students = pairs > 1, settings.unlabelled == "all"
    if not students:
        return pairs + choice, 0
    taught = settings.teacher == "finetuned"  # and once more, without the labels that decide
    return (pairs + choice + (taught and choice) if taught or choice else 0), 1 + choice


class Batch(NamedTuple):
    """What a step of training takes beside the labelled images.

    objective: (predict, data, key) -> (loss, (statistics, loss of the labelled images)), compiled once for all that are
               equal; predict: images float [B, s, s, C] -> (logits [B, K], statistics).
    more:      step -> further arrays of `data`, which are (images, labels, class weights), followed by these
    """

    objective: Callable[..., Any]
    more: Callable[[int], tuple[Any, ...]]


class Task(NamedTuple):
    """Labelled images, and all that a training on any part of them takes."""

    encoder: Encoder
    images: Images
    labels: np.ndarray
    groups: np.ndarray | None
    classes: int
    features: np.ndarray | None  # of the images, if the head starts from a probe
    pixels: np.ndarray | None  # of the images, if a regression on them votes
    weights: np.ndarray | None  # of the classes
    settings: Finetune
    seed: int
    watch: Watch
    saved: Path | None = None  # a folder for what a killed training goes on from
    key: str = ""  # a hash of all that a training depends on, if there is such a folder

    @property
    def mixes(self) -> bool:
        return bool(self.settings.mixup or self.settings.cutmix)

    @property
    def everything(self) -> np.ndarray:
        return np.arange(len(self.labels))

    def holdout(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (to train on, to choose by) if something is to be chosen."""
        return holdout(self.labels, self.settings.validation, self.seed, self.groups)

    def fit(
        self,
        index: np.ndarray,
        pairs: Sequence[tuple[float, float]],
        batch: Batch | None = None,
        stops: Sequence[float] = (1.0,),
    ) -> Iterator[Classifier]:
        """A classifier for each pair (lr, backbone_ratio), trained on the images at `index`; with several `stops`, one
        for each, as it is after that share of the steps."""
        head, beside = self._initial_head(index), self._beside(index)
        for lr, ratio in pairs:
            for params, stats, losses in _train(self, index, head, lr, ratio, batch, stops):
                told: Any = {"multilabel": self.labels.ndim == 2, "pixels": beside}
                told["losses"] = None if self.mixes else losses
                yield Classifier(self.encoder, params, stats, {"lr": lr, "backbone_ratio": ratio}, **told)

    def _beside(self, index: np.ndarray) -> Probe | None:
        raw = self.pixels
        return None if raw is None else regression(raw[index], self.labels[index], **self._options(index))

    def _options(self, index: np.ndarray) -> dict[str, Any]:
        """Of a regression on the images at `index`."""
        groups, weights = None if self.groups is None else self.groups[index], self.settings.class_weights
        return {"classes": self.classes, "seed": self.seed, "groups": groups, "class_weights": weights}

    def _initial_head(self, index: np.ndarray) -> dict[str, np.ndarray]:
        if self.features is None:
            return {
                "w": np.zeros((self.encoder.width, self.classes), np.float32),
                "b": np.zeros(self.classes, np.float32),
            }
        probe = linear_probe(self.features[index], self.labels[index], **self._options(index))
        return {"w": probe.weights, "b": probe.bias}


def task_of(
    encoder: Encoder,
    images: Images,
    labels: np.ndarray,
    *,
    classes: int,
    settings: Finetune,
    seed: int,
    groups: np.ndarray | None = None,
    watch: Watch = lambda share: None,
    saved: Path | None = None,
) -> Task:
    """Arguments and errors as of `finetune`."""
    if not isinstance(images, LazyImages):
        images = as_pixels(np.asarray(images), "images")
    labels = np.asarray(labels)
    _check(encoder, images, labels, classes)
    if settings.drop_path > 0 and settings.batch_norm == "frozen":
        key = f"config.finetune.drop_path={settings.drop_path:g}"
        raise UserError(f"{key}: batch_norm=frozen applies the network as in evaluation; allowed with it: 0")
    encoder = with_drop_path(encoder, settings.drop_path) if settings.drop_path >= 0 else encoder
    labels = labels.astype(np.int32 if labels.ndim == 1 else np.float32)
    weights = balance(labels, classes) if settings.class_weights == "balanced" else None
    features = encoder.embed(images, fixed=True) if settings.head == "probe" else None
    raw = pixels(images) if settings.pixels else None
    key = ""
    if saved:
        parts = weights_digest(encoder), digest(images, labels, *([] if groups is None else [np.asarray(groups)]))
        key = json.dumps([*parts, classes, settings.inputs(), seed], sort_keys=True)
    return Task(encoder, images, labels, groups, classes, features, raw, weights, settings, seed, watch, saved, key)


def check_finite(classifier: Classifier, problem: str) -> None:
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(classifier.params)):
        raise UserError(problem)


def probabilities(logits: np.ndarray, multilabel: bool) -> np.ndarray:
    """float64 [N, K] from logits [N, K]: a softmax over classes or, if multilabel, a sigmoid per class."""
    from scipy.special import expit, softmax

    logits = np.asarray(logits, np.float64)
    return expit(logits) if multilabel else softmax(logits, axis=1)


def loss_curve(classifier: Classifier) -> list[float]:
    """The mean of `Classifier.losses` over each tenth of the steps; [] if they are not known."""
    losses: Any = [] if classifier.losses is None else classifier.losses
    return [round(float(part.mean()), 4) for part in np.array_split(losses, 10) if len(part)]


def still_falling(curve: Sequence[float]) -> str:
    """Why training was probably too short, judged by its `loss_curve`; "" if it was long enough.

    The loss fell by more than FALLING in the second half, and ends above FITTED, far from having learnt all that a few
    labels can teach. The learning rate goes to zero, so the last tenths are always flat, and say nothing.
    """
    if len(curve) < 10 or curve[4] - curve[-1] <= FALLING or curve[-1] <= FITTED:
        return ""
    return f"its training loss still fell at the end, from {curve[4]:.2f} of guessing halfway to {curve[-1]:.2f}"


def _check(encoder: Encoder, images: Images, labels: np.ndarray, classes: int) -> None:
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"labels: {len(labels)} for {len(images)} images; allowed: one per image, at least one")
    if labels.ndim == 2:
        if labels.shape[1] != classes or np.isnan(labels).all():
            raise UserError(f"labels: {list(labels.shape)}; allowed: {classes} columns with at least one known label")
        low, high, limit = np.nanmin(labels), np.nanmax(labels), 1
    else:
        low, high, limit = labels.min(), labels.max(), classes - 1
    if low < 0 or high > limit:
        raise UserError(f"labels: {low if low < 0 else high}; allowed: 0 to {limit}")
    if images.shape[-1] != encoder.channels:
        raise UserError(
            f"images: {images.shape[-1]} channels; allowed: {encoder.channels}, as in the encoder's training"
        )


def balance(labels: np.ndarray, classes: int) -> np.ndarray:
    """Class weights that give every kind of label the same total weight, on average 1 per label.

    Labels int [N] give weights [K]; labels [N, K] give [2, K], for absent and present in each class. A kind that does
    not occur has weight 1.

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


def _train(
    task: Task, index: np.ndarray, head, lr: float, ratio: float, batch: Batch | None, stops: Sequence[float]
) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """(params, stats) after each share of the steps in `stops`, which rise, and the losses up to there; the last share
    ends it. Every batch has the same shape, so the step compiles once."""
    encoder, settings, labels = task.encoder, task.settings, task.labels[index]
    objective, more = batch or _supervised(task)
    size = settings.batch
    steps = length(settings, len(labels))
    per_step = rates(lr, steps, settings.warmup)
    scales = np.float32(ratio), np.float32(settings.weight_decay)
    how = How(objective, settings.batch_norm == "frozen", settings.layer_decay, settings.clip_norm, settings.ema)
    guess = np.tile(log_frequencies(labels, head["b"].shape[0]), (len(labels), 1))
    guessing = max(-selection_score(guess, labels)[1], 1e-6)
    ends = [max(1, round(share * steps)) for share in stops]
    state, losses, begun = start(encoder.params, encoder.stats, head, how), list[Any](), 0
    # A student is not saved: what it is taught by is no part of the key.
    kept = _saved(task, index, head, lr, ratio) if task.saved and batch is None else None
    if kept:
        begun, found = kept.read({"state": state, "losses": np.zeros(ends[-1], np.float32)})
        state, losses = jax.tree.map(jnp.array, found["state"]), list(found["losses"][:begun])
        if begun:
            print(f"fine-tuning goes on after step {begun} of {steps}", flush=True)
    mesh, key = mesh_within(size, SHARE), jax.random.key(task.seed)
    if mesh.size > 1:
        state = jax.device_put(state, replicated(mesh))

    def fetch(number: int) -> tuple[Any, ...]:
        step, rows = begun + number, index[next(order)]
        data = task.images[rows], task.labels[rows], task.weights, *more(step)
        return tuple(map(split, data)) if mesh.size > 1 else data

    def split(part: Any) -> Any:
        images = getattr(part, "ndim", 0) == 4 and len(part) % mesh.size == 0
        return jax.device_put(part, batch_sharding(mesh)) if images else part

    def made() -> tuple[Any, Any, np.ndarray]:
        # Copies, because the next step donates the state.
        (params, stats), so_far = jax.device_get((copied(state[3] if how.ema else state[:2]), losses))
        return params, stats, np.asarray(so_far) / guessing

    order, left = itertools.islice(_order(len(labels), size, task.seed), begun, None), ends[-1] - begun
    if not left:
        task.watch(1.0)
        yield made()
    batches = ahead(fetch, left) if isinstance(task.images, LazyImages) else map(fetch, range(left))
    for step, data in enumerate(batches, begun):
        state, loss = take_step(state, data, key, np.int32(step), per_step[step], *scales, encoder.network, how)
        jax.block_until_ready(losses[-1:])  # of the step before, so that the device never waits for `watch`
        losses.append(loss)
        task.watch((step + 1) / ends[-1])
        if kept and (kept.due() or step + 1 == ends[-1] and kept.path.exists()):
            so_far = np.resize(jax.device_get(losses), ends[-1]).astype(np.float32)
            kept.write(step + 1, {"state": state, "losses": so_far})
        for _ in range(ends.count(step + 1)):
            yield made()


def _saved(task: Task, index: np.ndarray, head: Any, lr: float, ratio: float) -> Saved:
    assert task.saved is not None  # for mypy
    key = hashlib.sha256((task.key + digest(index, head["w"], head["b"]) + f" {lr} {ratio}").encode()).hexdigest()
    return Saved(task.saved / f"{key[:16]}.npz", key)


def _supervised(task: Task) -> Batch:
    settings = task.settings
    views = resolve_views(settings.augment, 1, task.encoder.size)

    def mix(step: int) -> tuple[Any, ...]:
        return (draw_mix(settings.mixup, settings.cutmix, views[0].size, task.seed, step),) if task.mixes else ()

    return Batch(Supervised(views, settings.label_smoothing), mix)


def _order(examples: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """`size` indices for each step: one shuffle of all examples after another, so that each is used equally often."""
    rng, left = np.random.default_rng(seed), np.zeros(0, np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, rng.permutation(examples)])
        yield left[:size]
        left = left[size:]
