"""`ssl-jax select`: the images that are worth labelling, as a table to fill in and a page to label with."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ssl_jax import files
from ssl_jax.classifier import load_classifier
from ssl_jax.config import Config, Data
from ssl_jax.data import Source, open_source
from ssl_jax.data.decoding import read_image
from ssl_jax.data.labelled import labelled_indices
from ssl_jax.data.source import printable
from ssl_jax.encoder import Encoder, load_encoder
from ssl_jax.errors import UserError, unknown
from ssl_jax.evaluate.finetuning import probabilities
from ssl_jax.evaluate.linear import linear_probe
from ssl_jax.plotting import shown
from ssl_jax.run_folder import RunFolder
from ssl_jax.selection import BY_DOUBT, STRATEGIES, embed, expected
from ssl_jax.selection import select as best_of
from ssl_jax.settings import data_of, images_only, settings_of

PAGE_SIZE = 512  # px; longest side of the pictures on the page
Head = Callable[[np.ndarray], np.ndarray]  # embeddings [N, D] -> logits or probabilities [N, K]


class Labelled(NamedTuple):
    """The images of --have with a label: labels int [M] or float [M, K], and the class names."""

    source: Source
    paths: list[str] | None  # see `_paths`
    labels: np.ndarray
    classes: list[str]


def select(
    workdir: str,
    labels: int,
    out: str,
    have: str = "",
    data: str = "",
    strategy: str = "typical",
    classes: str = "",
    page: bool = False,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the table `out` of the images to label next and, with `page`, a page beside it; returns what it prints.

    workdir: a run folder, or a classifier's, whose doubt then counts. have: labelled data. See `ssl_jax.selection`.
    """
    table = Path(out)
    _check(labels, table, strategy, seed)
    encoder, head, config = _model(Path(workdir), data, overrides)
    source, spec = _open_pool(encoder, config, data)
    _check_count(labels, len(source))
    known = _open_labelled(have, encoder, config, _names(classes)) if have else None
    if strategy in BY_DOUBT and not head:
        _check_classes(known, have, strategy)
    features, readable = embed(encoder, source)
    source = source.take(readable)
    places, features, groups = _together(known, encoder, source, features)
    left = len(source) - int((places < len(source)).sum())
    _check_count(labels, left)
    if strategy in BY_DOUBT and not head and known:
        head = _regression(features[places], known, seed)
    options: Any = {"seed": seed, "have": places, "groups": groups}
    options |= {"probabilities": head(features) if head else None}
    options |= {"classes": len(_names(classes)) or (len(known.classes) if known else 0)}
    chosen = best_of(features, labels, strategy, **options)
    result = {"labels": labels, "strategy": strategy, "images": left, "out": out}
    result |= expected(features, chosen, places, seed)
    part = source.take(chosen)
    paths, columns = _paths_of(part, spec, table), _columns(part.groups, config.data)
    if page:  # before the table: a name of a class that no table can hold is an error
        result["page"] = str(table.with_suffix(".html"))
        offered = _names(classes) or (known.classes if known else ())
        files_of = part.files or [(path,) for path in paths]
        _write_page(table.with_suffix(".html"), paths, files_of, spec, offered, columns)
    empty = [""] * len(paths)
    cells = [paths, *columns.more.values(), *(empty for _ in columns.labels)]
    files.write_csv(table, [columns.path, *columns.more, *columns.labels], list(zip(*cells, strict=True)))
    _print(result)
    return result


def _check(labels: int, out: Path, strategy: str, seed: int) -> None:
    if labels < 1:
        raise UserError(f"--labels={labels}: allowed: 1 or more")
    if seed < 0:
        raise UserError(f"--seed={seed}: allowed: 0 or more")
    if strategy not in STRATEGIES:
        raise unknown("--strategy", strategy, STRATEGIES)
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out={out}: unknown ending {out.suffix!r}; allowed: .csv")
    if out.exists():
        raise UserError(f"--out={out}: exists already, and may hold labels; allowed: a new file")


def _check_count(labels: int, left: int) -> None:
    if labels > left:
        raise UserError(f"--labels={labels}: there are {left} images to choose from; allowed: at most {left}")


def _model(folder: Path, data: str, overrides: Sequence[str]) -> tuple[Encoder, Head | None, Config]:
    """(encoder, its classifier if there is one, settings)."""
    head, read = None, dict[str, Any]()
    if (folder / "classifier.json").is_file():
        classifier = load_classifier(folder)
        encoder, (w, b) = classifier.fitted_encoder, (np.asarray(classifier.params["head"][key]) for key in ("w", "b"))
        head = functools.partial(_probabilities, lambda features: features @ w + b, classifier.multilabel)
        read = classifier.about.get("read", {})
    else:
        encoder = load_encoder(folder)
    if not data and not RunFolder(folder).config.is_file():
        raise UserError(f"--data: missing; {folder} does not say which images to choose from")
    return encoder, head, settings_of(folder, overrides, read)


def _regression(features: np.ndarray, known: "Labelled", seed: int) -> Head:
    probe = linear_probe(features, known.labels, classes=len(known.classes), seed=seed)
    return functools.partial(_probabilities, probe.scores, known.labels.ndim == 2)


def _probabilities(logits: Head, multilabel: bool, features: np.ndarray) -> np.ndarray:
    return probabilities(logits(features), multilabel)


def _open_pool(encoder: Encoder, config: Config, data: str) -> tuple[Source, Data]:
    """The images to choose from, without their labels: the part that is for training."""
    spec = images_only(encoder.data(data_of(data, "--data", config.data) if data else config.data))
    source = open_source(spec)
    source.forget_labels()
    if source.groups is not None and len(source) > 1 and len(np.unique(source.groups)) == 1:
        where = f"--data={data}" if data else f"config.data.path={spec.path!r}"
        by = f"config.data.group={spec.group!r}" if spec.group else "patient"
        raise UserError(f"{where}: all {len(source)} images are of one group ({by}); allowed: two groups or more")
    return source, spec


# The labels at hand.


def _open_labelled(have: str, encoder: Encoder, config: Config, offered: Sequence[str]) -> Labelled:
    spec = dataclasses.replace(encoder.data(data_of(have, "--have", config.data)), max_bad_share=0.0)
    try:
        source = open_source(spec, "all")
    except UserError as error:  # a file that is not there
        raise UserError(f"--have={have}: {error}") from error
    labels, paths = source.labels_as(source.classes, f"--have={have}"), _paths(source)
    for name in source.classes if offered else ():
        if name not in offered:
            raise unknown(f"--have={have}: class", name, offered)
    known = labelled_indices(labels)
    if not len(known):
        raise UserError(f"--have={have}: no image has a label; allowed: at least one")
    first: dict[str, int] = {}
    for i in known.tolist():
        before = first.setdefault((paths or source.names)[i], i)
        if not np.array_equal(labels[i], labels[before], equal_nan=True):
            pair = (
                "" if source.multilabel else f": {source.classes[labels[before]]!r} and {source.classes[labels[i]]!r}"
            )
            raise UserError(f"--have={have}: {source.names[i]!r} has two labels{pair}; allowed: one row per image")
    kept = list(first.values())
    return Labelled(source.take(kept), [paths[i] for i in kept] if paths else None, labels[kept], source.classes)


def _check_classes(known: Labelled | None, have: str, strategy: str) -> None:
    needs = f"--strategy={strategy}: needs"
    if known is None:
        raise UserError(f"{needs} --have=labelled.csv, or the folder of a classifier as --workdir")
    labels = known.labels
    several = labels.ndim == 2
    if not several and len(np.unique(labels)) == 1:
        only = known.classes[labels[0]]
        raise UserError(f"{needs} two classes or more, but all images of --have={have} are {only!r}")
    if several and not ((labels >= 0.5).any(axis=0) & (labels < 0.5).any(axis=0)).any():
        raise UserError(f"{needs} a class with both positive and negative images; --have={have} has none")


def _together(
    known: Labelled | None, encoder: Encoder, pool: Source, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(places, embeddings, groups): the pool and, after it, the labelled images that are not in it.

    places: of the labelled images, int64 [M]. groups: those of the pool; a new one for each image after it.
    """
    if known is None:
        return np.zeros(0, np.int64), features, pool.groups
    places = _places(known, pool, _paths(pool))
    new = np.flatnonzero(places < 0)
    places[new] = len(features) + np.arange(len(new))
    if len(new):
        features = np.concatenate([features, encoder.embed(known.source.load_many(new))])
    groups = pool.groups
    if groups is not None:
        groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(new))])
    return places, features, groups


def _places(known: Labelled, pool: Source, paths: list[str] | None) -> np.ndarray:
    """The index in the pool of each labelled image, int64 [M]; -1 if it is not there."""
    if paths is not None:
        places = {path: i for i, path in enumerate(paths)}
        return np.array([places.get(path, -1) for path in known.paths or known.source.names], np.int64)
    # The pool are arrays, of which some were written as files that bear their names.
    places = {name: i for i, name in enumerate(pool.names)}
    found = np.array([places.get(Path(name).stem, -1) for name in known.source.names], np.int64)
    for i in np.flatnonzero(found >= 0).tolist():
        if not np.array_equal(known.source.load(i), pool.load(int(found[i]))):
            found[i] = -1
    return found


def _paths(source: Source) -> list[str] | None:
    """The absolute path of each image; None if images are no files."""
    return [os.path.abspath(path) for path in source.paths] or None  # noqa: PTH100


# What it writes and prints.


def _paths_of(chosen: Source, data: Data, out: Path) -> list[str]:
    """The absolute paths of the chosen images. Images that are no files are written as PNG, beside `out`."""
    paths = _paths(chosen)
    if paths is None:
        native = open_source(dataclasses.replace(data, size=0, channels=0))
        paths = _write_images(out.with_suffix(""), chosen.names, native)
    for name, path in zip(chosen.names, paths, strict=True):
        if printable(path) != path:  # its bytes are not UTF-8
            raise UserError(f"{name!r}: cannot be listed in a table; rename it")
    return paths


class Columns(NamedTuple):
    """Names of the columns of the table, as `ssl-jax finetune` will look for them. more: further columns."""

    path: str
    more: dict[str, list[int]]
    labels: Sequence[str]


def _columns(groups: np.ndarray | None, data: Data) -> Columns:
    """data: config.data; groups: of the chosen images, int [N]."""
    more = {data.group: groups.tolist()} if groups is not None and data.group else {}
    return Columns(data.image_column or "path", more, data.labels or ("label",))


def _write_page(
    out: Path,
    paths: list[str],
    files_of: Sequence[tuple[str, ...]],
    data: Data,
    classes: Sequence[str],
    columns: Columns,
) -> None:
    """files_of: of each image (`Source.files`).

    classes: of which an image has one; if the table has several columns of labels, these are the classes.
    """
    from ssl_jax.labelling import write_page

    several = len(columns.labels) > 1
    offered = list(dict.fromkeys(columns.labels if several else classes))
    pictures, names = [_picture(each, data) for each in files_of], (columns.path, columns.labels[0])
    write_page(out, pictures, paths, offered, multilabel=several, columns=names, more=columns.more)


def _write_images(folder: Path, names: Sequence[str], source: Source) -> list[str]:
    """Writes these images of the source as NAME.png; returns their absolute paths."""
    index, paths = {name: i for i, name in enumerate(source.names)}, []
    channels = source.shape[2]
    if channels not in (1, 3, 4):
        raise UserError(f"images: {channels} channels; allowed, to write them as PNG: 1, 3 or 4")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        image = source.load(index[name])
        path = folder.absolute() / f"{name}.png"
        Image.fromarray(image[..., 0] if channels == 1 else image).save(path)
        paths.append(str(path))
    return paths


def _picture(files_of_one: tuple[str, ...], data: Data) -> np.ndarray:
    """The whole picture as a person should see it, uint8 [H, W, C], at most PAGE_SIZE px wide and high."""
    if data.bands:
        planes = [read_image([path], 0, 1, data) for path in files_of_one]
        array = np.concatenate([plane for plane in planes if plane.shape == planes[0].shape], axis=-1)
    else:
        array = read_image(files_of_one, 0, data.channels, data)
    picture = Image.fromarray(np.ascontiguousarray(shown(array)))
    picture.thumbnail((PAGE_SIZE, PAGE_SIZE))
    return np.atleast_3d(np.asarray(picture))


def _names(classes: str) -> list[str]:
    return [name.strip() for name in classes.split(",") if name.strip()]


def _print(result: dict[str, Any]) -> None:
    coverage, near = result["coverage"], result["near_duplicates"]
    print(f"{result['labels']} of {result['images']} images to label ({result['strategy']}): {result['out']}")
    print(
        f"  coverage: an image is {coverage['chosen']:.3f} from the nearest labelled one on average, "
        f"{coverage['random']:.3f} if they are drawn at random (0: the same, 1.41: unrelated)"
    )
    print(
        f"  near duplicates among them: {near['chosen']:g} ({near['chosen'] / result['labels']:.1%}), "
        f"{near['random']:g} ({near['random'] / result['labels']:.1%}) if they are drawn at random"
    )
    if "page" in result:
        print(f"page: {result['page']}")
