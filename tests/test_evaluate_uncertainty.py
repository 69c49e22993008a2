"""Bootstrap by patient and DeLong's test, against loops."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from ssl_jax.errors import UserError
from ssl_jax.evaluate import bootstrap_by_group, delong
from ssl_jax.evaluate.uncertainty import auc_intervals, class_aucs


def two_models(n=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.uniform(size=n) < 0.3).astype(float)
    signal = labels + rng.normal(size=n)
    a, b = ((signal + spread * rng.normal(size=n)).round(1) for spread in (0.5, 1.5))  # with ties
    return a, b, labels


def by_placement_loops(a, b, labels):
    """DeLong 1988, equations 4 to 9, one pair at a time: (AUCs, standard error of their difference)."""

    def kernel(x, y):
        return 1.0 if x > y else 0.5 if x == y else 0.0

    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    m, n = len(positives), len(negatives)
    v10 = [[sum(kernel(s[i], s[j]) for j in negatives) / n for i in positives] for s in (a, b)]
    v01 = [[sum(kernel(s[i], s[j]) for i in positives) / m for j in negatives] for s in (a, b)]
    aucs = [sum(v) / m for v in v10]

    def covariance(v, r, s, count):
        return sum((v[r][i] - aucs[r]) * (v[s][i] - aucs[s]) for i in range(count)) / (count - 1)

    total = np.array([[covariance(v10, r, s, m) / m + covariance(v01, r, s, n) / n for s in (0, 1)] for r in (0, 1)])
    return aucs, np.sqrt(total[0, 0] + total[1, 1] - 2 * total[0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_delong_equals_placement_loops(seed):
    a, b, labels = two_models(seed=seed)
    aucs, error = by_placement_loops(a, b, labels)
    found = delong(a, b, labels)
    assert (found.auc_a, found.auc_b) == pytest.approx(aucs, abs=1e-12)
    assert aucs[0] == pytest.approx(roc_auc_score(labels, a))
    assert found.difference == pytest.approx(aucs[0] - aucs[1], abs=1e-12)
    assert found.half == pytest.approx(1.959963985 * error)
    assert found.p == pytest.approx(2 * (1 - scipy.stats.norm.cdf(abs(found.difference) / error)))


def test_delong_leaves_out_the_unknown_and_swaps_sides():
    a, b, labels = two_models()
    found, swapped = delong(a, b, labels), delong(b, a, labels)
    assert swapped.difference == -found.difference and swapped.p == pytest.approx(found.p)
    padded = delong(np.append(a, [9, -9]), np.append(b, [0, 0]), np.append(labels, [np.nan, np.nan]))
    assert padded == found


def test_delong_holds_its_level():
    """Of two models that are equally good, about 5 % of draws show a difference at p < 0.05."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0.0, 1.0], [100, 60])
    ps = [delong(*(labels + rng.normal(size=(2, 160))), labels).p for _ in range(400)]
    assert 0.025 < np.mean(np.array(ps) < 0.05) < 0.08
    assert scipy.stats.kstest(ps, "uniform").pvalue > 0.01


def test_delong_at_its_limits():
    labels = np.array([0, 0, 1, 1.0])
    same = delong(labels, labels, labels)
    assert (same.difference, same.half, same.p) == (0, 0, 1)
    apart = delong(labels, -labels, labels)
    assert (apart.auc_a, apart.auc_b, apart.p) == (1, 0, 0)
    single = delong(np.array([1, 2, 3.0]), np.array([3, 2, 1.0]), np.array([0, 0, 1.0]))
    assert single.difference == 1 and np.isnan(single.half) and np.isnan(single.p)
    with pytest.raises(UserError, match="only one kind"):
        delong(labels, labels, np.ones(4))
    with pytest.raises(UserError, match="4 and 3 for 4 labels"):
        delong(labels, labels[:3], labels)


def test_bootstrap_equals_a_loop_over_the_same_draws():
    rng = np.random.default_rng(1)
    groups = rng.permutation(np.repeat([50, -3, 7, 900, 12], [4, 1, 2, 3, 2]))
    values = rng.normal(size=12)
    names = sorted(set(groups))
    members = {g: [i for i in range(12) if groups[i] == g] for g in names}
    draw, means = np.random.default_rng(5), []
    for _ in range(200):
        drawn = [names[i] for i in draw.integers(0, 5, 5)]
        means.append(np.mean([values[i] for g in drawn for i in members[g]]))
    found = bootstrap_by_group(lambda index: values[index].mean(), groups, repeats=200, seed=5)
    assert found == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1e-12)


def test_images_of_a_patient_are_not_independent():
    """Copies of each image add nothing, which only the bootstrap by patient knows; the mean's interval is textbook."""
    values = np.random.default_rng(2).normal(size=80)
    copied, groups = np.repeat(values, 9), np.repeat(np.arange(80), 9)

    def width(data, groups):
        low, high = bootstrap_by_group(lambda index: data[index].mean(), groups, repeats=2000)
        return high - low

    textbook = 2 * 1.96 * values.std() / np.sqrt(80)
    assert width(values, np.arange(80)) == pytest.approx(textbook, rel=0.06)
    assert width(copied, groups) == pytest.approx(textbook, rel=0.06)
    assert width(copied, np.arange(720)) == pytest.approx(textbook / 3, rel=0.06)


def test_what_a_draw_cannot_say_counts_nowhere():
    def statistic(index):
        return [np.nan, np.nan if 0 in index else 2.0]

    low, high = bootstrap_by_group(statistic, np.arange(4), repeats=50)
    np.testing.assert_array_equal((low, high), [[np.nan, 2], [np.nan, 2]])


def test_class_aucs_are_those_of_scikit_learn():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(70, 3)).round(1)
    labels = rng.choice([0, 1, np.nan], (70, 3), p=[0.5, 0.3, 0.2])
    labels[:, 2] = 1
    found = class_aucs(scores, labels)
    for c in (0, 1):
        known = ~np.isnan(labels[:, c])
        assert found[c] == pytest.approx(roc_auc_score(labels[known, c], scores[known, c]), abs=1e-12)
    assert np.isnan(found[2])


def test_auc_intervals_hold_the_auc_and_name_what_has_none():
    rng = np.random.default_rng(4)
    labels = np.column_stack([rng.uniform(size=90) < 0.4, np.zeros(90)]).astype(float)
    scores = labels + rng.normal(size=(90, 2))
    made = auc_intervals(scores, labels, ["a", "b"], np.arange(90) // 3)
    low, high = made["auc"]["a"]
    assert low < class_aucs(scores, labels)[0] < high and made["auc"]["b"] is None
    assert made["macro_auc"] == [low, high]
