"""What does an encoder ignore, and what does it still see? Each transform alone, at increasing strength.

moved      how far a transform moves the embedding: the cosine distance between embed(image) and embed(transformed
           image), relative to the mean distance between different images. 0: ignored; 1: as far as to another image.
readable   how well a linear model predicts the transform's parameters (angle, box, factor, whether flipped, ...) from
           frozen embeddings of unseen images. 1: exactly; 0: not at all. Numbers: R2 of a ridge regression. Yes or no:
           accuracy of a logistic regression, where always giving the more frequent answer counts as 0.

The two differ: an embedding that hardly moves may still move in a direction that reveals the parameter. That views make
an encoder blind to what they change is the starting point of LooC, https://arxiv.org/abs/2008.05659.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ssl_jax.audit.ladder import Transform, alone, bare, draw_many, in_numbers, render_each, transforms_for
from ssl_jax.augment.views import Parameters
from ssl_jax.config import View
from ssl_jax.encoder import Encoder
from ssl_jax.evaluate.linear import linear_probe

BATCH = 256
DRAWS = 4  # views of each image from which parameters are read
HELD_OUT = 0.25  # share of the images on which reading is scored
SWITCHES = ("flip", "gray", "solarize")  # transforms without a parameter: applied or not
RIDGE = tuple(10.0**k for k in range(-1, 6))
Row = dict[str, Any]


def audit(
    encoder: Encoder,
    images: np.ndarray,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    transforms: Sequence[str] = (),
) -> list[Row]:
    """Rows of transform x strength; the strength is a number of `config.augment`.

    images: uint8 [N, H, W, C], N >= 8. transforms: names in `ladder.TRANSFORMS`; (): all that have an effect.

    Each row: transform, strength, unit, moved, half (half the width of its 95 % interval over images), readable (at the
    greatest strength; the same in all rows of a transform).
    """
    images = np.asarray(images)
    base = encoder.embed(images)
    apart = between(base)
    rows = []
    available = transforms_for(images.shape[3])
    for name in transforms or available:
        log(name)
        transform = available[name]
        can_read = readable(encoder, images, transform, name, seed)
        for step, strength in enumerate(transform.strengths):
            embedded, _ = embed_transformed(encoder, images, alone(transform, strength, encoder.size), seed + step)
            moved = distance(base, embedded) / apart
            half = 1.96 * moved.std(ddof=1) / np.sqrt(len(moved))
            row = {"transform": name, "strength": strength, "unit": transform.unit}
            rows.append({**row, "moved": float(moved.mean()), "half": float(half), "readable": can_read})
    return rows


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine distance of each pair of rows [N, D]: float64 [N], from 0 to 2."""
    return 1 - (_unit(a) * _unit(b)).sum(axis=1)


def between(features: np.ndarray) -> float:
    """Mean cosine distance between different rows of [N, D]; tiny rather than 0 if all are equal."""
    unit, n = _unit(features), len(features)
    total = np.square(unit.sum(axis=0)).sum()  # of all cosines, including each row with itself
    return max(1 - (total - n) / (n * (n - 1)), 1e-9)


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def embed_transformed(encoder: Encoder, images: np.ndarray, view: View, seed: int) -> tuple[np.ndarray, Parameters]:
    """(embeddings [N, D] of one random view of each image, the parameters that were drawn)."""
    drawn = draw_many(view, len(images), seed, (images.shape[1], images.shape[2]))
    parts = []
    for start in range(0, len(images), BATCH):
        index = np.arange(start, start + BATCH) % len(images)  # full batches: one compilation
        of_batch = jax.tree.map(lambda array, index=index: array[index], drawn)
        views = render_each(images[index], of_batch, bare(view))
        parts.append(encoder.embed(views, BATCH))
    return np.concatenate(parts)[: len(images)], drawn


def readable(encoder: Encoder, images: np.ndarray, transform: Transform, name: str, seed: int) -> float:
    """How well the parameters of `transform`, at its greatest strength, can be read from the embedding: see above."""
    view = alone(transform, transform.strengths[-1], encoder.size)
    if name in SWITCHES:
        changes: dict[str, Any] = {name: 0.5}
        view = replace(view, **changes)
    many = np.tile(images, (DRAWS, 1, 1, 1))
    features, drawn = embed_transformed(encoder, many, view, seed)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(images), bool)
    held[rng.permutation(len(images))[: max(2, round(HELD_OUT * len(images)))]] = True
    return read(features, in_numbers(drawn), np.tile(held, DRAWS), switch=name in SWITCHES)


def read(features: np.ndarray, targets: np.ndarray, held: np.ndarray, switch: bool) -> float:
    """How well a linear model predicts targets [N, P] from features [N, D]; it is scored where `held` (bool [N]).

    R2, clipped at 0 and averaged over the targets; for a switch (P = 1, 0 or 1), accuracy above chance.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from threadpoolctl import threadpool_limits

    if switch:
        answer = (targets[:, 0] > 0.5).astype(np.int32)
        scores = linear_probe(features[~held], answer[~held], classes=2).scores(features[held])
        right, chance = (scores.argmax(axis=1) == answer[held]).mean(), np.bincount(answer[held]).max() / held.sum()
        return max(0.0, float((right - chance) / (1 - chance))) if chance < 1 else 0.0
    mean, std = features[~held].mean(axis=0), features[~held].std(axis=0)
    scaled = (features - mean) / np.maximum(std, 1e-6 * max(float(std.max()), 1e-12))
    with threadpool_limits(1):
        model = RidgeCV(RIDGE).fit(scaled[~held], targets[~held])
    predicted = model.predict(scaled[held]).reshape(targets[held].shape)
    return float(r2_score(targets[held], predicted, multioutput="raw_values").clip(0).mean())
