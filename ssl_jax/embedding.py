"""Features of images: in memory, in one file, or part by part in a folder, for more images than memory holds.

A folder has part-00000.npz, part-00001.npz, ..., each of the same number of images in the order of the data, and
index.json, which says what they hold. A killed command is repeated and goes on with the first part that is missing.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax import files
from ssl_jax.data import Source
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UserError, unknown
from ssl_jax.load import load_with_settings
from ssl_jax.outputs import write_embeddings
from ssl_jax.progress import counting

FEATURES = ("cls", "patch", "both")
ENDINGS = (".npz", ".csv", ".parquet")
CHUNK = 256  # images that are decoded and embedded at a time
PART_BYTES = 128 * 10**6  # of features in one part
MOST = 64 * CHUNK  # images in one part
Opened = tuple[Source, np.ndarray | None]


def embed(
    workdir: str,
    data: str,
    out: Path,
    step: int | str,
    which: str,
    overrides: Sequence[str],
    open_readable: Callable[..., Opened],
) -> None:
    """Writes features of the images to a file or folder, with their paths and, where the data have them, their labels.

    open_readable: (encoder, data, config, labelled) -> source and labels
    """
    check_out(out, which)
    encoder, config = load_with_settings(workdir, step, overrides)
    whole = out.suffix in ENDINGS
    opened = open_readable(encoder, data, config, labelled=True)
    print((write_file if whole else write_folder)(out, encoder, opened, which))


def features_of(encoder: Encoder, images: Any, which: str, batch: int = CHUNK, fixed: bool = False) -> dict[str, Any]:
    """By name, of images as `Encoder.embed` takes them: embedding float32 [N, D] and patches float32 [N, h, w, D], the
    last feature map; which: cls (the embedding), patch or both. batch, fixed: as of `Encoder.embed`.

    Raises UserError if the network has no feature map.
    """
    if which == "cls":
        return {"embedding": encoder.embed(images, batch, fixed)}
    embedding, patches = encoder.embed_dense(images, batch, fixed)
    return {"patches": patches} if which == "patch" else {"embedding": embedding, "patches": patches}


def check_out(path: Path, which: str) -> None:
    """Raises UserError unless features of this kind can be written to a file or folder of this name."""
    if which not in FEATURES:
        raise unknown("--features", which, FEATURES)
    allowed = ENDINGS if which == "cls" else ENDINGS[:1]
    if path.suffix and not path.is_dir() and path.suffix not in allowed:
        raise UserError(
            f"--out={path}: unknown ending {path.suffix!r}; allowed: {', '.join(allowed)}, or a folder, without one"
        )
    if path.suffix in ENDINGS and path.is_dir():
        raise UserError(f"--out={path}: is a folder; allowed: the path of a file")
    if not path.suffix and path.is_file():
        raise UserError(f"--out={path}: is a file; allowed: a folder, new or of the same command")


def write_file(path: Path, encoder: Encoder, opened: Opened, which: str) -> str:
    """Writes one file, see `outputs.write_embeddings`; with patches, a .npz file that has them, too, or in the place of
    the embeddings. All features are in memory; images that cannot be read are left out. Returns what was written, in
    words."""
    source, labels = opened
    found, names = features_of(encoder, source.all_images(), which), source.names
    if source.replaced:  # a stand-in shows another image
        kept = np.array([i for i in range(len(source)) if i not in source.replaced])
        found, names = {name: features[kept] for name, features in found.items()}, [names[i] for i in kept]
        labels = None if labels is None else labels[kept]
    if which == "cls":
        write_embeddings(path, names, found["embedding"], labels, source.classes)
    else:
        files.write_npz(path, **_arrays(found, names, labels, source.classes))
    beside = "" if labels is None else f", labels of {len(source.classes)} classes"
    return f"{_described(len(names), {k: v.shape[1:] for k, v in found.items()})}{beside}: {path}"


def write_folder(folder: Path, encoder: Encoder, opened: Opened, which: str) -> str:
    """Writes the parts that are missing. Images that cannot be read are left out, and named in index.json. Memory holds
    one part. Returns what the folder holds, in words.

    Raises UserError if the folder holds something else, or features of another encoder or other images.
    """
    source, labels = opened
    shapes: dict[str, tuple[int, ...]] = {"embedding": (encoder.width,)}
    if which != "cls":
        shapes = dict(zip(("embedding", "patches"), encoder.shapes(dense=True), strict=True))
        shapes = shapes if which == "both" else {"patches": shapes["patches"]}
    each = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    size = CHUNK * min(MOST // CHUNK, max(1, PART_BYTES // (each * CHUNK)))
    index: dict[str, Any] = {
        "features": which,
        "images": len(source),
        "images_per_part": size,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "classes": [] if labels is None else list(source.classes),
        "encoder": _digest_of(encoder),
        "names": hashlib.sha256("\n".join(source.names).encode()).hexdigest(),
    }
    index = _begin(folder, index)
    count = -(-len(source) // size)
    first = next((i for i in range(count) if not _part(folder, i).exists()), count)
    if first:
        print(f"{first} of {count} parts are there already", flush=True)
    with counting("embeddings", "images") as progress:
        rest = source.take(range(first * size, len(source)))
        for number, rows, found in _parts(rest, encoder, which, size, progress):
            rows = rows + first * size
            names, known = [source.names[i] for i in rows], None if labels is None else labels[rows]
            arrays: Any = _arrays(found, names, known, source.classes)
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # not compressed: features hardly are, and it takes longer than embedding
            index["unreadable"] |= {name: reason for name, (_, reason) in rest.unreadable.items()}
            files.write_json(folder / "index.json", index)  # first: a part that exists is not looked at again
            files.write_bytes(_part(folder, first + number), buffer.getvalue())
    files.write_json(folder / "index.json", index | {"complete": True})
    left_out = f", {len(index['unreadable'])} unreadable left out" if index["unreadable"] else ""
    total = len(source) - len(index["unreadable"])
    return f"{_described(total, shapes)}{left_out}, in {count} part{'s' * (count > 1)}: {folder}"


def _parts(
    source: Source, encoder: Encoder, which: str, size: int, progress: Callable[[int, int], None]
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """(number, indices of its images, features) of each part of `size` images, less those that cannot be read."""
    held: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    nothing = np.zeros((0, encoder.size, encoder.size, encoder.channels), np.uint8)
    empty = features_of(encoder, nothing, which)
    number, count = 0, -(-len(source) // size)
    for rows, images in source.chunks(CHUNK):
        while rows[0] >= (number + 1) * size:
            yield number, *_joined(held, empty)
            number, held = number + 1, []
        held.append((rows, features_of(encoder, images, which, CHUNK, fixed=True)))
        progress(int(rows[-1]) + 1, len(source))
    while number < count:
        yield number, *_joined(held, empty)
        number, held = number + 1, []


def _joined(held: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]], empty: dict[str, np.ndarray]) -> tuple[Any, Any]:
    if not held:
        return np.zeros(0, np.int64), empty
    rows = np.concatenate([rows for rows, _ in held])
    return rows, {name: np.concatenate([found[name] for _, found in held]) for name in held[0][1]}


def _begin(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The index of the folder, new or as an earlier call of the same command left it."""
    files.remove_leftovers(folder)
    saved = files.read_json(folder / "index.json", "remove the folder, and run the command again")
    if not saved:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--out={folder}: holds something else; allowed: a new folder")
        index = index | {"unreadable": {}}
        files.write_json(folder / "index.json", index)
        return index
    for key, value in index.items():
        if saved.get(key) != value:
            raise UserError(f"--out={folder}: holds features of other {key}; allowed: a new folder")
    return {key: value for key, value in saved.items() if key != "complete"}


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npz"


def _digest_of(encoder: Encoder) -> str:
    leaves = jax.tree_util.tree_leaves_with_path((encoder.params, encoder.stats))
    return files.digest({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


def _arrays(
    found: dict[str, np.ndarray], names: Sequence[str], labels: np.ndarray | None, classes: Sequence[str]
) -> dict[str, np.ndarray]:
    """As in the .npz file of `outputs.write_embeddings`, with "patches" [N, h, w, D] beside or instead."""
    own = {"embeddings" if name == "embedding" else name: array for name, array in found.items()}
    known = {} if labels is None else {"labels": labels, "classes": np.array(classes, str)}
    return {**own, "path": np.array(names, str), **known}


def _described(count: int, shapes: dict[str, tuple[int, ...]]) -> str:
    words = [
        f"{count} embeddings of {shape[0]} dimensions"
        if name == "embedding"
        else f"{count} maps of {shape[0]} x {shape[1]} patches of {shape[2]} dimensions"
        for name, shape in shapes.items()
    ]
    return " and ".join(words)
