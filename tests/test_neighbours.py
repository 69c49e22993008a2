"""Nearest neighbours against all distances in float64."""

import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.neighbours import evened, nearest, nearest_others


def test_neighbours_are_those_of_all_distances():
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((200, 7)), rng.standard_normal((30, 7)) * 50
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank)]
    wanted = unit[0] @ unit[1].T
    index, similarity = nearest(queries, bank, 9)
    np.testing.assert_array_equal(index, np.argsort(-wanted, axis=1)[:, :9])
    np.testing.assert_allclose(similarity, -np.sort(-wanted, axis=1)[:, :9], atol=1e-5)


def test_no_image_is_its_own_neighbour_even_among_duplicates():
    features = np.repeat(np.random.default_rng(0).standard_normal((10, 4)), 5, axis=0)
    index, similarity = nearest_others(features, 4)
    assert not (index == np.arange(50)[:, None]).any()
    np.testing.assert_allclose(similarity, 1, atol=1e-5)
    assert (index // 5 == np.arange(50)[:, None] // 5).all()


def test_more_neighbours_than_embeddings():
    with pytest.raises(UserError, match="k=11: there are 10 embeddings; allowed: 1 to 10"):
        nearest_others(np.eye(10), 10)


def test_of_evened_embeddings_each_component_has_the_root_of_its_deviation():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    plain = rng.standard_normal((4000, 5)) * [100, 4, 1, 0.04, 0] + [7, 0, 0, 0, 3]
    even = evened(plain @ turn)
    assert even.dtype == np.float32
    np.testing.assert_allclose(np.sort(even.std(axis=0)), [0, 0.2, 1, 2, 10], rtol=0.03)  # one direction holds nothing
    np.testing.assert_allclose(np.cov(even.T, bias=True), np.diag(even.var(axis=0)), atol=1e-3)  # and they stay apart
    np.testing.assert_array_equal(evened(np.ones((3, 2))), 0)
