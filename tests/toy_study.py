"""A study of toy encoders, which takes seconds."""

import dataclasses
import functools

import pytest
from toy_encoder import toy_encoder, toy_images

from ssl_jax.config import Augment, Data, Finetune, Study, default, resolve
from ssl_jax.data.arrays import from_array
from ssl_jax.report import figures
from ssl_jax.study import run_study

ARMS = {"scratch": {}, "good": {"train": {"seed": 1}}}
NAMES = ["coat", "bag", "boot"]
TABLES = ("results.csv", "summary.csv", "summary.md")


@functools.cache
def toy_sources():
    made = []
    for n, seed in ((120, 0), (60, 1)):
        images, labels = toy_images(n, seed=seed)
        made.append(from_array(images, labels, NAMES, Data(name="npz"), "here"))
    return made


def toy_config(**changes):
    tuning = Finetune(steps=12, epochs=20, batch=16, lr=(3e-3, 1e-2), augment=Augment(preset="none"))
    changes = {"arms": ARMS, "labels": (6, 30), "seeds": 2, **changes}
    tuning = dataclasses.replace(tuning, **changes.pop("finetune", {}))
    return dataclasses.replace(resolve(default("simclr")), finetune=tuning, study=Study(**changes))


def toy_run(config, workdir, *, log=None, shift=0.0, mean=(0.5,), pictures=False, **sources):
    """Runs the study; returns the encoders that were asked for and the lines. Without pictures, which take long."""
    asked, lines = [], []

    def get_encoder(arm, arm_config, seed):
        asked.append((arm, seed))
        made = toy_encoder(seed)._replace(about={"model": {"mean": mean}})
        return made._replace(params={**made.params, "scale": made.params["scale"] + (shift if arm == "good" else 0)})

    train, test = toy_sources()
    given = {"train": train, "test": test, **sources}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curve", "gain_by_class") if not pictures else ():
            patch.setattr(figures, name, lambda *args, **options: None)
        rows = run_study(config, workdir, get_encoder=get_encoder, log=log or lines.append, **given)
    return asked, lines, rows


def toy_tables(folder):
    return {name: (folder / name).read_bytes() for name in TABLES}
