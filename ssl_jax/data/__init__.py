"""Images in, uint8 batches out: one module per source, one order for data in memory and on disk.

A source is a module of this folder whose name is `config.data.name`; it holds `read(data: config.Data) -> Source`.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from ssl_jax.config import CHOICES, Data
from ssl_jax.data.source import Partners, Source, batches, order
from ssl_jax.errors import UserError, unknown

__all__ = ["SOURCES", "Partners", "Source", "batches", "open_source", "order", "phantom"]

SOURCES = ("chexpert", "csv", "factors", "fashion_mnist", "folder", "npz", "synthetic", "tfds")

PAIRED = ("chexpert", "csv", "folder", "npz")


def open_source(data: Data, split: str | None = None) -> Source:
    """The images that `data` names, nothing decoded yet.

    split: train, test, all, or another part the data have; None: data.split. Without a test part "test" means the
        validation part, and without either it is an error: the caller holds images out with `Source.take`.
    Raises UserError, one line, for whatever is missing, malformed or unreadable.
    """
    if data.name not in SOURCES:
        raise unknown("config.data.name", data.name, SOURCES)
    if data.pairs and data.name not in PAIRED:
        raise UserError(
            f"config.data.pairs={data.pairs!r}: {data.name} knows no objects; allowed: {', '.join(PAIRED)} data"
        )
    for name in ("uncertain", "blank", "frontal"):  # of a study's test data, and of a Data made in Python, too
        if getattr(data, name) not in CHOICES[f"data.{name}"]:
            raise unknown(f"config.data.{name}", getattr(data, name), map(str, CHOICES[f"data.{name}"]))
    module = importlib.import_module(f"ssl_jax.data.{data.name}")
    return module.read(dataclasses.replace(data, split=split or data.split))


def phantom(data: Data) -> dict[str, Any] | None:
    """What phantom.json in the folder of the data, or around it, says, which a generator of phantom images writes.

    None where there is none.
    """
    path = Path(data.path)
    found = [
        place / "phantom.json" for place in (path, path.parent) if data.path and (place / "phantom.json").is_file()
    ]
    return json.loads(found[0].read_text()) if found else None
