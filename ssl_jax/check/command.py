"""`ssl-jax check`: reads a data set once, looks for problems, writes a table and a page of pictures."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files
from ssl_jax.check import page
from ssl_jax.check.problems import PROBLEMS, Images, find, table
from ssl_jax.check.scan import Scan, scan
from ssl_jax.config import Config, Data, default, resolve
from ssl_jax.config_file import override
from ssl_jax.data import Source, open_source
from ssl_jax.data.csv import paths_of
from ssl_jax.data.table import read_table
from ssl_jax.encoder import Encoder
from ssl_jax.errors import NoPartError, UserError
from ssl_jax.load import load_with_settings
from ssl_jax.progress import counting
from ssl_jax.settings import data_of

COLUMNS = ("path", "problem", "other path", "score", "note", "file")


def check(
    data: str, workdir: str = "", test: str = "", out: str = "check", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes out/check.csv and out/check.html, and prints how many problems of each kind there are.

    workdir: of an encoder; without it, what needs one is left out. test: data; "": the test part of the data, if they
    have one. Returns the number of images, of problems of each kind, and the paths.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={out}: is a file; allowed: a folder")
    encoder: Encoder | None = None
    if workdir:
        encoder, config = load_with_settings(workdir, "", overrides)
    else:
        config = resolve(override(default(), overrides))
    specs, sources = _open(config, encoder, data, test)
    images = _images(specs, sources, encoder)
    if not images.names:
        raise UserError(f"--data={data}: no image can be read; allowed: one or more")
    rows = find(images, specs[0])
    skipped = _skipped(images, encoder)
    files.write_csv(folder / "check.csv", COLUMNS, table(images, rows))
    content = page.write(images, rows, f"Check of {data}", skipped, str(folder / "check.csv"))
    files.write_bytes(folder / "check.html", content.encode("utf-8", "backslashreplace"))
    counts = Counter(row.problem for row in rows)
    print(f"{len(images.names)} images, {int(images.is_test.sum())} of them in the test set. {skipped}")
    for problem in PROBLEMS:
        if counts[problem]:
            print(f"  {problem:16} {counts[problem]}")
    print(f"table: {folder / 'check.csv'}\npage:  {folder / 'check.html'}")
    return {
        "images": len(images.names),
        "problems": {problem: counts[problem] for problem in PROBLEMS},
        "table": str(folder / "check.csv"),
        "page": str(folder / "check.html"),
    }


def _open(config: Config, encoder: Encoder | None, data: str, test: str) -> tuple[list[Data], list[Source]]:
    """What is read, and the sources: the training images, and the test images if there are any."""

    def spec(text: str, flag: str) -> Data:
        # What cannot be read is a finding here, however much it is.
        read = dataclasses.replace(data_of(text, flag, config.data), max_bad_share=1.0)
        return encoder.data(read) if encoder else read

    first = spec(data, "--data")
    specs, sources = [first], [open_source(first)]
    second = spec(test, "--test") if test else first
    part = "test" if not test or test == data or second.name == "chexpert" else "all"
    try:
        sources.append(open_source(second, part))
        specs.append(dataclasses.replace(second, split=part))
    except NoPartError:
        if test:
            raise
    if sources[-1].shape != sources[0].shape:
        raise UserError(
            f"--test={test}: images of {list(sources[-1].shape)}; allowed: {list(sources[0].shape)}, as in --data; "
            "set --config.data.size and --config.data.channels"
        )
    return specs, sources


def _images(specs: Sequence[Data], sources: Sequence[Source], encoder: Encoder | None) -> Images:
    scans = []
    for spec, source, title in zip(specs, sources, ("reading", "reading the test set")):
        with counting(title, "images") as progress:
            scans.append(scan(source, spec, encoder, progress))
    labels, classes = _labels(scans)
    groups = [_groups(spec, source) for spec, source in zip(specs, sources, strict=True)]
    texts = None
    if all(group is not None for group in groups):
        texts = [each[i] for each, s in zip(groups, scans, strict=True) if each for i in s.places.tolist()]
    features = [s.features for s in scans if s.features is not None]
    return Images(
        scans,
        np.concatenate([np.full(len(s.names), bool(i)) for i, s in enumerate(scans)]),
        [name for s in scans for name in s.names],
        [key for s in scans for key in s.keys],
        np.concatenate(features) if features else None,
        labels,
        classes,
        texts,
    )


def _labels(scans: Sequence[Scan]) -> tuple[np.ndarray | None, list[str]]:
    """The labels of all images, as `Images` has them, and the classes of both sets."""
    classes = list(dict.fromkeys(name for scan in scans for name in scan.source.classes))
    kinds = {scan.source.multilabel for scan in scans if scan.source.labels is not None}
    if len(kinds) > 1:
        raise UserError("--test: one label per image in one set, several in the other; allowed: the same in both")
    if not kinds:
        return None, classes
    parts: list[np.ndarray] = []
    for each in scans:
        if each.source.labels is not None:
            parts.append(each.source.labels_as(classes, "--data")[each.places])
        elif kinds == {True}:
            parts.append(np.full((len(each.names), len(classes)), np.nan, np.float32))
        else:
            parts.append(np.full(len(each.names), -1, np.int32))
    return np.concatenate(parts), classes


def _groups(data: Data, source: Source) -> list[str] | None:
    """The patient of each image as text, which means the same in every table; None if the data do not say."""
    if source.groups is None:
        return None
    if data.name != "csv":
        return [str(group) for group in source.groups.tolist()]
    listed = read_table(Path(data.path).expanduser(), f"config.data.path={data.path!r}")
    column = listed.column(listed.demand("group", data.group))
    of_name = dict(zip(paths_of(listed, data.image_column), column, strict=True))
    return [of_name[name] for name in source.names]


def _skipped(images: Images, encoder: Encoder | None) -> str:
    """What was not looked for, in words."""
    if encoder is None:
        return "Without --workdir, copies are found by their pixels only, and outliers and labels are not judged."
    if images.labels is None:
        return "The images have no labels to judge."
    if len(images.scans) == 1:
        return "There is no test set to compare with; name one with --test."
    return ""
