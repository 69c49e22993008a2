"""`ssl-jax search`: the images of a data set that look most like a query to the encoder, as a page and a table."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files
from ssl_jax.config import Config
from ssl_jax.data import Source, open_source
from ssl_jax.data.csv import bands_at
from ssl_jax.data.decoding import read_image
from ssl_jax.data.exclude import key_of
from ssl_jax.data.source import check_is_file
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UnreadableError, UserError
from ssl_jax.load import load_with_settings
from ssl_jax.neighbours import nearest
from ssl_jax.progress import counting
from ssl_jax.report.page import note, page
from ssl_jax.report.tiles import STYLE, grid, tile
from ssl_jax.settings import FORMATS, data_of, images_only

SHOWN = 100  # queries on the page; the table holds all
COLUMNS = ("query", "rank", "path", "similarity", "file")


def search(
    workdir: str, query: str, data: str, out: str = "neighbours.html", k: int = 10, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes the page `out` and, beside it, the table of the same name in .csv: the k nearest images to each query.

    query: an image file, or data such as a folder. An image of `data` is not its own neighbour. Returns the number of
    queries and images, and the paths.
    """
    path = Path(out)
    if path.suffix != ".html":
        raise UserError(f"--out={out}: unknown ending {path.suffix!r}; allowed: .html")
    encoder, config = load_with_settings(workdir, "", overrides)
    asked = _queries(encoder, config, query)
    source, keys = _open(encoder, config, data, "--data")
    index, features = _embed(encoder, source, "images")
    if not 1 <= k < len(index):
        raise UserError(f"--k={k}: there are {len(index)} images; allowed: 1 to {len(index) - 1}")
    places, similarity = nearest(asked.features, features, k + 1)  # one more, as a query may be among them
    rows: list[list[str]] = []
    shown: list[str] = []
    for q, (name, key) in enumerate(zip(asked.names, asked.keys, strict=True)):
        ranked = zip(index[places[q]].tolist(), similarity[q].tolist(), strict=True)
        found = [(i, cosine) for i, cosine in ranked if keys[i] != key][:k]
        rows += [[name, str(r), source.names[i], f"{c:.6g}", keys[i]] for r, (i, c) in enumerate(found, 1)]
        if q < SHOWN:
            tiles = [tile(source.load(i), source.names[i], f"{c:.3f}") for i, c in found]
            shown.append(grid([tile(asked.images[q], name, "query", "query"), *tiles]))
    table = path.with_suffix(".csv")
    files.write_csv(table, COLUMNS, rows)
    text = (
        f"Each row: a query, and the {k} images of {data} with the most similar embeddings among {len(index):,}. The "
    )
    text += "number is the cosine similarity: 1 is the same direction."
    if len(asked.names) > SHOWN:
        text += f" The first {SHOWN} of {len(asked.names):,} queries; {table.name} holds all."
    sections = [("Neighbours", "".join(shown))]
    content = page(f"Nearest to {query}", f"Encoder {workdir}", STYLE + note(text), sections, by="search")
    files.write_bytes(path, content.encode("utf-8", "backslashreplace"))
    print(f"{len(asked.names)} queries, {len(index)} images\npage:  {path}\ntable: {table}")
    return {"queries": len(asked.names), "images": len(index), "page": str(path), "table": str(table)}


@dataclasses.dataclass(frozen=True)
class _Queries:
    """images: the first SHOWN of them, uint8 [n, H, W, C]; keys: as of `data.exclude`."""

    names: list[str]
    keys: list[str]
    features: np.ndarray
    images: np.ndarray


def _queries(encoder: Encoder, config: Config, query: str) -> _Queries:
    path = Path(query).expanduser()
    if path.is_file() and path.suffix.lower() not in FORMATS:
        spec = encoder.data(config.data)
        try:
            check_is_file(path)
            files = bands_at(str(path), spec.bands) if spec.bands else (str(path),)
            image = read_image(files, spec.size, spec.channels, spec)
        except UnreadableError as error:
            raise UserError(f"--query={query}: {error}") from error
        return _Queries([path.name], [key_of(spec, query, str(path))], encoder.embed(image[None]), image[None])
    source, keys = _open(encoder, config, query, "--query")
    index, features = _embed(encoder, source, "queries")
    names = [source.names[i] for i in index]
    return _Queries(names, [keys[i] for i in index], features, source.load_many(index[:SHOWN]))


def _open(encoder: Encoder, config: Config, text: str, flag: str) -> tuple[Source, list[str]]:
    """All images of `text`, labelled or not, and their keys."""
    spec = dataclasses.replace(images_only(encoder.data(data_of(text, flag, config.data))), split="all")
    source = open_source(spec)
    return source, [key_of(spec, n, source.paths[i] if source.paths else "") for i, n in enumerate(source.names)]


def _embed(encoder: Encoder, source: Source, what: str) -> tuple[np.ndarray, np.ndarray]:
    """(indices [N], embeddings [N, D]) of the images that can be read; memory is that of the embeddings."""
    indices, features = [], []
    with counting(what, "images") as progress:
        for index, images in source.chunks():
            indices.append(index)
            features.append(encoder.embed(images))
            progress(int(index[-1]) + 1, len(source))
    if not indices:
        raise UserError(f"{what}: none of the {len(source)} images can be read")
    return np.concatenate(indices), np.concatenate(features)
