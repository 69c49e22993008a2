"""Parquet files as Hugging Face writes them: a column of encoded images, and perhaps one of labels.

A file is read in row groups, so the order of images is one of blocks (`blocks.Blocks`).
"""

import json
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.blocks import MARGIN, Blocks, Store
from ssl_jax.data.remote import Files, shown
from ssl_jax.data.shards import Index, Shard, class_names, find_shards, indexed, labels_of, place, source_of
from ssl_jax.data.source import Source
from ssl_jax.errors import UnreadableError, UserError, first_line, unknown


class Columns(NamedTuple):
    """Where the images and labels of a file are."""

    image: str
    path: str  # of the encoded images: the column, or its field "bytes"
    label: str | None
    classes: list[str]  # as the file names them


def read(data: Data) -> Source:
    """The images in the files of data.path, in the order of files and rows.

    data.path: a file, a folder of files or a pattern, local or remote (`shards.find_shards`). data.image_column and
    data.labels name the columns; without them these are "image" and "label", or the only ones of their kind.
    """
    _pyarrow()
    files = Files(data.path, data)
    shards = find_shards(files, data, ".parquet")
    found = indexed(files, shards, lambda shard: index_of(files, shard, data), data)
    groups = [(s, each, i) for s, each in zip(shards, found) for i in np.flatnonzero(each["groups"]).tolist()]
    sizes = np.array([each["groups"][i] for _, each, i in groups], np.int64)
    count = min(int(sizes.sum()), data.limit or int(sizes.sum()))
    sizes = np.diff(np.minimum(np.cumsum([0, *sizes]), count))
    sizes = sizes[sizes > 0]
    names = class_names(files, shards) or [name.decode() for name in found[0]["classes"].tolist()]
    labels, classes = labels_of([each["label"] for each in found], names, shown(data.path))
    room = _room(data, sizes, sum(int(each["bytes"]) for each in found) / max(1, sum(int(e["images"]) for e in found)))
    blocks = Blocks(sizes, data.shuffle_buffer)
    content = Store(lambda number: _read_group(files, *groups[number]), sizes, room)

    def name(index: int) -> str:
        number, row = place(blocks.starts, index)
        shard, each, group = groups[number]
        return f"{shard.name}/{int(each['groups'][:group].sum()) + row}"

    def encoded(index: int) -> bytes:
        number, row = place(blocks.starts, index)
        image = content[number][row].as_py()
        if image is None:
            raise UnreadableError("no bytes in its row")
        return image

    return source_of(
        count,
        name,
        encoded,
        data,
        labels=None if labels is None else labels[:count],
        classes=classes,
        blocks=blocks,
    )


def _room(data: Data, sizes: np.ndarray, mean: float) -> float:
    """How many images are kept in memory. UserError if they take more than data.memory_gb. mean: bytes of an image."""
    room = MARGIN * data.shuffle_buffer + 2 * int(sizes.max(initial=0))
    needed = min(room, int(sizes.sum())) * mean
    if needed > data.memory_gb * 1e9:
        raise UserError(
            f"config.data.shuffle_buffer={data.shuffle_buffer}: images of {mean / 1e3:,.0f} kB in row groups of "
            f"{sizes.mean():,.0f} take {needed / 1e9:.1f} GB while they wait; allowed: as many as fit into "
            f"config.data.memory_gb={data.memory_gb:g}"
        )
    return room


def index_of(files: Files, shard: Shard, data: Data) -> Index:
    """Of a file: "images", their number; "groups", that in each row group; "bytes" of all; "label" of each, as text or
    a number; "classes", their names; "path" of the column of images. UserError if it is not Parquet or has no such."""
    import pyarrow as pa

    where = shown(shard.path)
    try:
        with _opened(files, shard) as file:
            columns = columns_of(file.schema_arrow, data, f"{where!r}")
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            label = np.full(file.metadata.num_rows, -1, np.int64)
            if columns.label:
                label = _labels(file.read([columns.label]).column(0), f"{where!r}: {columns.label}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where!r}: not Parquet, or cut short ({first_line(error)})") from error
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == columns.image)
    return {
        "images": np.array(len(label)),
        "groups": np.array([group.num_rows for group in groups], np.int64),
        "bytes": np.array(size),
        "label": label,
        "classes": np.array([name.encode() for name in columns.classes], np.bytes_),
        "path": np.array(columns.path),
    }


def columns_of(schema: Any, data: Data, where: str) -> Columns:
    """The columns of a file. UserError if it has not those that are named, or none of images."""
    import pyarrow as pa

    features = _features(schema)

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    paths = {}
    for field in schema:
        if pa.types.is_struct(field.type) and "bytes" in {each.name for each in field.type}:
            paths[field.name] = f"{field.name}.bytes"
        elif is_binary(field.type):
            paths[field.name] = field.name
    image = data.image_column or ("image" if "image" in paths or len(paths) != 1 else next(iter(paths)))
    if image not in paths:
        key = "config.data.image_column" if data.image_column else f"{where}: column of images"
        raise unknown(key, image, paths or schema.names)
    kinds = {name: kind.get("_type") for name, kind in features.items() if isinstance(kind, dict)}
    numbered = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if len(data.labels) > 1:
        raise UserError(f"config.data.labels={data.labels!r}: several; allowed with parquet: one column")
    label = data.labels[0] if data.labels else "label" if "label" in schema.names else None
    if label is None and len(numbered) == 1:
        label = numbered[0]
    if label is not None and label not in schema.names:
        raise unknown("config.data.labels", label, schema.names)
    classes = features.get(label, {}).get("names", []) if label in numbered else []
    return Columns(image, paths[image], label, [str(name) for name in classes])


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's library says of the columns in the metadata of a file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _labels(column: Any, where: str) -> np.ndarray:
    """A column of labels as int64, -1 if unknown, or as bytes, b"" if unknown."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
        return pc.fill_null(column.cast(pa.int64()), -1).to_numpy().astype(np.int64)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array([text.encode() for text in pc.fill_null(column, "").to_pylist()], np.bytes_)
    raise UserError(f"{where} is {column.type}; allowed: integers or text, one label per image")


def _opened(files: Files, shard: Shard) -> Any:
    pq = _pyarrow()
    return pq.ParquetFile(files.open(shard.path, shard.stamp.size) if files.remote else shard.path)


def _read_group(files: Files, shard: Shard, index: Index, group: int) -> Any:
    """The encoded images of a row group, as an array of Arrow."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if files.stamp(shard.path) != shard.stamp:
        raise shard.changed(files)
    try:
        with _opened(files, shard) as file:
            column = file.read_row_group(group, columns=[str(index["path"])], use_threads=False).column(0)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableError(f"row group {group}: {first_line(error)}") from error
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"config.data.name='parquet': {first_line(error)}; pip install pyarrow") from error
    return pyarrow.parquet
