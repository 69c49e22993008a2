"""Several labels per image: metrics, subsets by patient, probe and kNN, each against an independent computation."""

import numpy as np
import pytest
from scipy.special import expit

from ssl_jax.errors import UserError
from ssl_jax.evaluate import (
    holdout,
    knn_predict,
    linear_probe,
    metrics,
    nested_subset,
    reliability,
    threshold_at_sensitivity,
    without_positive,
)
from ssl_jax.evaluate.scores import selection_score

NAMES = ["a", "b", "c", "d"]


def pairs_ranked_rightly(scores, present):
    pairs = [(p > n) + (p == n) / 2 for p in scores[present] for n in scores[~present]]
    return np.mean(pairs)


def patients(n=600, seed=0):
    """Labels float32 [n, 4] with frequent, rare and very rare classes and gaps; groups [n] of one to five images."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(rng.permutation(10 * n)[:n], rng.integers(1, 6, n))[:n]
    labels = (rng.uniform(size=(n, 4)) < [0.4, 0.1, 0.03, 0.0]).astype(np.float32)
    labels[::50, 3] = 1
    labels[rng.uniform(size=labels.shape) < 0.1] = np.nan
    labels[7] = np.nan
    return labels, groups


def test_metrics_equal_loops():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(60, 4)).round(1)  # with ties
    labels = rng.choice([0, 1, np.nan], (60, 4), p=[0.6, 0.3, 0.1])
    labels[:, 3] = np.where(np.isnan(labels[:, 3]), np.nan, 0)  # no positive
    made = metrics(scores, labels, NAMES)
    brier = []
    for c, name in enumerate("abc"):
        known = ~np.isnan(labels[:, c])
        score, present = scores[known, c], labels[known, c] == 1
        assert made["auc"][name] == pytest.approx(pairs_ranked_rightly(score, present))
        thresholds = sorted(set(score[present]), reverse=True)  # area under the steps of precision over recall
        recall = [np.mean(score[present] >= t) for t in thresholds]
        precision = [present[score >= t].mean() for t in thresholds]
        assert made["ap"][name] == pytest.approx(np.diff([0, *recall]) @ precision)
        brier.append(np.mean((1 / (1 + np.exp(-score)) - present) ** 2))
        assert (made["support"][name], made["known"][name]) == (present.sum(), known.sum())
    assert made["brier"] == pytest.approx(np.mean(brier))
    assert made["macro_auc"] == pytest.approx(np.mean(list(made["auc"].values())))
    assert made["macro_ap"] == pytest.approx(np.mean(list(made["ap"].values())))
    assert made["left_out"] == ["d"] and set(made["auc"]) == set(made["ap"]) == set("abc")
    assert made["support"]["d"] == 0 < made["known"]["d"]


def test_what_cannot_be_judged_is_left_out_of_everything():
    made = metrics(np.zeros((3, 2)), np.array([[1, np.nan], [1, np.nan], [np.nan] * 2]), ["a", "b"])
    assert made["left_out"] == ["a", "b"] and not made["auc"] and not made["reliability"] and "macro_auc" not in made
    with pytest.raises(UserError, match="4 columns"):
        metrics(np.zeros((3, 2)), np.zeros((3, 4)), NAMES)
    with pytest.raises(UserError, match="not finite"):
        metrics(np.full((2, 1), np.nan), np.array([[1.0], [0.0]]), ["a"])


def test_reliability_by_hand():
    p = np.array([0.0, 0.04, 0.31, 0.38, 0.36, 1.0, 0.5])
    rows = reliability(p, np.array([0, 1, 0, 1, 1, 1, np.nan]))
    assert [(r["low"], r["count"]) for r in rows] == [(0.0, 2), (0.3, 3), (0.9, 1)]
    assert [r["observed"] for r in rows] == pytest.approx([0.5, 2 / 3, 1])
    assert [r["predicted"] for r in rows] == pytest.approx([0.02, 0.35, 1])
    # |0.02 - 0.5| x 2/6 + |0.35 - 2/3| x 3/6 + 0
    logits = np.log(np.clip(p, 1e-9, 1 - 1e-9)) - np.log1p(-np.clip(p, 1e-9, 1 - 1e-9))
    made = metrics(logits[:6, None], np.array([0, 1, 0, 1, 1, 1.0])[:, None], ["a"])
    assert made["calibration_error"] == pytest.approx(0.48 / 3 + (2 / 3 - 0.35) / 2, abs=1e-6)


@pytest.mark.parametrize("sensitivity", [0.1, 0.5, 0.8, 0.9, 1.0])
def test_threshold_is_the_largest_that_is_sensitive_enough(sensitivity):
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1, np.nan], 80, p=[0.6, 0.3, 0.1])
    scores = (rng.normal(size=80) + np.nan_to_num(labels)).round(1)
    found = threshold_at_sensitivity(scores, labels, sensitivity)

    def share(t):
        return np.mean(scores[labels == 1] >= t)

    assert found.threshold == max(t for t in scores if share(t) >= sensitivity)
    assert found.sensitivity == share(found.threshold) >= sensitivity
    assert found.specificity == np.mean(scores[labels == 0] < found.threshold)


def test_a_threshold_needs_a_positive_and_a_share():
    with pytest.raises(UserError, match="no positive"):
        threshold_at_sensitivity(np.ones(3), np.array([0, np.nan, 0]), 0.9)
    with pytest.raises(UserError, match="sensitivity=1.5"):
        threshold_at_sensitivity(np.ones(3), np.ones(3), 1.5)
    assert np.isnan(threshold_at_sensitivity(np.ones(3), np.ones(3), 0.5).specificity)


@pytest.mark.parametrize("by_patient", [True, False])
def test_subsets_are_nested_repeatable_and_hold_every_class(by_patient):
    labels, groups = patients()
    groups = groups if by_patient else None
    counts = (4, 10, 50, 250, 599)
    draws = {n: nested_subset(labels, n, 3, groups) for n in counts}
    for small, large in zip(counts, counts[1:], strict=False):
        assert set(draws[small]) < set(draws[large])
    for n, draw in draws.items():
        assert len(set(draw.tolist())) == n and 7 not in draw  # of which nothing is known
        assert not without_positive(labels[draw], NAMES)
        np.testing.assert_array_equal(draw, nested_subset(labels, n, 3, groups))
    assert set(draws[50]) != set(nested_subset(labels, 50, 4, groups))
    share = np.mean([np.nanmean(labels[nested_subset(labels, 100, s, groups)], axis=0) for s in range(40)], axis=0)
    np.testing.assert_allclose(share[:2], np.nanmean(labels, axis=0)[:2], atol=0.03)  # else drawn blindly
    with pytest.raises(UserError, match="labels=600: 599 labelled images"):
        nested_subset(labels, 600, 0, groups)


def test_subsets_keep_patients_together():
    labels, groups = patients()
    drawn = nested_subset(labels, 250, 0, groups)
    known = np.flatnonzero(~np.isnan(labels).all(axis=1))
    cut = [g for g in np.unique(groups[drawn]) if not set(known[groups[known] == g]) <= set(drawn)]
    assert len(cut) <= 1  # the last patient, so that the count is exact


def test_a_class_without_any_positive_is_named():
    labels, groups = patients()
    labels[:, 2] = np.where(np.isnan(labels[:, 2]), np.nan, 0)
    assert without_positive(labels[nested_subset(labels, 100, 0, groups)], NAMES) == ["c"]
    assert without_positive(np.array([0, 3, -1, 0]), NAMES) == ["b", "c"]


@pytest.mark.parametrize("by_patient", [True, False])
def test_holdout_takes_its_share_of_every_class(by_patient):
    labels, groups = patients()
    groups = groups if by_patient else None
    known = np.flatnonzero(~np.isnan(labels).all(axis=1))
    for seed in range(3):
        kept, held = holdout(labels, 0.2, seed, groups)
        assert sorted([*kept, *held]) == known.tolist()
        if by_patient:
            assert not set(groups[kept]) & set(groups[held])
        assert len(held) == pytest.approx(0.2 * len(known), abs=6)
        positives, of_all = np.nansum(labels[held], axis=0), np.nansum(labels, axis=0)
        np.testing.assert_allclose(positives, 0.2 * of_all, atol=2.5)
        assert (positives >= 1).all() and (np.nansum(labels[kept], axis=0) >= 1).all()


def test_holdout_of_few():
    one = np.array([[1, 0], [0, 1], [0, 0], [0, 0]], np.float32)
    kept, held = holdout(one, 0.25, 0)
    assert one[kept].any(axis=0).all() and len(held) == 1  # the single positives are learnt
    kept, held = holdout(np.eye(3, dtype=np.float32), 0.2, 0)
    assert (len(kept), len(held)) == (2, 1)
    kept, held = holdout(np.zeros((5, 2), np.float32), 0.99, 0)
    assert (len(kept), len(held)) == (1, 4)
    with pytest.raises(UserError, match="share=0.2: of 1 labelled groups"):
        holdout(one, 0.2, 0, np.zeros(4, int))


def test_one_label_an_image_goes_by_patient_too():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(-1, 4, 200), rng.integers(0, 60, 200)
    kept, held = holdout(labels, 0.25, 0, groups)
    assert not set(groups[kept]) & set(groups[held])
    assert sorted([*kept, *held]) == np.flatnonzero(labels >= 0).tolist()
    drawn = nested_subset(labels, 20, 0, groups)
    assert set(labels[drawn]) == {0, 1, 2, 3} and set(drawn) < set(nested_subset(labels, 60, 0, groups))


def separable(n=160, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 8)).astype(np.float32) * np.logspace(-2, 2, 8, dtype=np.float32) + 3
    direction = np.random.default_rng(9).normal(size=(8, 3)) / np.logspace(-2, 2, 8)[:, None]
    labels = ((features - 3) @ direction > [0, 1, 2]).astype(np.float32)
    labels[rng.uniform(size=labels.shape) < 0.15] = np.nan
    return features, np.column_stack([labels, np.zeros(n), np.ones(n)]).astype(np.float32)


def test_probe_is_one_regression_a_class_on_what_is_known():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels = separable()
    probe = linear_probe(features, labels, classes=5, grid=(0.1,))
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    for c in range(3):
        known = ~np.isnan(labels[:, c])
        want = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(scaled[known], labels[known, c])
        np.testing.assert_allclose(probe.scores(features)[:, c], want.decision_function(scaled), atol=5e-3)
    np.testing.assert_allclose(probe.weights[:, 3:], 0)  # one kind only: the share of positives, half an image off
    np.testing.assert_allclose(expit(probe.bias[3:]), [0.5 / 161, 160.5 / 161], rtol=1e-5)


def test_probe_of_soft_labels_weighs_both_answers():
    from sklearn.linear_model import LogisticRegression

    features, labels = separable()
    soft = np.where(labels[:, :1] == 1, 0.8, 0.0)
    probe = linear_probe(features, soft, classes=1, grid=(0.5,))
    scaled = (features - features.mean(0)) / features.std(0)
    both = np.concatenate([scaled, scaled]), np.repeat([1, 0], len(soft))
    want = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(*both, np.concatenate([soft, 1 - soft])[:, 0])
    np.testing.assert_allclose(probe.scores(features)[:, 0], want.decision_function(scaled), atol=5e-3)


def test_probe_chooses_by_mean_auc_and_by_patient():
    features, labels = separable(300)
    probe = linear_probe(features[:200], labels[:200], classes=5, groups=np.arange(200) // 2)
    made = metrics(probe.scores(features[200:]), labels[200:], [*NAMES, "e"])
    assert probe.validation > 0.95 and made["macro_auc"] > 0.95 and made["left_out"] == ["d", "e"]


def test_balanced_probe_gives_both_kinds_the_same_weight():
    """An unpenalised intercept brings the weighted residuals to zero: by that the weights can be told."""
    features, labels = separable()
    y = labels[:, 2]
    known, positives = ~np.isnan(y), np.nansum(y)
    for kind, absent, present in (("none", 1, 1), ("balanced", 1 / (known.sum() - positives), 1 / positives)):
        probe = linear_probe(features, y[:, None], classes=1, grid=(0.1,), class_weights=kind)
        residual = y[known] - expit(probe.scores(features)[known, 0])
        weights = np.where(y[known] == 1, present, absent)
        assert weights @ residual / weights.sum() == pytest.approx(0, abs=1e-4)


def test_selection_score_by_hand():
    scores = np.array([[2.0, 0.0], [-1.0, 0.0], [0.5, 3.0]])
    labels = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, 1.0]])
    auc, log_likelihood = selection_score(scores, labels)
    known = [-np.log(expit(2)), -np.log(expit(1)), -np.log(0.5), -np.log(expit(3))]
    assert auc == 1 and log_likelihood == pytest.approx(-np.mean(known))
    assert selection_score(scores[2:], labels[2:]) == (
        0.0,
        pytest.approx(np.log(expit(3))),
    )  # no AUC: the likelihood decides
    assert selection_score(np.full((3, 2), np.inf), labels) == (-1.0, -np.inf)


def test_knn_equals_a_brute_force_vote_of_those_who_know():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(40, 6)), rng.normal(size=(15, 6))
    labels = rng.choice([0, 1, np.nan], (40, 4), p=[0.3, 0.2, 0.5])
    labels[:, 2] = np.nan
    labels[0, 2] = labels[:, 3] = np.nan
    labels[:2, 2] = [1, 0]  # known of two: where neither is near, the whole bank answers
    got = np.asarray(knn_predict(bank, labels, queries, classes=4, k=5, temperature=0.2, chunk=4))
    answered = 0
    for query, scores in zip(queries, got, strict=True):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = sorted(range(40), key=lambda i: -similarity[i])[:5]
        for c in range(3):
            known = [i for i in nearest if not np.isnan(labels[i, c])]
            votes = {i: np.exp(similarity[i] / 0.2) for i in known}
            want = sum(votes[i] * labels[i, c] for i in known) / sum(votes.values()) if known else 0.5
            if known or c == 2:
                np.testing.assert_allclose(scores[c], want, rtol=1e-4, atol=1e-6)
                answered += 1
        assert scores[3] == 0.5  # nobody knows
    assert answered > 20
