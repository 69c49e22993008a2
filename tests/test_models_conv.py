"""All formulations of the convolution are the same function, with the same gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssl_jax.errors import UserError
from ssl_jax.models import layers as module
from ssl_jax.models import resolve_conv
from ssl_jax.models.layers import conv


def case(size, channels, k, batch=6):
    rng = np.random.default_rng(size + channels + k)
    x = rng.standard_normal((batch, size, size + 2, channels), np.float32)
    return x, rng.standard_normal((k, k, channels, 5), np.float32)


def values_and_gradients(function, x, kernel):
    def total(x, kernel):
        y = function(x, kernel)
        return (jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)).sum() / y.size, y

    (_, y), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, kernel)
    return y, *grads


@pytest.mark.parametrize(
    ("size", "channels", "k", "stride"),
    [
        *(
            (17, 1, 7, 2),
            (16, 3, 5, 2),
            (9, 16, 3, 1),
            (16, 4, 3, 2),
            (8, 48, 3, 1),
        ),  # the last one by Winograd's tiles
        *((8, 3, 5, 2), (2, 4, 3, 1), (6, 4, 1, 2), (5, 4, 1, 1)),  # small outputs, and single pixels
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 20_000])
def test_formulations_agree(size, channels, k, stride, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    x, kernel = case(size, channels, k)
    pad = (k - 1) // 2

    def lax_conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=numbers)

    wanted = values_and_gradients(lax_conv, x, kernel)
    for how in ("native", "patches"):
        found = values_and_gradients(lambda x, kernel, how=how: conv(x, kernel, stride, pad, how), x, kernel)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_a_loop_have_the_order_of_axes_that_is_fast(stride):
    """Micro-batches are a loop, and in a loop XLA's CPU compiler does not put axes right (over 13 times slower)."""
    x, kernel = case(16, 3, 3)

    def looped(x, kernel):
        grads = jax.grad(lambda x, kernel: jnp.sin(conv(x, kernel, stride, 1)).sum(), (0, 1))
        return lax.fori_loop(0, 2, lambda _, now: jax.tree.map(jnp.add, now, grads(*now)), (x, kernel))

    compiled = jax.jit(looped).lower(x, kernel).compile().as_text()
    assert set(re.findall(r"dim_labels=(\w+->\w+)", compiled)) == {"b01f_01io->b01f"}


def test_chunks_divide_the_batch(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 9 * 16 * 64 * 4)  # an image per device
    for batch, chunks in ((12, 3), (10, 5), (7, 7), (3, 1)):
        assert module._chunks(batch, 9 * 16 * 64 * 4) == chunks


@pytest.mark.parametrize(("how", "channels"), [("native", 24), ("native", 48), ("patches", 24)])
def test_split_over_devices_gathers_nothing(how, channels):
    from ssl_jax import parallel

    mesh = parallel.make_mesh(4, 64)
    x, kernel = np.zeros((64, 14, 14, channels), np.float32), np.zeros((3, 3, channels, channels), np.float32)
    step = jax.grad(lambda kernel, x: jnp.square(conv(conv(x, kernel, 1, 1, how), kernel, 1, 1, how)).sum())
    given = (parallel.replicated(mesh), parallel.batch_sharding(mesh))
    text = jax.jit(step, in_shardings=given).lower(kernel, x).compile().as_text()
    assert "all-reduce(" in text
    assert "all-gather(" not in text


def test_what_is_asked_for_and_what_a_run_records():
    assert [resolve_conv(how) for how in ("auto", "native", "patches", "lax")] == ["native", "native", "patches", "lax"]
    assert [resolve_conv(how, backend="tpu") for how in ("auto", "patches")] == ["lax", "lax"]


def test_unknown_formulation():
    with pytest.raises(UserError, match="config.model.conv='winograd': unknown.*native"):
        resolve_conv("winograd")
