"""A collapse is named within 200 steps, by the loop's rule: a sign that stands for `COLLAPSE_PATIENCE` in a row."""

import numpy as np
import pytest

from ssl_jax.testing.tiny import Images, batch_of, set_up, start, tiny_config
from ssl_jax.train.hooks import COLLAPSE_PATIENCE

pytestmark = pytest.mark.slow

# What provokes each collapse, beside the tiny config's settings. At T = 100, no key is likelier than another.
PROVOKED = {
    "byol": {"method__predictor": False, "method__momentum": 0.5, "optim__lr": 0.5},
    "triplet": {"method__mining": "hard", "method__normalize": False},
    "simsiam": {"method__stop_gradient": False},
    "vicreg": {"method__variance": 0.0, "method__covariance": 0.0},
    "swav": {"method__sinkhorn_iterations": 0},
    "dino": {"method__centre_momentum": 1.0, "method__teacher_temperature": 0.04},
    "ibot": {"method__centre_momentum": 1.0, "method__teacher_temperature": 0.04},
    "dinov2": {"method__centring": "centre", "method__centre_momentum": 1.0, "method__teacher_temperature": 0.04},
    "lejepa": {"method__weight": 0.0},
    "densecl": {"method__temperature": 100.0},
    "msn": {"method__sinkhorn_iterations": 0, "method__mean_weight": 0.0},
    "instance_discrimination": {"optim__weight_decay": 5.0},
    "nnclr": {"method__temperature": 100.0},
    "looc": {"method__temperature": 100.0},
}
# At their own temperatures; those for the contract test teach too slowly.
USUAL = {
    "ibot": {"method__temperature": 0.1, "method__warmup_temperature": 0.04, "method__teacher_temperature": 0.04},
    "msn": {"method__temperature": 0.1},
}


@pytest.mark.parametrize("name", PROVOKED)
def test_collapse_is_named_and_a_healthy_run_is_silent(name):
    def named(source, **changes):
        config = tiny_config(name, **{"train__duration": "200 steps", **USUAL.get(name, {}), **changes})
        state, step_fn, mesh = start(config, source)
        collapsed, in_a_row = set_up(config, source).method.collapsed, 0
        for step in range(200):
            state, metrics = step_fn(state, batch_of(config, source, step, mesh))
            in_a_row = in_a_row + 1 if collapsed({k: float(v) for k, v in metrics.items()}) else 0
            if in_a_row == COLLAPSE_PATIENCE:
                return True
        return False

    bad = Images()
    if name == "triplet":  # hard mining collapses where the hardest can't be learnt
        rng = np.random.default_rng(1)
        bad.images = rng.integers(0, 255, bad.images.shape).astype(np.uint8)
        bad.labels = rng.integers(0, 3, len(bad)).astype(np.int32)
    assert not named(Images())
    assert named(bad, **PROVOKED[name])
