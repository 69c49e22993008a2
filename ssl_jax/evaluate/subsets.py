"""Small labelled subsets of a large data set: stratified, nested and the same for everyone who asks with one seed."""

import numpy as np

from ssl_jax.errors import UserError


def nested_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices int64 [count] into labels int [N]; negative labels (unknown) are never drawn.

    Classes keep their shares, with at least one example each as soon as `count` allows (the most frequent first).
    The draws of one seed are nested: 50 labels are among the 100, which are among the 250.

    Raises UserError if there are fewer than `count` labelled examples.
    """
    order = _stratified_order(np.asarray(labels), seed)
    if not 1 <= count <= len(order):
        raise UserError(f"labels={count}: {len(order)} labelled images; allowed: 1 to {len(order)}")
    return np.sort(order[:count])


def holdout(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, held out) of a stratified split of the labelled examples; `share` of them is held out.

    Each class has at least one kept example before any is held out, so a class with a single one is only learnt.

    Raises UserError if either part would be empty.
    """
    order = _stratified_order(np.asarray(labels), seed)
    kept = len(order) - max(1, round(share * len(order)))
    # A class with a single example must stay among the kept, whatever the share.
    kept = max(kept, min(len(np.unique(labels[order])), len(order) - 1)) if len(order) else 0
    if not 0 < share < 1 or kept < 1:
        raise UserError(
            f"share={share}: of {len(order)} labelled images; allowed: between 0 and 1, of at least 2 images"
        )
    return np.sort(order[:kept]), np.sort(order[kept:])


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """All labelled indices in an order of which every beginning is stratified."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.flatnonzero(labels >= 0))
    if not len(shuffled):
        return shuffled
    by_class = np.argsort(labels[shuffled], kind="stable")
    found, counts = np.unique(labels[shuffled], return_counts=True)
    rank = np.empty(len(shuffled), np.int64)  # how many of the same class come before
    rank[by_class] = np.concatenate([np.arange(n) for n in counts])
    total = counts[np.searchsorted(found, labels[shuffled])]
    position = (rank + 0.5) / total
    first = np.where(rank == 0, -total, 0)  # one of each class leads, the most frequent class first
    return shuffled[np.lexsort((np.arange(len(shuffled)), position, first))]
