"""The generated set with four independent labels."""

import numpy as np
import pytest

from ssl_jax.augment import ops
from ssl_jax.config import Data
from ssl_jax.data import open_source
from ssl_jax.data.factors import ATTRIBUTES, CHROMA
from ssl_jax.errors import UserError


def labels(n, **how):
    return {a: open_source(Data(name="factors", path=f"label={a},n={n}"), **how).labels for a in ATTRIBUTES}


def test_an_image_depends_on_its_seed_part_and_index_alone():
    short, long = (open_source(Data(name="factors", path=path)) for path in ("n=5", "n=30,label=colour"))
    np.testing.assert_array_equal(short.arrays(), long.arrays()[:5])
    assert short.shape == (32, 32, 3) and short.names[4] == "train/4"
    other = open_source(Data(name="factors", path="n=5,seed=1"))
    test = open_source(Data(name="factors", path="n=5"), "test")
    assert (other.load(0) != short.load(0)).any() and (test.load(0) != short.load(0)).any()
    np.testing.assert_array_equal(labels(5)["texture"], labels(30)["texture"][:5])


def test_labels_are_even_and_independent():
    from sklearn.metrics import mutual_info_score

    found = labels(2000)
    for name, values in found.items():
        assert np.bincount(values).min() > 420 and np.bincount(values).size == len(ATTRIBUTES[name]) == 4
    for a in ATTRIBUTES:
        for b in set(ATTRIBUTES) - {a}:
            assert mutual_info_score(found[a], found[b]) < 0.012  # 9 degrees of freedom: 9 / 4000 on average


def test_each_label_is_in_the_image_and_colour_in_nothing_but_colour():
    """The mean colour tells the colour and nothing else; gone gray, it tells nothing."""
    from sklearn.linear_model import LogisticRegression

    n = 600
    images = open_source(Data(name="factors", path=f"n={n}")).arrays() / 255.0
    found = labels(n)
    colour = images.mean(axis=(1, 2))
    gray = np.asarray(ops.luma(images)).mean(axis=(1, 2))

    def accuracy(features, attribute):
        model = LogisticRegression(C=1e4, max_iter=2000).fit(features[:400], found[attribute][:400])
        return model.score(features[400:], found[attribute][400:])

    assert accuracy(colour, "colour") > 0.9
    assert max(accuracy(gray, a) for a in ATTRIBUTES if a != "shape") < 0.36  # a larger shape is a little brighter
    assert max(accuracy(colour, a) for a in ("texture", "orientation")) < 0.36
    np.testing.assert_allclose(CHROMA @ np.array(ops.GRAY), 0, atol=1e-12)
    # Waves: the direction in which neighbours differ least, at the border, where no object is.
    border = images[:, :6].mean(axis=3)
    right, down = np.abs(np.diff(border, axis=2)).mean(axis=(1, 2)), np.abs(np.diff(border, axis=1)).mean(axis=(1, 2))
    level = found["orientation"]
    assert (right > down)[level == 0].mean() > 0.95 > 0.05 > (right > down)[level == 2].mean()


@pytest.mark.parametrize(
    ("path", "message"),
    [("label=size", "label='size': unknown"), ("n=x", "'n=x'; allowed:"), ("m=3", "'m=3'"), ("n=0", "no images")],
)
def test_a_wrong_path_is_one_line(path, message):
    with pytest.raises(UserError, match=message):
        open_source(Data(name="factors", path=path))
