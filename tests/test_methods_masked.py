"""What DINOv2, iBOT, I-JEPA and MSN hide, what their teachers remember, and how their collapses are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.losses import normalize
from ssl_jax.methods.masks import block_mask, first_of, largest_block, multi_block
from ssl_jax.testing.tiny import Images, batch_of, start, tiny_config
from ssl_jax.transforms import target_of

RANGES = {"targets": 4, "target_scale": (0.15, 0.2), "aspect": (0.75, 1.5), "context_scale": (0.85, 1.0)}


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def test_block_masks_have_at_most_what_is_asked_for_and_are_blocks():
    count = np.repeat([0, 20, 60, 98], 16)
    masks = np.asarray(jax.jit(lambda k, c: block_mask(k, 14, c, least=4, most=98))(keys(64), count))
    masks = masks.reshape(64, 14, 14)
    sums = masks.sum((1, 2))
    assert np.all(sums <= count) and not sums[:16].any()
    assert np.all(sums[16:].reshape(3, 16).mean(axis=1) > 0.85 * np.array([20, 60, 98]))
    # Far fewer borders than where as many patches are drawn one by one.
    borders = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    share = sums / 196
    assert np.mean(borders[16:]) < 0.5 * np.mean((2 * share * (1 - share) * 2 * 14 * 13)[16:])
    assert len({m.tobytes() for m in masks[48:]}) == 16


def test_the_masked_patches_come_first():
    mask = np.array([[0, 1, 0, 1], [1, 0, 0, 0]], bool)
    index, masked = jax.device_get(first_of(jnp.asarray(mask), 2))
    assert index[0].tolist() == [1, 3] and index[1, 0] == 0
    assert masked.tolist() == [[True, True], [True, False]]


def test_multi_block_never_shows_what_has_to_be_predicted():
    visible, hidden, counted = jax.device_get(jax.jit(lambda k: multi_block(k, 14, context=49, **RANGES))(keys(64)))
    assert visible.shape == (64, 49) and hidden.shape[:2] == (64, 4)
    for seen, blocks, real in zip(visible, hidden, counted):
        assert not set(seen) & set(blocks[real])
        sizes = real.sum(axis=1)
        assert len(set(sizes)) == 1 and 0.12 * 196 < sizes[0] <= 0.23 * 196
        for block, inside in zip(blocks, real):
            rows, columns = np.divmod(block[inside], 14)
            assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == inside.sum()  # a full rectangle
    assert np.mean([len(set(seen)) for seen in visible]) > 47  # seldom does one come twice


@pytest.mark.parametrize("area", [3, 39, 51])
def test_no_block_is_larger_than_the_largest(area):
    for ratio in np.linspace(0.75, 1.5, 200):
        assert round((area * ratio) ** 0.5) * round((area / ratio) ** 0.5) <= largest_block(area, (0.75, 1.5))


def test_last_layer_and_centres_of_the_teacher_follow():
    """What lies in the memory instead of the target: the same moving average; and the means of this batch."""
    config = tiny_config("dinov2", method__centring="centre", method__centre_momentum=0.8, method__freeze_epochs=0.0)
    source = Images()
    state, step_fn, mesh = start(config, source, watch=True)
    for step in range(3):
        before, (state, metrics) = state, step_fn(state, batch_of(config, source, step, mesh))
        old, new = before.model_state.memory, state.model_state.memory
        target, moved = target_of(before.opt_state)["head"], target_of(state.opt_state)["head"]
        kernel = [x["linear1"]["kernel"] for x in (target, moved, state.params["head"])]
        rate = float(np.linalg.norm(kernel[1] - kernel[2]) / np.linalg.norm(kernel[0] - kernel[2])) if step else 0
        for name in ("last", "patch_last"):
            was, now = old[f"target_{name}"], new[f"target_{name}"]
            if step:
                want = rate * was + (1 - rate) * state.params[name]
                np.testing.assert_allclose(now, want, atol=1e-5)
        outputs = metrics["outputs"]
        table = np.asarray(normalize(old["target_last"]))
        mean = np.asarray(outputs["teacher"]).reshape(-1, table.shape[1]).mean(0) @ table.T
        np.testing.assert_allclose(new["centre"], 0.8 * old["centre"] + 0.2 * mean, atol=1e-5)
        masked = np.asarray(outputs["masked"])
        table = np.asarray(normalize(old["target_patch_last"]))
        mean = np.asarray(outputs["teacher_patches"])[masked].mean(0) @ table.T
        np.testing.assert_allclose(new["patch_centre"], 0.8 * old["patch_centre"] + 0.2 * mean, atol=1e-5)
    assert metrics["patch_loss"] > 0 and 0 < masked.mean() < 1
