"""Small labelled subsets of a large data set: nested, and a function of the labels and the seed alone.

Labels are int [N], one per image, -1 where unknown, or float [N, K], several per image, NaN where unknown.
With `groups` [N], equal for images of one patient, whole groups are drawn.
"""

from collections.abc import Sequence

import numpy as np

from ssl_jax.data.labelled import Labelled, labelled_indices
from ssl_jax.errors import UserError


def without_positive(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The classes without a positive image in labels [N] or [N, K]."""
    labels = np.asarray(labels)
    if labels.ndim == 1:
        return [name for number, name in enumerate(classes) if number not in labels]
    return [name for name, column in zip(classes, labels.T, strict=True) if not (column >= 0.5).any()]


def nested_subset(
    labels: np.ndarray, count: int, seed: int, groups: np.ndarray | None = None, stratified: bool = True
) -> np.ndarray:
    """Sorted indices int64 [count] of images with a known label.

    The draws of one seed are nested: 50 labels are among the 100, which are among the 250.

    With one label per image and no groups, classes keep their shares, and each has at least one example as soon as
    `count` allows it (the most frequent class first). Otherwise one positive image of each class comes first, the
    rarest class leading (`without_positive` names the classes that have none); then come whole groups in random order,
    of which only the last may be drawn in part. stratified=False: nothing but whole groups, or images, in random order.

    Raises UserError if there are fewer than `count` labelled examples.
    """
    labels = np.asarray(labels)
    if not stratified:
        order, *_ = _shuffled(labels, seed, groups)
    else:
        order = _stratified_order(labels, seed) if _single(labels, groups) else _group_order(labels, seed, groups)
    if not 1 <= count <= len(order):
        raise UserError(f"labels={count}: {len(order)} labelled images; allowed: 1 to {len(order)}")
    return np.sort(order[:count])


def without_test_part(labelled: Labelled) -> tuple[Labelled, Labelled]:
    """(to train on, to test on) of data that have no test part: a fifth is held out, always the same."""
    parts = holdout(labelled.labels, 0.2, seed=0, groups=labelled.source.groups)
    kept, held = (Labelled(labelled.source.take(part), labelled.labels[part]) for part in parts)
    return kept, held


def holdout(
    labels: np.ndarray, share: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, held out) of a stratified split of the labelled examples; `share` of them is held out.

    Every class keeps at least one example before any is held out, so a class with a single one is never tested.
    With several labels per image, or groups, whole groups are held out, and `share` of each class, the rarest first.

    Raises UserError if either part would be empty.
    """
    labels = np.asarray(labels)
    if not _single(labels, groups):
        return _group_holdout(labels, share, seed, groups)
    order = _stratified_order(labels, seed)
    kept = len(order) - max(1, round(share * len(order)))
    # The only example of a class is kept, whatever the share.
    kept = max(kept, min(len(np.unique(labels[order])), len(order) - 1)) if len(order) else 0
    if not 0 < share < 1 or kept < 1:
        raise UserError(
            f"share={share}: of {len(order)} labelled images; allowed: between 0 and 1, with at least 2 images"
        )
    return np.sort(order[:kept]), np.sort(order[kept:])


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """All labelled indices, in an order whose every prefix is stratified."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(labelled_indices(labels))
    if not len(shuffled):
        return shuffled
    by_class = np.argsort(labels[shuffled], kind="stable")
    present, counts = np.unique(labels[shuffled], return_counts=True)
    earlier = np.empty(len(shuffled), np.int64)  # how many of the same class come before
    earlier[by_class] = np.concatenate([np.arange(n) for n in counts])
    total = counts[np.searchsorted(present, labels[shuffled])]
    position = (earlier + 0.5) / total
    first = np.where(earlier == 0, -total, 0)  # one of each class leads, the most frequent class first
    return shuffled[np.lexsort((np.arange(len(shuffled)), position, first))]


# Several labels per image, or groups.


def _single(labels: np.ndarray, groups: np.ndarray | None) -> bool:
    return labels.ndim == 1 and groups is None


def _shuffled(labels: np.ndarray, seed: int, groups: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """(indices [M], positive [M, K], group [M]) of the labelled images. Groups, numbered from 0, are in random order,
    and so are the images of each."""
    rng, known = np.random.default_rng(seed), labelled_indices(labels)
    values = known if groups is None else np.asarray(groups)[known]
    number = np.unique(values, return_inverse=True)[1].reshape(-1)
    group = rng.permutation(number.max(initial=-1) + 1)[number]
    order = np.lexsort((rng.permutation(len(known)), group))
    ordered = labels[known[order]]
    positive = ordered >= 0.5 if ordered.ndim == 2 else ordered[:, None] == np.unique(ordered)
    return known[order], positive, group[order]


def _group_order(labels: np.ndarray, seed: int, groups: np.ndarray | None) -> np.ndarray:
    """All labelled indices: one positive image of each class, the rest of those groups, then the other groups."""
    index, positive, group = _shuffled(labels, seed, groups)
    first: list[int] = []
    for c in np.argsort(positive.sum(axis=0), kind="stable"):
        if positive[:, c].any() and not positive[first, c].any():
            first.append(int(positive[:, c].argmax()))
    tier = np.where(np.isin(group, group[first]), 1, 2)
    tier[first] = 0
    return np.concatenate([index[first], index[tier == 1], index[tier == 2]])


def _group_holdout(
    labels: np.ndarray, share: float, seed: int, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The split of `holdout` by groups, after Sechidis et al., ECML PKDD 2011, section 3. Rare classes are dealt first,
    because later groups cannot make up for them."""
    index, positive, group = _shuffled(labels, seed, groups)
    size = np.bincount(group)
    if not 0 < share < 1 or len(size) < 2:
        unit = "images" if groups is None else "groups"
        raise UserError(f"share={share}: of {len(size)} labelled {unit}; allowed: between 0 and 1, with at least 2")
    counts = np.zeros((len(size), positive.shape[1]), np.int64)
    np.add.at(counts, group, positive)
    held, undecided = np.zeros(len(size), bool), np.ones(len(size), bool)

    def deal(candidates: np.ndarray, number: np.ndarray, wanted: float) -> None:
        """Holds out candidates (groups) until `number` of them sums to `wanted`, and keeps the others."""
        held[candidates[np.cumsum(number[candidates]) <= wanted]] = True
        undecided[candidates] = False

    for c in np.argsort(counts.sum(axis=0), kind="stable"):
        number = counts[:, c]
        candidates = np.flatnonzero(undecided & (number > 0))
        if len(candidates) and not (number[~held & ~undecided] > 0).any():
            undecided[candidates[0]], candidates = False, candidates[1:]  # one is kept before any is held out
        deal(candidates, number, round(share * number.sum()) - number[held].sum())
    deal(np.flatnonzero(undecided), size, min(round(share * len(index)), len(index) - 1) - size[held].sum())
    if not held.any():  # then the group whose loss costs the kept part least
        alone = ((counts > 0) & ((counts > 0).sum(axis=0) == 1)).sum(axis=1)
        held[np.lexsort((size, alone))[0]] = True
    return np.sort(index[~held[group]]), np.sort(index[held[group]])
