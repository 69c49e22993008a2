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

FORMATS = {".csv": "csv", ".tsv": "csv", ".npz": "npz", ".tar": "webdataset", ".parquet": "parquet"}
SHARDS = (".tar", ".parquet")  # of which a data set has many files, in a folder of their own or on a server


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

    text: a folder, a file, an address such as s3://bucket/folder, a pattern of shards (train-{000..146}.tar), or the
    name of a source, which a path may follow: fashion_mnist, tfds:cifar10, mypackage.mysource:path.
    """
    path, ending = Path(text).expanduser(), Path(text.partition("?")[0]).suffix.lower()
    source, _, rest = text.partition(":")
    if path.is_dir():
        name, place = _kind_of_folder(path), text
    elif path.is_file() and ending in FORMATS or ending in SHARDS and source not in registry.names("source"):
        name, place = FORMATS[ending], text
    elif rest.startswith("//"):
        name, place = "folder", text
    elif not path.exists() and (source in registry.names("source") or ("." in source and rest)):
        name, place = source, rest
    else:
        problem = f"unknown ending {path.suffix!r}" if path.exists() else "not found"
        files = f"a {', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]} file"
        allowed = f"a folder, {files}, an address, or a source such as fashion_mnist or tfds:NAME"
        raise UserError(f"{flag}={text}: {problem}; allowed: {allowed}")
    include = like.include if flag == "--data" else ""  # a subset of the training data, not of others
    return dataclasses.replace(like, name=name, path=place, split="train", limit=0, pairs="", include=include)


def images_only(data: Data) -> Data:
    """The same images without their labels, whose columns may be missing, and however few of them can be read."""
    return dataclasses.replace(data, labels=(), max_bad_share=1.0, pairs="")


def _kind_of_folder(folder: Path) -> str:
    """The source that reads a folder: of shards, if no folder and nothing but small files lie beside them."""
    if _is_chexpert(folder):
        return "chexpert"
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    endings = {entry.suffix.lower() if entry.is_file() else "/" for entry in entries} - {".json", ".txt", ".md", ".csv"}
    return FORMATS[endings.pop()] if len(endings) == 1 and endings <= {*SHARDS} else "folder"


def _is_chexpert(folder: Path) -> bool:
    """Whether a folder has CheXpert's layout, judged by the header of train.csv: other data have such a file, too."""
    table = folder / "train.csv"
    if not table.is_file():
        return False
    with table.open(encoding="utf-8", errors="replace") as file:
        return "Frontal/Lateral" in file.readline()
