"""The plan and the table of benchmarks/told_apart.py; its runs are tried by hand."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import told_apart

TIMES = {"ours": {"step_s": 0.1, "other_s": 10.0}}  # with 10 s to judge a cell, and to judge random weights


@pytest.mark.parametrize(
    ("minutes", "seeds", "plan"),
    [
        (0, 3, (3, 200)),  # no limit
        (12, 3, (3, 21)),  # 240 s a seed: 30 s, and 10 s an epoch
        (10, 3, (2, 27)),  # three seeds would have 17 epochs, fewer than LEAST
        (2, 3, (1, 9)),  # fewer than LEAST in any case
        (120, 3, (3, 200)),  # no more than asked for
    ],
)
def test_a_plan_fits_into_the_minutes(minutes, seeds, plan):
    assert told_apart.fit(TIMES, 10.0, 100, minutes, seeds, 200) == plan


def test_too_little_time_is_one_line():
    with pytest.raises(SystemExit, match=r"--minutes=0.5: one seed and one epoch .* need about 1 minutes"):
        told_apart.fit(TIMES, 10.0, 100, 0.5, 3, 200)


def test_the_table_pairs_seeds_and_subtracts_random_weights(tmp_path):
    args = argparse.Namespace(
        setup="cpu", methods="byol", workdir=tmp_path, images=600, batch=0, timed=30, cores=2, at_once=1
    )
    runner = told_apart.Runner(args)
    runner.cells.mkdir()
    scores = [("ssl_jax", "random weights", 0, 0.70), ("ssl_jax", "byol", 0, 0.80), ("lightly", "byol", 0, 0.79)]
    scores += [("ssl_jax", "byol", 1, 0.82), ("lightly", "byol", 1, 0.81), ("ssl_jax", "byol", 2, 0.81)]
    for side, method, seed, score in scores:
        cell = {"side": side, "method": method, "seed": seed, "epochs": 0 if "random" in method else 8}
        cell |= dict.fromkeys(told_apart.SCORES, score)
        (runner.cells / f"{runner.name(side, method, seed)}.json").write_text(json.dumps(cell))
    assert "600 images, 8 epochs, batch 128" in runner.table()
    assert "| `byol` | 2 | 81.0 ± 2.5 | 80.0 ± 12.7 | +1.0 ± 0.0 | +11.0 |" in runner.table()
