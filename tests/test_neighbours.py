"""Nearest neighbours against all distances in float64."""

import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.neighbours import nearest, nearest_others


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
