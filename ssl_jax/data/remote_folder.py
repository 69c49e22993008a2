"""A folder of image files on a server: listed once, each file read when it is needed."""

from pathlib import PurePath

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.decoding import EXTENSIONS, KINDS, check_background
from ssl_jax.data.layout import in_parts
from ssl_jax.data.remote import Files, relative_names, shown
from ssl_jax.data.shards import source_of
from ssl_jax.data.source import MAX_BYTES, Source, printable, same_object
from ssl_jax.errors import UnreadableError, UserError


def open_folder(data: Data) -> Source:
    """The images below the address data.path, as `folder.read` reads those of a local folder.

    Without data.bands. A file is read whole each time that it is needed, and no header before that.
    """
    where = f"config.data.path={shown(data.path)!r}"
    if data.bands or data.cache:
        key = "bands" if data.bands else "cache"
        raise UserError(f"config.data.{key}={getattr(data, key)!r}: allowed with local folders, not with an address")
    check_background(data.background)
    files = Files(data.path, data)
    found = files.tree(data.path)
    places = {relative_names(data.path, path): path for path in found}
    names = sorted(path for path in places if PurePath(path[-1]).suffix.lower() in EXTENSIONS)
    selected, classes = in_parts(names, data)
    selected = selected[: data.limit or None]
    if not selected:
        kinds = {".tar": "webdataset", ".parquet": "parquet"}
        other = next((kinds[ending] for path in found if (ending := PurePath(path).suffix.lower()) in kinds), "")
        raise UserError(f"{where}: no images; " + (f"say {other}:{shown(data.path)}" if other else f"allowed: {KINDS}"))
    numbers = {name: i for i, name in enumerate(classes)}

    def encoded(index: int) -> bytes:
        content = files.bytes(places[selected[index][0]])
        if len(content) > MAX_BYTES:
            raise UnreadableError(f"{len(content) / 1e9:.1f} GB; allowed: {MAX_BYTES / 1e9:g} GB")
        return content

    source = source_of(
        len(selected),
        lambda index: printable("/".join(selected[index][0])),
        encoded,
        data,
        labels=np.array([numbers[label or ""] for _, label in selected], np.int32) if classes else None,
        classes=classes,
    )
    if data.pairs:
        source.objects = same_object(["/".join(path[:-1]) for path, _ in selected], where, data.pairs)
    return source
