"""Which images to label: orders of the images in a pool, every prefix of which is a selection.

The first 50 of 100 are the 50. A selection depends on the embeddings, the images labelled already and the seed alone.
All distances are those of embeddings of length 1. Memory is that of the embeddings, and of chunks of their distances.
"""

import functools
import heapq
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from ssl_jax.data import Source
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UserError, unknown
from ssl_jax.neighbours import distance, evened, nearest, nearest_others, normalized
from ssl_jax.progress import counting

Strategy = Literal["typical", "coverage", "kcenter", "uncertain", "margin", "random"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
BY_DOUBT = ("uncertain", "margin")  # need the probabilities of a classifier
# typical: clusters are as many as the labels will be at the end of a round. TypiClust stops at 500 clusters, too.
ROUNDS = (10, 20, 50, 100, 250, 500)
NEIGHBOURS = 20  # typical: neighbours that say how dense it is around an image (TypiClust, section 3.2)
SMALL = 5  # images; smaller clusters are hardly more than outliers, and come last (TypiClust's code drops them)
LARGE = 10_000  # images; of larger clusters so many, drawn at random, are looked at
FITTED = 200_000  # images; k-means is fitted to so many at most, drawn at random, and puts all others where they belong
SEEDED = 10_000  # images; among so many, drawn at random, k-means finds the centres to start from
PURITY = 0.95  # coverage: share of the balls in which all images are of one cluster (ProbCover, section 4)
CLASSES = 10  # coverage: clusters that stand for the classes, if their number is unknown
COVERED = 50_000  # images; coverage looks at so many at most, drawn at random, as it compares all with all
PIECE = 4_096  # images that are decoded and embedded at a time
CHUNK = 1_000  # images whose distances to all others are held at a time
ROUNDING = 1e-3  # distances below it are 0
TIERS, TURNS = 10, 100  # doubt: the most doubtful tenth comes first; its clusters, 100 at most, take turns
Lists = Sequence[Callable[[], np.ndarray]]


def select(
    features: np.ndarray,
    count: int,
    strategy: str = "typical",
    *,
    seed: int = 0,
    have: Sequence[int] | np.ndarray = (),
    groups: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    classes: int = 0,
) -> np.ndarray:
    """Indices int64 [count] of the embeddings [N, D] to label next, the most useful first.

    strategy:
      typical    k-means with as many clusters as labels; from the largest clusters without a label the image with the
                 closest neighbours (TypiClust, https://arxiv.org/abs/2202.02794). In rounds: with clusters for the 10th
                 label, the 20th and so on (ROUNDS), so that selections are nested. Embeddings are `evened` before.
      coverage   the image with the most others around it that no chosen one covers; the radius is the largest at which
                 PURITY of the balls lie within one of `classes` clusters (ProbCover, https://arxiv.org/abs/2205.11320)
      kcenter    the image farthest from all that have a label (https://arxiv.org/abs/1708.00489)
      uncertain  the most doubtful tenth first; in it, clusters take turns. Doubt is the entropy of the probabilities.
      margin     the same; doubt is how close the two largest probabilities are (https://arxiv.org/abs/2107.14263)
      random     any

    have: images that are labelled already. groups: [N], equal for images of one patient; no group gets a second label
    before every group has one. probabilities: [N, K], rows that sum to 1, or shares of K labels per image; for
    uncertain and margin.

    Raises UserError if fewer than `count` images are left.
    """
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    pool = _Pool(len(features), have, groups)
    left = int((~pool.taken).sum())
    if not 1 <= count <= left:
        raise UserError(f"labels={count}: there are {left} images to choose from; allowed: 1 to {left}")
    if strategy == "random":
        return _random(pool, count, seed)
    features = normalized(evened(features) if strategy == "typical" else features)
    if strategy in BY_DOUBT:
        if probabilities is None:
            raise ValueError(f"strategy={strategy}: needs probabilities")
        doubt = _entropy(probabilities) if strategy == "uncertain" else _closeness(probabilities)
        return _doubtful(pool, features, doubt, count, seed)
    if strategy == "coverage":
        return _covering(pool, features, count, seed, classes or CLASSES)
    return (_typical if strategy == "typical" else _farthest)(pool, features, count, seed)


def embed(encoder: Encoder, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings float32 [M, D], indices int64 [M]) of the images that can be read.

    PIECE images are decoded at a time.
    """
    features, readable = np.empty((len(source), encoder.width), np.float32), list[int]()
    with counting("embedding", "images") as progress:
        for start in range(0, len(source), PIECE):
            part = source.take(range(start, min(start + PIECE, len(source))))
            images = part.arrays()
            kept = [i for i in range(len(part)) if i not in part.replaced]  # a stand-in shows another image
            found = encoder.embed(images[kept] if part.replaced else images)
            features[len(readable) : len(readable) + len(kept)] = found
            readable += [start + i for i in kept]
            progress(start + len(part), len(source))
    return features[: len(readable)], np.array(readable, np.int64)


class _Pool:
    """taken: bool [N], the images with a label. open: bool [N], those that may be chosen next: without a label, and of
    a group that has no more labels than any other with images left."""

    def __init__(self, size: int, have: Sequence[int] | np.ndarray, groups: np.ndarray | None):
        self.group = None if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
        self.taken = np.zeros(size, bool)
        self.taken[np.asarray(have, np.int64)] = True
        self._open()

    def take(self, index: int) -> int:
        self.taken[index] = True
        self._open()
        return index

    def _open(self) -> None:
        self.open = ~self.taken
        if self.group is not None and self.open.any():
            labels = np.bincount(self.group[self.taken], minlength=self.group.max() + 1)[self.group]
            self.open &= labels == labels[self.open].min()


def _random(pool: _Pool, count: int, seed: int) -> np.ndarray:
    order, chosen = np.random.default_rng(seed).permutation(len(pool.taken)), list[int]()
    while len(chosen) < count:
        for index in order[pool.open[order]].tolist():
            if len(chosen) == count:
                break
            if pool.open[index]:
                chosen.append(pool.take(index))
    return np.array(chosen)


def _take_turns(pool: _Pool, lists: Lists, labels: np.ndarray, wanted: int) -> list[int]:
    """Up to `wanted` images, each the first open one of the list with the fewest labels, of equals the first list.

    lists: functions that return indices, the best first, always the same. labels: how many each list has, [len(lists)].
    """
    chosen: list[int] = []
    heap = [(int(number), place) for place, number in enumerate(labels)]
    heapq.heapify(heap)
    while heap and len(chosen) < wanted:
        number, place = heap[0]
        images = lists[place]()
        images = images[pool.open[images]]
        if len(images):
            chosen.append(pool.take(int(images[0])))
            heapq.heapreplace(heap, (number + 1, place))
        else:
            heapq.heappop(heap)
    return chosen


# typical


def _typical(pool: _Pool, features: np.ndarray, count: int, seed: int) -> np.ndarray:
    chosen: list[int] = []
    lists_of = functools.cache(lambda clusters: _clusters(features, clusters, seed))
    while len(chosen) < count:
        labelled = int(pool.taken.sum())
        end = next((end for end in ROUNDS if end > labelled), len(features))
        clusters, lists = lists_of(min(end, ROUNDS[-1], len(features)))
        size = np.bincount(clusters, minlength=len(lists))
        order = np.argsort(-size, kind="stable")
        labels = np.bincount(clusters[pool.taken], minlength=len(lists)) + np.where(size < SMALL, len(features), 0)
        chosen += _take_turns(pool, [lists[c] for c in order], labels[order], min(count - len(chosen), end - labelled))
    return np.array(chosen)


def _clusters(features: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, Lists]:
    """(cluster of each image int [N], for each cluster a function that returns its images, the most typical first)."""
    clusters = k_means(features, count, seed)
    by_cluster = np.argsort(clusters, kind="stable")
    parts = np.split(by_cluster, np.cumsum(np.bincount(clusters, minlength=count))[:-1])
    ordered = functools.cache(lambda c: _by_typicality(features, parts[c], seed))
    return clusters, [functools.partial(ordered, c) for c in range(count)]


def _by_typicality(features: np.ndarray, members: np.ndarray, seed: int) -> np.ndarray:
    """The members of a cluster, those with the smallest mean distance to their neighbours in it first."""
    rest = members[:0]
    if len(members) > LARGE:
        members, rest = np.split(np.random.default_rng(seed).permutation(members), [LARGE])
    if len(members) < 2:
        return members
    with _threads(len(members) ** 2 * features.shape[1]):
        _, similarity = nearest_others(features[members], min(NEIGHBOURS, len(members) - 1))
    order = np.argsort(distance(similarity).mean(axis=1), kind="stable")
    return np.concatenate([members[order], rest])


def k_means(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The cluster int32 [N] of each row of features [N, D], by k-means of scikit-learn with one start by k-means++.

    The start is found among at most SEEDED images, as it would take most of the time. k-means is fitted to at most
    FITTED images, so its memory is bounded and its time too.
    """
    import warnings

    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning

    state, rng = seed % 2**32, np.random.default_rng(seed)
    some: np.ndarray = features
    start: Any = "k-means++"
    if len(features) > FITTED:
        some = features[np.sort(rng.choice(len(features), FITTED, replace=False))]
    with _threads(some.size * clusters), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than clusters
        if len(some) > SEEDED >= clusters:
            start, _ = kmeans_plusplus(some[rng.permutation(len(some))[:SEEDED]], clusters, random_state=state)
        model = KMeans(clusters, init=start, n_init=1, random_state=state).fit(some)
        return model.labels_ if some is features else model.predict(features)


def _threads(work: int):
    """Two threads at most: the sums of three would depend, in their last bits, on which one ends first. One for little
    work, which would take longer with two."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(2 if work > 10**7 else 1, user_api="openmp")


# coverage and k-center


def _farthest(pool: _Pool, features: np.ndarray, count: int, seed: int) -> np.ndarray:
    chosen: list[int] = []
    similarity = np.full(len(features), -2, np.float32)  # to the nearest image with a label
    for index in np.flatnonzero(pool.taken):
        np.maximum(similarity, features @ features[index], out=similarity)
    if not pool.taken.any():
        chosen = _random(pool, 1, seed).tolist()
        similarity = features @ features[chosen[0]]
    while len(chosen) < count:
        chosen.append(pool.take(int(np.where(pool.open, similarity, np.inf).argmin())))
        np.maximum(similarity, features @ features[chosen[-1]], out=similarity)
    return np.array(chosen)


def _covering(pool: _Pool, features: np.ndarray, count: int, seed: int, classes: int) -> np.ndarray:
    rng, chosen, size = np.random.default_rng(seed), list[int](), len(features)
    sample = np.arange(size) if size <= COVERED else np.sort(rng.choice(size, COVERED, replace=False))
    x = features[sample]
    limit = _ball(x, k_means(x, min(classes, len(x)), seed), rng)
    uncovered, degree = np.ones(len(x), bool), np.zeros(len(x), np.int64)  # degree: uncovered images around each
    for part in _chunks(np.arange(len(x))):
        degree += (x[part] @ x.T >= limit).sum(axis=0)

    def cover(center: np.ndarray) -> None:
        new = np.flatnonzero(uncovered & (x @ center >= limit))
        uncovered[new] = False
        for part in _chunks(new):
            degree[:] -= (x[part] @ x.T >= limit).sum(axis=0)

    for index in np.flatnonzero(pool.taken):
        cover(features[index])
    while len(chosen) < count:
        best = int(np.where(pool.open[sample], degree, 0).argmax())
        if degree[best] < 1 or not pool.open[sample[best]]:  # everything is covered
            return np.concatenate([chosen, _farthest(pool, features, count - len(chosen), seed)]).astype(np.int64)
        chosen.append(pool.take(int(sample[best])))
        cover(x[best])
    return np.array(chosen)


def _ball(x: np.ndarray, clusters: np.ndarray, rng: np.random.Generator) -> float:
    """The cosine similarity at the largest radius at which PURITY of the balls hold images of one cluster only.

    A ball is pure up to the nearest image of another cluster, so the radius is a quantile of the distances to these.
    """
    queries = rng.permutation(len(x))[:CHUNK]
    closest = np.where(clusters[queries][:, None] == clusters, -1, x[queries] @ x.T).max(axis=1)
    return float(np.quantile(closest, PURITY))


# by doubt


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Of each row, float [N]; the mean over classes if they are shares of several labels."""
    from scipy.special import entr

    p = np.asarray(probabilities, np.float64)
    return entr(p).sum(axis=1) if _sums_to_one(p) else (entr(p) + entr(1 - p)).mean(axis=1)


def _closeness(probabilities: np.ndarray) -> np.ndarray:
    """One minus the difference of the two largest in each row, float [N]; of several labels, that of the closest."""
    p = np.asarray(probabilities, np.float64)
    if not _sums_to_one(p):
        return 1 - np.abs(2 * p - 1).min(axis=1)
    second, first = np.sort(p, axis=1)[:, -2:].T
    return 1 - (first - second)


def _sums_to_one(p: np.ndarray) -> bool:
    return p.shape[1] > 1 and np.allclose(p.sum(axis=1), 1, atol=1e-4)


def _doubtful(pool: _Pool, features: np.ndarray, doubt: np.ndarray, count: int, seed: int) -> np.ndarray:
    ranked, chosen = np.argsort(-doubt, kind="stable"), list[int]()
    tiers = [tier for tier in np.array_split(ranked[~pool.taken[ranked]], TIERS) if len(tier)]
    lists_of = functools.cache(lambda t: _turns(features, tiers[t], seed))
    while len(chosen) < count:  # more than once if groups get a second label
        for t in range(len(tiers)):
            if len(chosen) < count:
                lists = lists_of(t)
                chosen += _take_turns(pool, lists, np.zeros(len(lists)), count - len(chosen))
    return np.array(chosen)


def _turns(features: np.ndarray, tier: np.ndarray, seed: int) -> Lists:
    """The clusters of the images in `tier`, which keep their order; the cluster of the first image comes first."""
    clusters = k_means(features[tier], min(TURNS, max(1, len(tier) // SMALL)), seed)
    first = dict.fromkeys(clusters.tolist())
    return [functools.partial(lambda c: tier[clusters == c], c) for c in first]


# What a selection is worth


def expected(features: np.ndarray, chosen: np.ndarray, have: Sequence[int] | np.ndarray, seed: int) -> dict[str, Any]:
    """What can be said of a selection before anything is labelled, beside the mean over five random ones:

    coverage         mean distance of an image to the nearest labelled one (0: the same, 1.41: unrelated)
    near_duplicates  how many of the chosen are a near duplicate of another labelled one: closer to it than half the
                     median distance of an image to its nearest neighbour

    Each is {"chosen": value, "random": value}. Both are estimated on some thousands of the images.
    """
    features, have = normalized(features), np.asarray(have, np.int64)
    with _threads(features.size * CHUNK):
        return _expected(features, chosen, have, np.random.default_rng(seed))


def _expected(features: np.ndarray, chosen: np.ndarray, have: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    sample = rng.permutation(len(features))[: 10 * CHUNK]
    _, similarity = nearest(features[sample[:CHUNK]], features, min(2, len(features)))
    limit = max(float(np.median(distance(similarity[:, -1]))) / 2, ROUNDING)
    others = np.setdiff1d(np.arange(len(features)), have)

    def measure(selection: np.ndarray) -> tuple[float, float]:
        labelled = features[np.concatenate([selection, have])]
        apart = distance(nearest(features[sample], labelled, 1)[1])
        if len(labelled) < 2:
            return float(apart.mean()), 0.0
        near = distance(nearest_others(labelled, 1)[1][: len(selection)])
        return float(apart.mean()), float((near <= limit).sum())

    drawn = [measure(rng.choice(others, len(chosen), replace=False)) for _ in range(5)]
    numbers = zip(("coverage", "near_duplicates"), measure(chosen), np.mean(drawn, axis=0).tolist(), strict=True)
    return {name: {"chosen": mine, "random": random} for name, mine, random in numbers}


def _chunks(indices: np.ndarray) -> list[np.ndarray]:
    return [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
