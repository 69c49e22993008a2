"""Errors of predicted pixels, in float64 against loops, gradients against central differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.losses import masked_error


def by_hand(prediction, target, mask, power):
    errors = []
    for image, patch in np.ndindex(mask.shape):
        if mask[image, patch]:
            values = zip(prediction[image, patch], target[image, patch])
            errors += [abs(float(p) - float(t)) ** power for p, t in values]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_equal_loops(power, seed):
    generator = np.random.default_rng(seed)
    prediction, target = generator.normal(size=(2, 3, 5, 4))
    mask = generator.uniform(size=(3, 5)) < 0.6
    assert len(set(mask.sum(axis=1))) > 1 or seed  # the mean is over all patches, not first over each image's
    with jax.enable_x64(True):
        value, gradients = jax.jit(
            jax.value_and_grad(lambda p, t: masked_error(p, t, jnp.asarray(mask), power=power), argnums=(0, 1))
        )(prediction, target)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, by_hand(prediction, target, mask, power), rtol=1e-12)
    for position, gradient in enumerate(gradients):
        numeric, step = np.zeros_like(prediction), 1e-5
        for place in np.ndindex(numeric.shape):
            moved = [prediction.copy(), target.copy()]
            moved[position][place] += step
            up = by_hand(*moved, mask, power)
            moved[position][place] -= 2 * step
            numeric[place] = (up - by_hand(*moved, mask, power)) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", [1, 2])
def test_limits(power):
    prediction, target = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    everything, nothing = np.ones((3, 5), bool), np.zeros((3, 5), bool)
    error = jax.jit(jax.value_and_grad(functools.partial(masked_error, power=power)))
    plain = np.mean(np.abs(prediction - target) ** power)
    assert error(prediction, target, everything)[0] == pytest.approx(float(plain), rel=1e-6)
    assert error(target + 3, target, everything)[0] == pytest.approx(3**power, rel=1e-6)
    for mask in (nothing, everything):
        loss, gradient = error(target, target, mask)
        assert loss == 0 and np.all(np.abs(gradient) <= (power == 1) / target.size)  # |0| has any slope up to 1


@pytest.mark.parametrize("power", [1, 2])
def test_visible_patches_do_not_count(power):
    prediction, target = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    mask = np.arange(15).reshape(3, 5) % 3 == 0
    error = jax.jit(jax.value_and_grad(functools.partial(masked_error, power=power)))
    loss, gradient = error(prediction, target, mask)
    elsewhere = np.where(mask[..., None], prediction, np.float32(1e6))
    assert error(elsewhere, target, mask)[0] == loss
    assert np.all((np.asarray(gradient) != 0) == mask[..., None])
