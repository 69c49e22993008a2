"""Reads images and returns uint8 batches. Each source is a module; data in memory and on disk have the same order.

A source is a module with a function `read(data: config.Data) -> Source`. `config.data.name` names a module in this
folder, an entry point of an installed package, or an import path (see `ssl_jax.registry`).
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ssl_jax import fields, registry
from ssl_jax.config import Data
from ssl_jax.data.exclude import wanted
from ssl_jax.data.feed import Partners, batches, order
from ssl_jax.data.source import Source
from ssl_jax.errors import UserError
from ssl_jax.files import read_json

__all__ = ["Partners", "Source", "batches", "open_source", "order", "phantom"]


def open_source(data: Data, split: str | None = None) -> Source:
    """The images that `data` describes, not decoded yet.

    split: train, test, all, or another part of the data; None: data.split. Without a test part, "test" is the
        validation part. Without either it raises NoPartError, and the caller may hold images out with `Source.take`.
    Raises UserError for whatever is missing, malformed or unreadable.
    """
    if not data.name:
        raise UserError(
            "config.data.name: missing: which images? say it as in `ssl-jax pretrain METHOD DIR --workdir=...`, "
            "with --data=DIR, or with --config.data.name=folder --config.data.path=DIR"
        )
    module = registry.find("source", data.name)
    fields.check(data, "config.data")  # for a Data created in Python
    data = dataclasses.replace(data, split=split or data.split, include="" if split == "test" else data.include)
    source = module.read(data)
    source.memory_gb = math.inf if data.engine == "memory" else data.memory_gb
    if (data.include or data.exclude) and len(kept := wanted(data, source.names, source.paths)) < len(source):
        source = source.take(kept)
    if data.pairs and source.objects is None:
        raise UserError(f"config.data.pairs={data.pairs!r}: {data.name} does not say which images show one object")
    return source


def phantom(data: Data) -> dict[str, Any] | None:
    """The content of phantom.json, which lies beside generated images or one folder above; None for other images."""
    path = Path(data.path)
    for folder in (path, path.parent) if data.path else ():
        if (folder / "phantom.json").is_file():
            return read_json(folder / "phantom.json")
    return None
