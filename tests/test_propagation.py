"""Label propagation against the dense equation in float64."""

import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.evaluate.propagation import Neighbourhood, propagate, spread_probe
from ssl_jax.neighbours import evening, nearest


def dense(features, known, k, alpha):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    graph = np.zeros_like(similarity)
    for i, row in enumerate(similarity):
        near = np.argsort(-row)[:k]
        graph[i, near] = np.maximum(row[near], 0) ** 3
    graph = graph + graph.T
    root = np.sqrt(graph.sum(axis=1))
    return np.linalg.solve(np.eye(len(graph)) - alpha * graph / np.outer(root, root), known)


def blobs(n=150, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % classes
    return rng.standard_normal((classes, 8))[truth] * 2 + rng.standard_normal((n, 8)), truth


@pytest.mark.parametrize("alpha", [0.5, 0.99])
def test_it_solves_the_equation(alpha):
    features, truth = blobs()
    labels = np.where(np.arange(150) < 9, truth, -1)
    spread = dense(features, np.arange(3) == labels[:, None], 7, alpha)
    found = propagate(features, labels, 3, k=7, alpha=alpha)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, spread / spread.sum(axis=1, keepdims=True), atol=1e-4)
    assert (found.argmax(axis=1) == truth).mean() > 0.9


def test_of_several_labels_each_is_spread_for_itself():
    features, truth = blobs()
    labels = np.full((150, 2), np.nan)
    labels[:12, 0] = truth[:12] == 0
    labels[:6, 1] = truth[:6] != 2
    found = propagate(features, labels, 2, k=7)
    for c in range(2):
        known = np.stack([labels[:, c] == 1, labels[:, c] == 0], axis=1)
        spread = dense(features, known, 7, 0.99)
        np.testing.assert_allclose(found[:, c], spread[:, 0] / spread.sum(axis=1), atol=1e-4)


@pytest.mark.parametrize("several", [False, True])
def test_labels_spread_from_inside_and_outside_of_a_pool(several):
    features, truth = blobs(180)
    pool, labels = Neighbourhood(features[:150]), truth.astype(np.int32)
    labels = np.eye(3, dtype=np.float32)[labels] if several else labels
    even = evening(features[:150])
    known = np.eye(3)[truth[150:159]]
    known = np.concatenate([known, 1 - known], axis=1) if several else known
    index, similarity = nearest(even(features[150:159]), even(features[:150]), 20)
    seeds = np.zeros((150, known.shape[1]))
    for row, near, weights in zip(known, index, np.maximum(similarity, 0) ** 3, strict=True):
        seeds[near] += weights[:, None] / weights.sum() * row
    spread = dense(even(features[:150]), seeds, 20, 0.97)
    wanted = spread[:, :3] / (spread[:, :3] + spread[:, 3:] if several else spread.sum(axis=1, keepdims=True))
    found = pool.spread(features[150:159], labels[150:159], 3)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert (found.argmax(axis=1) == truth[:150]).mean() > 0.9
    probe = spread_probe(features[150:159], labels[150:159], pool, classes=3, seed=0)
    assert (probe.scores(features[159:]).argmax(axis=1) == truth[159:]).mean() > 0.9


def test_an_image_that_no_label_reaches_has_equal_odds():
    features = np.concatenate([np.eye(8)[:1].repeat(5, axis=0), np.eye(8)[1:2].repeat(5, axis=0)])
    features += 0.01 * np.random.default_rng(0).standard_normal((10, 8))
    labels = np.full(10, -1)
    labels[0] = 1
    found = propagate(features, labels, 4, k=4)
    np.testing.assert_allclose(found[:5], np.eye(4)[[1] * 5], atol=1e-6)
    np.testing.assert_allclose(found[5:], 0.25)


def test_mistakes():
    with pytest.raises(UserError, match="labels: none is known; allowed: at least one"):
        propagate(np.eye(5), np.full(5, -1), 2, k=2)
    with pytest.raises(UserError, match="alpha=1: allowed: between 0 and 1"):
        propagate(np.eye(5), np.zeros(5, int), 2, k=2, alpha=1)
    with pytest.raises(UserError, match="k=6: there are 5 embeddings"):
        propagate(np.eye(5), np.zeros(5, int), 2, k=5)
    with pytest.raises(UserError, match="images without a label: 1; allowed: at least 2, to have neighbours"):
        Neighbourhood(np.ones((1, 3)))
