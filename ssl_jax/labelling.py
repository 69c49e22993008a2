"""The labelling page: one HTML file, without network or server, in which a person gives images their labels."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ssl_jax.data.table import LONGEST, is_missing
from ssl_jax.errors import UserError
from ssl_jax.files import write_bytes

TEMPLATE = Path(__file__).with_name("labelling.html")
SMALL = 96  # px; up to this side a picture is kept, and shown, pixel by pixel: JPEG would blur it
QUALITY = 90  # of larger ones, as JPEG; 224 px in colour take about 20 kB


def write_page(
    path: Path,
    images: Sequence[np.ndarray] | np.ndarray,
    names: list[str],
    classes: list[str],
    *,
    multilabel: bool = False,
    csv_name: str = "labelled.csv",
    columns: tuple[str, str] = ("path", "label"),
    more: Mapping[str, Sequence[str | int]] | None = None,
) -> None:
    """Writes a page that shows the images one by one and saves their labels as the table `csv_name`.

    images: N arrays uint8 [H, W, C] with 1 or 3 channels, of any sizes. names: their paths, as the table shall list
    them: absolute, or relative to the folder in which the table will lie. classes: may be empty, as the page can add
    some. multilabel: an image may have several classes, and the table has a column of 0 and 1 for each, empty where a
    class was added after the image was labelled; else it has a column `label`. Images without labels are left out.
    columns: other names for the columns `path` and `label`. more: further columns, such as the patient of each image.

    As in the library's other tables, an apostrophe stands before a class that a spreadsheet would take for a formula; a
    path gets "./" instead, which names the same file. The browser remembers labels under a digest of the content.
    Raises UserError if there are no images, for classes that no table can hold, and if the file cannot be written.
    """
    if len(images) != len(names):
        raise ValueError(f"{len(images)} images, but {len(names)} names")
    if not names:
        raise UserError(f"{path}: not written; there are no images to label")
    content = {
        "names": [_table_path(name) for name in names],
        "images": [_picture(image) for image in images],
        "classes": _checked(classes, multilabel),
        "multilabel": multilabel,
        "csv": csv_name,
        "columns": columns,
        "more": {name: list(values) for name, values in (more or {}).items()},
    }
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    # In a script, only "<" could end or open anything.
    text = json.dumps({**content, "digest": digest}).replace("<", "\\u003c")
    write_bytes(path, TEMPLATE.read_text(encoding="utf-8").replace("{{CONTENT}}", text).encode())


def _picture(image: np.ndarray) -> str:
    """Data URI of an image uint8 [H, W, C]."""
    from PIL import Image

    picture, buffer = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), io.BytesIO()
    kind = "png" if max(picture.size) <= SMALL else "jpeg"
    picture.save(buffer, kind, **({} if kind == "png" else {"quality": QUALITY, "subsampling": 0}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table_path(name: str) -> str:
    """The path as a table shall list it: no formula, no spaces in front, no \\ that would be read as /."""
    odd = name.startswith(("=", "+", "-", "@")) or name[:1].isspace() or "\\" in name
    return f"./{name}" if odd and not name.startswith("/") else name


def _checked(classes: Sequence[str], multilabel: bool) -> list[str]:
    """The classes without the spaces around them, which readers of tables drop, too."""
    names = [name.strip() for name in classes]
    for i, name in enumerate(names):
        where, before = f"classes={name[:20]!r}", names[:i]
        if is_missing(name) or len(name) > LONGEST:
            raise UserError(f"{where}: no label; allowed: 1 to {LONGEST} characters, not nan")
        if name in before or (multilabel and name.lower() in map(str.lower, before)):
            raise UserError(f"{where}: there already; allowed: names that differ" + ", not only in case" * multilabel)
        if multilabel and (name.lower() in ("path", "split") or ";" in name or "\t" in name):
            raise UserError(f"{where}: no name for a column; allowed: any but path and split, without ; and tabs")
    return names
