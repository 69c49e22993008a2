"""Where a command's settings come from: a config file, overrides, a run folder, data as a flag names them."""

import dataclasses
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ssl_jax.config import Config, Data, default, from_json, resolve
from ssl_jax.errors import UserError, unknown
from ssl_jax.run_folder import RunFolder


def find_config(spec: str) -> tuple[Path, list[str]]:
    """The file that --config names, and its argument: a path, or the name of a config that ships with the package."""
    name, *argument = spec.split(":", 1)
    here = Path(__file__).parent
    shipped = next((d for d in (here / "configs", here.parent / "configs") if d.is_dir()), here / "configs")
    for path in (Path(name), shipped / Path(name).name, shipped / f"{Path(name).name}.py"):
        if path.is_file() and path.suffix == ".py":
            return path, argument
    names = [p.stem for p in shipped.glob("*.py") if p.stem != "__init__"]
    raise unknown("--config", spec, names)


def load_config(spec: str, overrides: Sequence[str]) -> Any:
    """The ConfigDict of --config=SPEC with its overrides applied."""
    path, argument = find_config(spec)
    made = runpy.run_path(str(path))
    if "get_config" not in made:
        raise UserError(f"--config={spec}: no function get_config in {path}")
    return override(made["get_config"](*argument), overrides)


def override(config: Any, overrides: Sequence[str]) -> Any:
    """ml_collections' own parsing of --config.key=value, with errors of one line."""
    for item in overrides:
        path, place = item.removeprefix("--config.").split("=", 1)[0], config
        parts = path.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(place, ConfigDict) or part not in place:
                known = list(place) if isinstance(place, ConfigDict) else []
                raise unknown(f"--{'.'.join(['config', *parts[:depth]])}", part, known)
            place = place[part]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(overrides))
        values(["ssl-jax", *overrides])
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(overrides)}: {' '.join(str(error).split())[:300]}") from None
    return values["config"].value


def settings_of(folder: Path, overrides: Sequence[str], read: Mapping[str, Any] | None = None) -> Config:
    """The run's config with overrides; the defaults for an exported encoder that has no run folder, or a classifier,
    with what it says of how images are read."""
    found = RunFolder(folder).config.is_file()
    config = from_json(RunFolder(folder).read_config()) if found else default()
    config.data.update(read or {})
    return resolve(override(config, overrides))


def data_of(text: str, flag: str, like: Data) -> Data:
    """Data as a flag names it, read as `like` says."""
    path = Path(text)
    kinds = {".csv": "csv", ".tsv": "csv", ".npz": "npz"}
    if text == "fashion_mnist":
        name, place = "fashion_mnist", ""
    elif text.startswith("tfds:"):
        name, place = "tfds", text.removeprefix("tfds:")
    elif path.is_dir():
        name, place = "chexpert" if _is_chexpert(path) else "folder", text
    elif path.is_file() and path.suffix.lower() in kinds:
        name, place = kinds[path.suffix.lower()], text
    else:
        found = "not found" if not path.exists() else f"unknown ending {path.suffix!r}"
        allowed = "a folder, a .csv, .tsv or .npz file, fashion_mnist, tfds:NAME"
        raise UserError(f"{flag}={text}: {found}; allowed: {allowed}")
    return dataclasses.replace(like, name=name, path=place, split="train", limit=0, pairs="")


def _is_chexpert(folder: Path) -> bool:
    """Whether a folder has CheXpert's layout, by the header of its train.csv: others have a table of that name, too."""
    table = folder / "train.csv"
    if not table.is_file():
        return False
    with table.open(encoding="utf-8", errors="replace") as file:
        return "Frontal/Lateral" in file.readline()
