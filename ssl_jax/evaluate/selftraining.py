"""Self-training: a student learns what few labels say of images without any, by a classifier or over a graph."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.augment import make_views, resolve_views
from ssl_jax.config import Config, Finetune, View
from ssl_jax.data import open_source
from ssl_jax.data.feed import order
from ssl_jax.data.source import Images, LazyImages, Source, images_at
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UserError
from ssl_jax.evaluate.finetuning import (
    Batch,
    Classifier,
    Watch,
    check_finite,
    finetune,
    probabilities,
    task_of,
)
from ssl_jax.evaluate.propagation import Neighbourhood
from ssl_jax.evaluate.references import digest
from ssl_jax.evaluate.scores import class_shares, selection_score
from ssl_jax.evaluate.tuning_step import loss_of_labels
from ssl_jax.losses import binary_cross_entropy, cross_entropy
from ssl_jax.settings import data_of, images_only

STOPS = (0.25, 0.5, 0.75, 1.0)  # shares of its steps after which a student may stop
ALMOST_NEVER = 1e-6  # the smallest probability that a teacher gives


def self_train(
    teacher: Classifier | None,
    encoder: Encoder,
    images: Images,
    labels: np.ndarray,
    unlabelled: "Images | Source | Unlabelled",
    *,
    classes: int,
    settings: Finetune,
    seed: int,
    groups: np.ndarray | None = None,
    watch: Watch = lambda share: None,
    saved: Path | None = None,
) -> Classifier:
    """A student of `teacher`, which `finetune` trained on the same images uint8 [N, H, W, C] and labels, with the same
    settings and seed; or the teacher, if that is better. None: there is none to compare with, as it takes none to teach
    (settings.teacher="propagated") and no learning rate was to be chosen.

    unlabelled: images uint8 [M, H, W, C] without labels, or a source of such images, which is decoded batch by batch.
    Some of the labelled ones may be among them.

    The student starts from `encoder`, as its teacher did, with the learning rates that were best for that. Its loss is
    (1 - w) times that of the labels plus w = settings.unlabelled_weight times one of the following:

      soft         cross-entropy between the teacher's probabilities and the student's, both at settings.temperature
                   (SimCLR v2, https://arxiv.org/abs/2006.10029, section 3)
      consistency  cross-entropy between the student's own answer to a weak view, if its probability is at least
                   settings.confidence, and its probabilities for a strong view (FixMatch,
                   https://arxiv.org/abs/2001.07685, section 2). Of classes of which the teacher is sure less often,
                   less is asked (FlexMatch, https://arxiv.org/abs/2110.08263, equations 5 to 12)

    With several labels per image, each class has a sigmoid for itself. With settings.align, probabilities are first
    scaled so that classes are as frequent as among the labels, or equally frequent (ReMixMatch,
    https://arxiv.org/abs/1911.09785, section 3.1), by factors that come from the teacher.

    If `finetune` held labels out to choose by, a teacher and a student without these are compared on them, and the
    student is kept unless it has fewer hits, or a smaller mean AUC. They also say when it stops: after the share of its
    steps, one of STOPS, at which it has the best `selection_score`. No other label takes part in a choice. The student
    is then trained on all labels.

    With settings.teacher="propagated", the probabilities are those of the labels spread over the graph of the nearest
    neighbours in the embedding of `encoder` (`propagate`).

    saved: as of `finetune`, for what is trained on labels only; a student begins anew.

    The teacher looks at each image once, without its gradient. The same seed gives the same student.

    Raises UserError if there are no images without a label, if they have another shape, or if training diverges.
    """
    _check_mixing(settings)
    options: Any = {"classes": classes, "settings": settings, "seed": seed, "groups": groups}
    task = task_of(encoder, images, labels, **options, watch=watch, saved=saved)
    pool = unlabelled if isinstance(unlabelled, Unlabelled) else Unlabelled(unlabelled)
    _check(task.images, pool.images)
    propagated = settings.teacher == "propagated"
    pair = settings.lr[0], settings.backbone_ratio[0]
    if teacher is not None:
        pair = teacher.chosen["lr"], teacher.chosen["backbone_ratio"]

    def taught_by(teacher: Classifier | None, index: np.ndarray, stops: Sequence[float]) -> list[Classifier]:
        if propagated:
            known = encoder.embed(images_at(task.images, index), fixed=True), task.labels[index]
            targets = _logits(pool.neighbourhood(encoder).spread(*known, classes), task.labels.ndim == 2)
        else:
            assert teacher is not None  # for mypy: only a propagated one is missing
            targets = teacher.logits(pool.images, fixed=True)
        lessons = _lessons(targets, encoder, pool, task.labels[index], settings, seed)
        return list(task.fit(index, [pair], lessons, stops))

    choice, held_out, stop = dict[str, Any](), None, STOPS[-1]
    chosen = {} if teacher is None else teacher.chosen
    if teacher is not None and teacher.held_out is not None:
        kept, held = task.holdout()
        [deputy] = [None] if propagated else task.fit(kept, [pair])
        answers = [made.logits(images_at(task.images, held), fixed=True) for made in taught_by(deputy, kept, STOPS)]
        scores = [selection_score(each, task.labels[held]) for each in answers]
        best = max(range(len(STOPS)), key=lambda i: (scores[i], i))  # the last of equals
        before, (after, _) = selection_score(teacher.held_out[0], task.labels[held])[0], scores[best]
        choice = {"teacher_validation": before, "student_validation": after, "student": after >= before}
        if not choice["student"]:
            return teacher._replace(chosen=chosen | choice)
        stop, held_out = STOPS[best], (answers[best], task.labels[held])
        choice |= {"validation": after, "stop": stop}
    [student] = taught_by(teacher, task.everything, (stop,))
    check_finite(student, f"config.finetune.lr={pair[0]}: the student's training diverged; use smaller learning rates")
    return student._replace(chosen=student.chosen | chosen | {"student": True} | choice, held_out=held_out)


def train_classifier(
    encoder: Encoder,
    images: Images,
    labels: np.ndarray,
    unlabelled: "Unlabelled | None",
    **options: Any,
) -> Classifier:
    """`finetune`, and then `self_train` on the other images, if settings.unlabelled says so."""
    settings: Finetune = options["settings"]
    if settings.unlabelled == "none" or unlabelled is None:
        return finetune(encoder, images, labels, **options)
    _check_mixing(settings)
    nothing_to_choose = len(settings.lr) == len(settings.backbone_ratio) == 1
    untaught = settings.teacher == "propagated" and nothing_to_choose
    teacher = None if untaught else finetune(encoder, images, labels, **options)
    return self_train(teacher, encoder, images, labels, unlabelled, **options)


class Unlabelled:
    """Images uint8 [M, H, W, C], or a source of such images (`Source.all_images`), whose labels are not looked at."""

    def __init__(self, images: Images | Source):
        self._given = images
        self._last: tuple[Any, Neighbourhood] | None = None
        # Of the source, also where its images are in memory, so that this does not change their order.
        self.blocks = images.blocks if isinstance(images, Source) else None

    @functools.cached_property
    def images(self) -> Images:
        given = self._given
        images = given.all_images() if isinstance(given, Source) else given
        if isinstance(images, LazyImages):
            source = images.source.take(range(len(images)))
            source.forget_labels()  # any image may stand in for one that is damaged
            images = LazyImages(source)
        return images

    @functools.cached_property
    def digest(self) -> str:
        """Of all images, or of their names if they do not fit."""
        return self.images.digest() if isinstance(self.images, LazyImages) else digest(self.images)

    def neighbourhood(self, encoder: Encoder) -> Neighbourhood:
        """In the embedding of `encoder`; that of the last encoder is kept."""
        if self._last is None or self._last[0] is not encoder.params:
            self._last = encoder.params, Neighbourhood(encoder.embed(self.images, fixed=True))
        return self._last[1]


def unlabelled_of(encoder: Encoder, config: Config, data: str) -> Unlabelled:
    """The images that --unlabelled names, or else those of config.data, in the encoder's size.

    Raises UserError if neither is given, or the images cannot be found.
    """
    if not data and not config.data.name:
        raise UserError("--unlabelled: missing; config.finetune.unlabelled=all needs it, or the folder of a run")
    spec = encoder.data(data_of(data, "--unlabelled", config.data) if data else config.data)
    return Unlabelled(open_source(images_only(spec)))


def _check_mixing(settings: Finetune) -> None:
    for key in ("mixup", "cutmix"):
        if value := getattr(settings, key):
            raise UserError(f"config.finetune.{key}={value:g}: a teacher knows no mixtures; allowed with unlabelled: 0")


def _check(images: Images, unlabelled: Images) -> None:
    if not len(unlabelled):
        raise UserError(
            "config.finetune.unlabelled=all: there is no image without a label; allowed: at least one, or "
            "config.finetune.unlabelled=none"
        )
    shape = tuple(unlabelled.shape[-3:])
    if shape != images.shape[1:]:
        raise UserError(
            f"unlabelled images: height, width, channels {shape}; allowed: {images.shape[1:]}, as the labelled ones"
        )


def _lessons(
    targets: np.ndarray, encoder: Encoder, pool: Unlabelled, labels: np.ndarray, settings: Finetune, seed: int
) -> Batch:
    """The student's objective, and what it sees of the images without a label in each step.

    targets: a teacher's logits float32 [M, K] of the M images without a label.
    """
    offset = _alignment(targets, labels, settings.align)
    limits = thresholds(targets, settings.confidence, labels.ndim == 2)
    constants = offset, limits, *map(np.float32, (settings.unlabelled_weight, settings.temperature))
    unlabelled = pool.images
    size = min(settings.unlabelled_batch, len(unlabelled))

    def more(step: int) -> tuple[Any, ...]:
        rows = order(seed, len(unlabelled), size, step, pool.blocks)
        return unlabelled[rows], targets[rows], *constants

    views = resolve_views(settings.augment, 1, encoder.size)
    strong = resolve_views(settings.strong, 1, views[0].size) if settings.consistency else ()
    return Batch(_Objective(views, strong, settings.label_smoothing), more)


def _logits(shares: np.ndarray, several: bool) -> np.ndarray:
    """Logits of probabilities [..., K], at least ALMOST_NEVER each, in their dtype."""
    p = np.clip(shares, ALMOST_NEVER, 1 - ALMOST_NEVER)
    return np.log(p) - np.log1p(-p) if several else np.log(p)


def thresholds(logits: np.ndarray, confidence: float, several: bool) -> np.ndarray:
    """The probability from which on an answer counts, float32 [K], from a teacher's logits [M, K].

    It is `confidence` for the class of which the teacher is sure most often. For one of which it is sure b times as
    often, it is b / (2 - b) of that, so that classes that are harder to learn are not left out. With several labels per
    image, a class is sure if it is certainly present or certainly absent.

    Source: FlexMatch, https://arxiv.org/abs/2110.08263, equations 5, 7 and 12, with one teacher for all steps.
    """
    p = probabilities(logits, several)
    if several:
        sure = (np.maximum(p, 1 - p) >= confidence).sum(axis=0)
    else:
        sure = np.bincount(p.argmax(axis=1)[p.max(axis=1) >= confidence], minlength=p.shape[1])
    often = sure / sure.max() if sure.any() else np.ones(len(sure))
    return (confidence * often / (2 - often)).astype(np.float32)


def _alignment(logits: np.ndarray, labels: np.ndarray, align: bool | str) -> np.ndarray:
    """What to add to logits [M, K] of a teacher, float32 [K], so that its classes become about as frequent as
    `class_shares` says: the logarithms of the factors by which it finds them too seldom."""
    classes, several = logits.shape[1], labels.ndim == 2
    if not align:
        return np.zeros(classes, np.float32)
    wanted, found = class_shares(labels, classes, align), probabilities(logits, several).mean(axis=0)
    return (_logits(wanted, several) - _logits(found, several)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Objective:
    """The objective of a `Batch`. strong: for consistency; (): the targets are the teacher's. smoothing: of labels."""

    views: tuple[View, ...]
    strong: tuple[View, ...]
    smoothing: float = 0.0

    def __call__(self, predict: Callable[..., Any], data: tuple[Any, ...], key: jax.Array) -> tuple[jax.Array, Any]:
        images, labels, weights, unlabelled, targets, offset, confidence, share, temperature = data
        keys, several = jax.random.split(key, 3), labels.ndim == 2
        shown = [(self.views, images), (self.strong or self.views, unlabelled)]
        shown += [(self.views, unlabelled)] * bool(self.strong)
        parts = [make_views(views)(key, x)[0][0] for (views, x), key in zip(shown, keys)]
        logits, stats = predict(jnp.concatenate(parts))  # together, so that they share the statistics of BatchNorm
        own, student, *weak = jnp.split(logits, np.cumsum([len(x) for x in parts])[:-1])
        supervised, above = loss_of_labels(own, labels, weights, self.smoothing)
        if self.strong:
            taught = agreement(student, weak[0] + offset, confidence, several)
        else:
            taught = distillation(student, targets + offset, temperature, several)
        return (1 - share) * supervised + share * taught, (stats, above)


def distillation(student: jax.Array, teacher: jax.Array, temperature: jax.Array | float, several: bool) -> jax.Array:
    """Mean cross-entropy, over images, between the teacher's and the student's probabilities.

    Args:
      student, teacher: logits [B, K]. No gradient flows into the teacher's.
      temperature: divides both.
      several: K sigmoids instead of a softmax; the mean is over images and classes.

    Source: SimCLR v2, https://arxiv.org/abs/2006.10029, section 3.
    """
    student, teacher = student / temperature, jax.lax.stop_gradient(teacher) / temperature
    if several:
        return binary_cross_entropy(student, jax.nn.sigmoid(teacher))
    return optax.softmax_cross_entropy(student, jax.nn.softmax(teacher)).mean()


def agreement(strong: jax.Array, weak: jax.Array, confidence: jax.Array | float, several: bool) -> jax.Array:
    """Mean over all images of -log softmax(strong)[y], y the class of the largest weak logit; 0 for images for which
    its probability is less than `confidence`.

    Args:
      strong, weak: logits [B, K] for two views of the same images. No gradient flows into the weak ones.
      confidence: of all classes, or [K], of each.
      several: K sigmoids instead of a softmax; yes and no count from `confidence` on, and the mean is over all B K.

    Source: FixMatch, https://arxiv.org/abs/2001.07685, equation 4.
    """
    weak = jax.lax.stop_gradient(weak)
    if several:
        p = jax.nn.sigmoid(weak)
        known = jnp.maximum(p, 1 - p) >= confidence
        return binary_cross_entropy(strong, jnp.where(known, p > 0.5, jnp.nan)) * known.mean(dtype=strong.dtype)
    p = jax.nn.softmax(weak)
    known = p.max(axis=-1) >= jnp.broadcast_to(confidence, p.shape[-1])[p.argmax(axis=-1)]
    return cross_entropy(strong, jnp.where(known, p.argmax(axis=-1), -1)) * known.mean(dtype=strong.dtype)
