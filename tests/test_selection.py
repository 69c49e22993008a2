"""Which images to label: each strategy against loops in float64, and what holds for all of them."""

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from ssl_jax import selection
from ssl_jax.errors import UserError
from ssl_jax.neighbours import evened, normalized
from ssl_jax.selection import STRATEGIES, expected, k_means, select


def blobs(n=240, classes=6, seed=0):
    """Clusters of unequal size, on the sphere: float [n, 5], and probabilities [n, 3] of a made-up classifier."""
    rng = np.random.default_rng(seed)
    center = rng.choice(classes, n, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    features = rng.standard_normal((classes, 5))[center] * 3 + rng.standard_normal((n, 5))
    return features, rng.dirichlet([0.7] * 3, n)


def distances(features):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.sqrt(np.maximum(2 - 2 * unit @ unit.T, 0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_selections_are_nested_and_repeat(strategy):
    features, shares = blobs()
    options = {"seed": 1, "probabilities": shares}
    many = select(features, 60, strategy, **options)
    assert many.dtype == np.int64 and len(set(many.tolist())) == 60
    for count in (1, 15, 50):
        np.testing.assert_array_equal(select(features, count, strategy, **options), many[:count])
    assert select(features, 60, strategy, **options | {"seed": 2}).tolist() != many.tolist() or strategy == "coverage"
    everything = select(features, 240, strategy, **options)
    assert sorted(everything.tolist()) == list(range(240))


@pytest.mark.parametrize("strategy", ["typical", "coverage", "kcenter"])
def test_labelling_twenty_and_then_thirty_is_labelling_fifty(strategy):
    features, _ = blobs()
    fifty = select(features, 50, strategy)
    np.testing.assert_array_equal(select(features, 30, strategy, have=fifty[:20]), fifty[20:])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_group_gets_a_second_label_before_all_have_one(strategy):
    features, shares = blobs(60)
    groups = np.random.default_rng(0).integers(0, 12, 60) * 7
    have = [0, 1]
    chosen = select(features, 20, strategy, have=have, groups=groups, probabilities=shares)
    assert not set(chosen.tolist()) & set(have)
    labels = {group: 0 for group in groups.tolist()}
    for index in have:
        labels[groups[index]] += 1
    for step, index in enumerate(chosen):
        taken = [*have, *chosen[:step]]
        left = {g for i, g in enumerate(groups.tolist()) if i not in taken}
        assert labels[groups[index]] == min(labels[g] for g in left)
        labels[groups[index]] += 1


def test_typical_images_are_the_densest_of_the_largest_clusters():
    plain, _ = blobs()
    features = evened(plain)
    clusters = KMeans(10, n_init=1, random_state=3).fit(normalized(features)).labels_
    away, expected_order = distances(features), []
    for c in np.argsort(-np.bincount(clusters), kind="stable"):
        members = np.flatnonzero(clusters == c)
        near = np.sort(away[np.ix_(members, members)], axis=1)[:, 1 : min(20, len(members) - 1) + 1]
        expected_order.append(members[near.mean(axis=1).argmin()])
    np.testing.assert_array_equal(select(plain, 10, "typical", seed=3), expected_order)
    # With labels in the two largest clusters: as many clusters as labels in all, those without a label first.
    clusters = KMeans(20, n_init=1, random_state=3).fit(normalized(features)).labels_
    chosen = select(plain, 8, "typical", seed=3, have=expected_order)
    unlabelled = set(range(20)) - set(clusters[expected_order].tolist())
    assert len(set(clusters[chosen].tolist())) == 8 and set(clusters[chosen].tolist()) <= unlabelled


def test_kcenter_takes_the_image_farthest_from_all_labelled_ones():
    features, _ = blobs()
    chosen, away = select(features, 12, "kcenter", have=[5]), distances(features)
    for step, index in enumerate(chosen):
        assert away[[5, *chosen[:step]]].min(axis=0).argmax() == index


def test_coverage_takes_the_image_with_the_most_uncovered_ones_around_it():
    features, _ = blobs()
    away = distances(features)
    clusters = KMeans(6, n_init=1, random_state=0).fit(normalized(features)).labels_
    other = clusters[:, None] != clusters

    def pure(radius):
        return 1 - (other & (away <= radius)).any(axis=1).mean()

    radius = np.sqrt(
        2 - 2 * selection._ball(normalized(features).astype(np.float32), clusters, np.random.default_rng(0))
    )
    assert pure(radius - 0.002) >= 0.95 > pure(radius + 0.05)
    ball, covered = away <= radius, np.zeros(240, bool)
    for index in select(features, 12, "coverage", classes=6):
        gains = (ball & ~covered).sum(axis=1)
        assert gains[index] == gains.max()
        covered |= ball[index]


def test_doubt():
    features, shares = blobs()
    flags = shares[:, :2].round(1)
    two = np.sort(shares, axis=1)
    for strategy, doubt in [("uncertain", entropy(shares, axis=1)), ("margin", 1 - two[:, 2] + two[:, 1])]:
        chosen = select(features, 24, strategy, probabilities=shares)
        top = np.argsort(-doubt, kind="stable")[:24]  # a tenth
        assert set(chosen.tolist()) == set(top.tolist()) and chosen[0] == top[0]
        clusters = dict(zip(top.tolist(), k_means(normalized(features)[top], 4, 0), strict=True))
        assert len({clusters[i] for i in chosen[:4].tolist()}) == 4  # they take turns
    # Several labels per image: certain of both, or of none.
    flags = np.array([[0.5, 1.0], [0.9, 0.1], [1.0, 0.0]])
    assert select(np.eye(3), 3, "uncertain", probabilities=flags).tolist() == [0, 1, 2]
    assert select(np.eye(3), 3, "margin", probabilities=flags).tolist() == [0, 1, 2]


def test_large_pools_are_looked_at_in_parts(monkeypatch):
    features, _ = blobs()
    for name, value in {"LARGE": 15, "COVERED": 80, "CHUNK": 32}.items():
        monkeypatch.setattr(selection, name, value)
    for strategy in ("typical", "coverage"):
        chosen = select(features, 240, strategy)
        assert sorted(chosen.tolist()) == list(range(240))
        np.testing.assert_array_equal(select(features, 40, strategy), chosen[:40])
    whole = k_means(normalized(features), 6, 0)
    for name in ("SEEDED", "FITTED"):
        monkeypatch.setattr(selection, name, 200)
        assert adjusted_rand_score(whole, k_means(normalized(features), 6, 0)) > 0.7


def test_what_is_expected():
    features, _ = blobs()
    features[1] = features[0] * (1 + 1e-4)
    away, chosen = distances(features), np.array([0, 1, 30, 60])
    found = expected(features, chosen, [2], seed=0)
    assert found["coverage"]["chosen"] == pytest.approx(away[[*chosen, 2]].min(axis=0).mean(), abs=1e-3)
    assert found["near_duplicates"]["chosen"] == 2 and found["near_duplicates"]["random"] < 2
    best = expected(features, select(features, 20, "kcenter"), [], seed=0)
    assert best["near_duplicates"]["chosen"] == 0


def test_mistakes():
    with pytest.raises(UserError, match="labels=9: there are 8 images to choose from; allowed: 1 to 8"):
        select(np.eye(10), 9, have=[0, 3])
    with pytest.raises(UserError, match="strategy='typicl': unknown; did you mean 'typical'"):
        select(np.eye(10), 3, "typicl")
