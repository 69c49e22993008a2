"""The transform study's table, and that each of its runs has a config."""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import transforms as study  # noqa: E402

from ssl_jax.augment import resolve_views  # noqa: E402
from ssl_jax.config import View, resolve  # noqa: E402
from ssl_jax.config_file import load_config  # noqa: E402


def options(**changes):
    chosen = {
        "set": "factors",
        "data": "",
        "methods": "moco,byol,looc",
        "views": ",".join(study.VIEWS),
        "seeds": 2,
        "workdir": Path("runs"),
    }
    return argparse.Namespace(**{**chosen, "examples": 40_000, "workdir": Path("runs"), **changes})


def differing(a, b):
    """Fields in which two views differ."""
    return {field.name for field in dataclasses.fields(View) if getattr(a, field.name) != getattr(b, field.name)}


def views_of(method, name):
    flags = [f"--config.{key}={value}" for key, value in study.settings(options(), method, name).items()]
    config = resolve(load_config(f"transforms:{method}", flags))
    return config, resolve_views(config.augment, 2, 32)


def test_every_run_has_the_views_that_its_name_says():
    runs = study.plan(options())
    assert len(runs) == len(set(runs)) and {m for _, m, _ in runs} == {"moco", "byol", "looc", study.RANDOM}
    made = {name: views_of("moco", name)[1] for name in study.VIEWS}
    first, second = made["natural without crop"]
    assert first.crop_scale == second.crop_scale == (1, 1) and first.blur == 1 and second.solarize == 0.2
    assert made["natural without colour"][0].jitter_prob == made["natural without colour"][0].gray == 0
    assert [v.blur for v in made["blur alone"]] == [1, 0.1] and made["blur alone"][0].crop_scale == (1, 1)
    assert [v.solarize for v in made["solarize alone"]] == [0, 0.2] and made["solarize alone"][0].flip == 0
    natural = made["natural"]
    for name in study.ALONE:  # as strong as in natural, and that is off without it
        for alone, without, whole in zip(made[f"{name} alone"], made[f"natural without {name}"], natural, strict=True):
            on = differing(alone, View(size=32))
            assert all(getattr(alone, key) == getattr(whole, key) for key in on)
            assert differing(without, whole) <= on and (not on or differing(without, whole))
    assert views_of("looc", "natural and rotate")[0].method.factors == ("colour", "rotate")


def test_table_and_figure_against_numbers_by_hand(tmp_path):
    path = tmp_path / "transforms_factors.csv"
    lines = [("natural", 0, 0.5, 0.9), ("natural", 1, 0.7, 0.8), ("natural without crop", 0, 0.6, 0.9)]
    lines += [("natural without crop", 1, 0.9, 0.6), ("crop alone", 0, 0.3, 0.5)]
    for views, seed, shape, colour in lines:
        about = {"method": "moco", "views": views, "seed": seed, "examples": 100}
        study.add(path, about | {"shape": shape, "colour": colour, "cpu_minutes": 1})
    study.add(path, about | {"examples": 999, "shape": 0, "colour": 0, "cpu_minutes": 1})  # of another budget
    text = study.table(path, 100, "accuracy")
    assert "| moco | crop alone | 1 | 30.0 | 50.0 | 40.0 |" in text
    # 50 and 70: mean 60, standard deviation 14.1, t of one degree of freedom 12.706: 12.706 x 14.142 / 1.414 = 127.1
    assert "| moco | natural | 2 | 60.0 ± 127.1 | 85.0 ± 63.5 | 72.5 ± 31.8 |" in text
    # -10 and -20 points for shape, 0 and +20 for colour
    assert "| moco | crop | 2 | -15.0 ± 63.5 | +10.0 ± 127.1 | -2.5 ± 31.8 |" in text
    study.figure(path, 100, "title")
    assert path.with_suffix(".png").stat().st_size > 5000
