"""kNN, linear probe, subsets, metrics, intervals and collapse, each against an independent computation."""

import importlib
import pkgutil

import jax
import numpy as np
import pytest
import scipy.stats

from ssl_jax import evaluate
from ssl_jax.errors import UserError
from ssl_jax.evaluate import (
    embedding_std,
    holdout,
    interval,
    knn_predict,
    linear_probe,
    metrics,
    nested_subset,
    paired,
    rank_me,
)


def _blobs(n, classes, dims, seed, spread=0.3):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dims))
    labels = np.arange(n) % classes
    return (centres[labels] + spread * rng.normal(size=(n, dims))).astype(np.float32), labels


@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_knn_equals_a_brute_force_vote(chunk):
    rng = np.random.default_rng(0)
    bank, queries, labels = rng.normal(size=(40, 6)), rng.normal(size=(15, 6)), rng.integers(0, 4, 40)
    got = knn_predict(bank, labels, queries, classes=4, k=5, temperature=0.2, chunk=chunk)
    for query, scores in zip(queries, np.asarray(got), strict=True):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        want = np.zeros(4)
        for i in sorted(range(40), key=lambda i: -similarity[i])[:5]:
            want[labels[i]] += np.exp(similarity[i] / 0.2)
        np.testing.assert_allclose(scores, want / want.sum(), rtol=1e-4, atol=1e-6)


def test_knn_of_a_small_bank_is_an_error():
    with pytest.raises(UserError, match=r"k=20: the bank holds 10 .* 1 to 10"):
        knn_predict(np.ones((10, 3)), np.zeros(10, int), np.ones((2, 3)), classes=2)


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_probe_separates_what_is_separable(classes):
    features, labels = _blobs(200, classes, 16, seed=1)
    scaled = features * np.logspace(-3, 3, 16, dtype=np.float32) + 7  # the probe has to find the scale itself
    probe = linear_probe(scaled[:100], labels[:100], classes=classes)
    assert (probe.scores(scaled[100:]).argmax(1) == labels[100:]).mean() > 0.97
    assert probe.validation > 0.95 and probe.weights.shape == (16, classes)


def test_folded_scaling_gives_the_logits_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels = _blobs(90, 3, 8, seed=2, spread=2.0)
    probe = linear_probe(features, labels, classes=3, grid=(0.1,))
    scaler = StandardScaler().fit(features.astype(np.float64))
    want = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(scaler.transform(features), labels)
    assert probe.strength == 0.1 and np.isnan(probe.validation)
    np.testing.assert_allclose(probe.scores(features), want.decision_function(scaler.transform(features)), atol=5e-3)


def test_linear_probe_with_rare_absent_and_single_classes():
    features, labels = _blobs(40, 2, 8, seed=3)
    labels = np.append(labels, 4)  # class 4 once; 2 and 3 never
    probe = linear_probe(np.vstack([features, np.full((1, 8), 9.0)]), labels, classes=5)
    scores = probe.scores(features)
    assert scores.shape == (40, 5) and not np.isin(scores.argmax(1), [2, 3]).any()
    alone = linear_probe(features, np.ones(40, int), classes=3)
    assert (alone.scores(features).argmax(1) == 1).all()
    one = linear_probe(features[:1], np.array([2]), classes=3)
    assert one.scores(features[:4]).argmax(1).tolist() == [2, 2, 2, 2]


def test_linear_probe_ignores_a_constant_dimension():
    features, labels = _blobs(60, 3, 4, seed=4)
    features[:, 0] = 3.0
    moved = features + np.array([50, 0, 0, 0], np.float32)
    probe = linear_probe(features, labels, classes=3)
    np.testing.assert_allclose(probe.scores(moved), probe.scores(features), atol=1e-3)


def test_subsets_are_stratified_nested_and_repeatable():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2, -1], [600, 300, 100, 50]))
    draws = {n: nested_subset(labels, n, seed=3) for n in (1, 3, 10, 50, 100, 250, 1000)}
    for small, large in zip((1, 3, 10, 50, 100, 250), (3, 10, 50, 100, 250, 1000), strict=True):
        assert set(draws[small]) < set(draws[large])
    assert np.bincount(labels[draws[3]]).tolist() == [1, 1, 1]
    assert np.bincount(labels[draws[100]]).tolist() == [60, 30, 10]
    for n, draw in draws.items():
        assert len(set(draw.tolist())) == n and (labels[draw] >= 0).all()
        np.testing.assert_array_equal(draw, nested_subset(labels, n, seed=3))
    assert set(draws[50]) != set(nested_subset(labels, 50, seed=4))
    balanced = np.arange(1000) % 10
    assert (np.bincount(balanced[nested_subset(balanced, 50, 0)]) == 5).all()
    with pytest.raises(UserError, match="labels=1001: 1000 labelled images"):
        nested_subset(labels, 1001, 0)


def test_holdout_is_a_partition_that_keeps_rare_classes():
    labels = np.repeat([0, 1, 2, -1], [50, 30, 1, 9])
    kept, held = holdout(labels, 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(81)) and len(held) == 16
    assert np.bincount(labels[held], minlength=3).tolist() in ([10, 6, 0], [9, 7, 0])
    assert [len(part) for part in holdout(np.array([0, 1, 2, 3]), 0.9, 0)] == [3, 1]
    for wrong in ([0], []):
        with pytest.raises(UserError, match="share=0.2"):
            holdout(np.array(wrong, int), 0.2, 0)


def test_metrics_by_hand():
    # True classes 0 0 1 1 2 2; class "d" is absent. Predicted 0 1 1 1 2 0.
    scores = np.log(
        [
            [0.7, 0.1, 0.1, 0.1],
            [0.3, 0.5, 0.1, 0.1],
            [0.1, 0.6, 0.2, 0.1],
            [0.2, 0.4, 0.3, 0.1],
            [0.1, 0.2, 0.6, 0.1],
            [0.4, 0.2, 0.3, 0.1],
        ]
    )
    made = metrics(scores, np.array([0, 0, 1, 1, 2, 2]), ["a", "b", "c", "d"])
    assert made["top1"] == pytest.approx(4 / 6) and "top5" not in made
    assert made["recall"] == {"a": 0.5, "b": 1.0, "c": 0.5} and made["balanced_accuracy"] == pytest.approx(2 / 3)
    assert made["confusion"] == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    # Pairs ranked rightly, ties half. a: .7 .3 against .1 .2 .1 .4; b: .6 .4 against .1 .5 .2 .2;
    # c: .6 .3 against .1 .1 .2 .3
    assert made["auc"] == pytest.approx({"a": 7 / 8, "b": 7 / 8, "c": 7.5 / 8})
    assert made["macro_auc"] == pytest.approx((7 + 7 + 7.5) / 24)
    assert made["left_out"] == ["d"] and made["support"] == {"a": 2, "b": 2, "c": 2, "d": 0}


def test_metrics_of_probabilities_equal_those_of_their_logits():
    rng = np.random.default_rng(0)
    odds, labels, names = rng.dirichlet(np.ones(7), 60), rng.integers(0, 7, 60), list("abcdefg")
    a, b = metrics(odds, labels, names), metrics(np.log(odds) + rng.normal(size=(60, 1)), labels, names)
    assert a["auc"] == pytest.approx(b["auc"]) and a["top5"] == b["top5"] and 0.5 < a["top5"] < 1
    ranks = (-odds).argsort(1).argsort(1)[np.arange(60), labels]
    assert a["top5"] == pytest.approx((ranks < 5).mean())


def test_metrics_refuses_what_is_no_score():
    with pytest.raises(UserError, match="not finite"):
        metrics(np.array([[np.nan, 0.0]]), np.array([0]), ["a", "b"])
    with pytest.raises(UserError, match="2 columns"):
        metrics(np.zeros((3, 4)), np.zeros(3, int), ["a", "b"])


def test_intervals_equal_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=6) + 1, rng.normal(size=6)
    want = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    mean, half = paired(a, b)
    assert (mean - half, mean + half) == pytest.approx((want.low, want.high))
    alone = scipy.stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert interval(a)[1] == pytest.approx((alone.high - alone.low) / 2)
    assert interval([0.5])[0] == 0.5 and np.isnan(interval([0.5])[1])


def test_collapse_numbers():
    healthy = np.random.default_rng(0).normal(size=(2000, 32)).astype(np.float32)
    assert float(jax.jit(embedding_std)(healthy)) == pytest.approx(1, abs=0.02)
    assert float(embedding_std(np.ones((50, 8), np.float32))) == pytest.approx(0, abs=1e-6)
    assert 30 < float(rank_me(healthy)) <= 32
    assert float(rank_me(healthy[:, :2] @ np.ones((2, 8), np.float32))) == pytest.approx(1, abs=0.01)


def test_no_function_hides_a_module():
    for module in pkgutil.iter_modules(evaluate.__path__):
        assert importlib.import_module(f"ssl_jax.evaluate.{module.name}") is getattr(evaluate, module.name)
