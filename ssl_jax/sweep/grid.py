"""The trials of a sweep: combinations of the values in --over, each with a whole config."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.config import SECTIONS, TOP_LEVEL, TRAINING, Config, from_json, resolve, to_json, to_steps
from ssl_jax.config_file import override
from ssl_jax.errors import UserError, unknown
from ssl_jax.files import json_digest
from ssl_jax.run_folder import without_free

SEARCHES = ("grid", "random", "halving")
ETA = 3  # of each rung of successive halving, one in ETA trials goes on, for ETA times as many steps
RUNGS = 3  # at most: a run of less than a ninth of the steps says little about a whole one
SYNTAX = '"KEY=VALUE,VALUE;KEY=VALUE", such as "augment.preset=natural,light;optim.lr=0.03,0.1"'


class Trial(NamedTuple):
    """name: of its folder. values: key -> value as written. part: it has 1 / part of the sweep's steps."""

    name: str
    values: dict[str, str]
    config: Config
    part: int = 1


def parse(over: str) -> dict[str, list[str]]:
    """The values of each key in --over. Commas and semicolons within brackets or quotes separate nothing.

    Raises UserError for a key without a value, and for a key or a value that is there twice.

    >>> parse("augment.crop_scale=(0.2,1),(0.5,1); optim.lr=0.1")
    {'augment.crop_scale': ['(0.2,1)', '(0.5,1)'], 'optim.lr': ['0.1']}
    """
    found: dict[str, list[str]] = {}
    for item in filter(None, _split(over, ";")):
        key, equals, text = item.partition("=")
        key, values = key.strip().removeprefix("--").removeprefix("config."), _split(text, ",")
        if not key or not equals:
            raise UserError(f"--over: {item!r}: allowed: {SYNTAX}")
        if not all(values):
            raise UserError(f"--over: {key}: value missing; write {key}=VALUE,VALUE")
        if key in found:
            raise UserError(f"--over: {key}: is there twice; allowed: once, with all its values")
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise UserError(f"--over: {key}: {twice} is there twice; allowed: different values")
        found[key] = [v[1:-1] if len(v) > 1 and v[0] == v[-1] and v[0] in "'\"" else v for v in values]
    if not found:
        raise UserError(f"--over: no key; allowed: {SYNTAX}")
    return found


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that are neither in brackets nor in quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == separator and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def trials(config: Config, over: str, search: str = "grid", count: int = 0, seed: int = 0) -> list[Trial]:
    """The trials of a search, in the order of the grid, whose last key changes fastest.

    count: of random and halving, how many of the grid are drawn; of one grid and seed, the first 5 of 10 are the 5.
    Raises UserError for a search, key or value that is not allowed, and if two trials would compute the same.
    """
    if search not in SEARCHES:
        raise unknown("--search", search, SEARCHES)
    if count < 0 or (count and search == "grid") or (not count and search == "random"):
        allowed = {"grid": "no number, as all are tried", "random": "1 or more", "halving": "1 or more; 0: all"}
        raise UserError(f"--trials={count}: with --search={search}; allowed: {allowed[search]}")
    values = parse(over)
    for key in values:
        section = key.partition(".")[0]
        if section not in TRAINING and section in (*SECTIONS, *TOP_LEVEL):
            raise UserError(f"--over: {key}: does not change a pretraining; allowed: options of {', '.join(TRAINING)}")
    if search == "halving" and "train.duration" in values:
        raise UserError("--over: train.duration: not expected with --search=halving, which sets it")
    base, found = to_json(config), dict[str, Trial]()
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        try:
            own = resolve(override(from_json(base), [f"--config.{key}={value}" for key, value in chosen.items()]))
        except UserError as error:
            raise UserError(f"--over: {error}") from None
        trial, key = Trial(_name(chosen), chosen, own), identity(to_json(own))
        if key in found:
            raise UserError(f"--over: {found[key].name} and {trial.name} are the same run; allowed: different values")
        found[key] = trial
    every = list(found.values())
    if not count:
        return every
    return [every[i] for i in sorted(np.random.default_rng(seed).permutation(len(every))[:count].tolist())]


def identity(config: Mapping[str, Any]) -> str:
    """A digest of what a run with this config (`to_json`) computes. Not of where, and what is recorded."""
    fixed = without_free(config)
    return json_digest(json.loads(json.dumps({section: fixed[section] for section in TRAINING})))


def _name(values: Mapping[str, str]) -> str:
    """A name that a file may have anywhere. Where it differs from the values, a hash keeps it unique."""
    name = "+".join(f"{key}={value}" for key, value in values.items())
    plain = re.sub(r"[^\w.=+-]+", "_", name, flags=re.ASCII)[:120]
    return plain if plain == name else f"{plain.rstrip('_')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def rungs(count: int) -> list[int]:
    """The parts of the rungs of successive halving for so many trials: 9, 3, 1 from nine trials on.

    >>> rungs(2), rungs(3), rungs(9), rungs(100)
    ([1], [3, 1], [9, 3, 1], [9, 3, 1])
    """
    found = [1]
    while found[0] * ETA <= count and len(found) < RUNGS:
        found.insert(0, found[0] * ETA)
    return found


def shorter(trial: Trial, part: int, images: int) -> Trial:
    """The trial with 1 / part of the steps and of the warm-up: a run of its own, with a whole schedule.

    images: the number that it trains on.
    """
    if part == 1:
        return trial
    config = trial.config

    def steps(duration: str, least: int) -> str:
        return f"{max(least, round(to_steps(duration, images, config.train.batch) / part))} steps"

    train = dataclasses.replace(config.train, duration=steps(config.train.duration, 1))
    optim = dataclasses.replace(config.optim, warmup=steps(config.optim.warmup, 0))
    own = dataclasses.replace(config, train=train, optim=optim)
    return Trial(f"{trial.name}+1of{part}", trial.values, own, part)
