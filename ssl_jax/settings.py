"""What a command works with: the config of a run folder, and data as a flag names them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import registry
from ssl_jax.config import Config, Data, default, from_json, resolve
from ssl_jax.config_file import override
from ssl_jax.errors import UserError
from ssl_jax.run_folder import RunFolder

TABLES = {".csv": "csv", ".tsv": "csv", ".npz": "npz"}


def settings_of(folder: Path, overrides: Sequence[str], read: Mapping[str, Any] | None = None) -> Config:
    """The config of a run folder with overrides, or the defaults if there is no run folder (an exported encoder).

    read: options of config.data that a classifier was trained with.
    """
    saved = RunFolder(folder)
    config = from_json(saved.read_config()) if saved.config.is_file() else default()
    config.data.update(read or {})
    return resolve(override(config, overrides))


def data_of(text: str, flag: str, like: Data) -> Data:
    """The data that a flag names, to be read like `like`.

    text: a folder, a file, or the name of a source, which a path may follow: fashion_mnist, tfds:cifar10,
    mypackage.mysource:path.
    """
    path = Path(text).expanduser()
    source, _, rest = text.partition(":")
    if path.is_dir():
        name, place = "chexpert" if _is_chexpert(path) else "folder", text
    elif path.is_file() and path.suffix.lower() in TABLES:
        name, place = TABLES[path.suffix.lower()], text
    elif not path.exists() and (source in registry.names("source") or ("." in source and rest)):
        name, place = source, rest
    else:
        problem = f"unknown ending {path.suffix!r}" if path.exists() else "not found"
        allowed = "a folder, a .csv, .tsv or .npz file, or a source such as fashion_mnist or tfds:NAME"
        raise UserError(f"{flag}={text}: {problem}; allowed: {allowed}")
    include = like.include if flag == "--data" else ""  # a subset of the training data, not of others
    return dataclasses.replace(like, name=name, path=place, split="train", limit=0, pairs="", include=include)


def images_only(data: Data) -> Data:
    """The same images without their labels, whose columns may be missing, and however few of them can be read."""
    return dataclasses.replace(data, labels=(), max_bad_share=1.0, pairs="")


def _is_chexpert(folder: Path) -> bool:
    """Whether a folder has CheXpert's layout, judged by the header of train.csv: other data have such a file, too."""
    table = folder / "train.csv"
    if not table.is_file():
        return False
    with table.open(encoding="utf-8", errors="replace") as file:
        return "Frontal/Lateral" in file.readline()
