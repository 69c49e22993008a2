"""A table of image files: a column of paths and, optionally, columns of labels, groups and parts."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.channels import band_files, by_stem, split_band
from ssl_jax.data.decoding import EXTENSIONS
from ssl_jax.data.folder import File, from_files
from ssl_jax.data.layout import PARTS
from ssl_jax.data.source import Source, pick_parts
from ssl_jax.data.table import (
    Table,
    group_numbers,
    in_two_parts,
    read_table,
    several_labels,
    single_label,
    warn_of_repeats,
)
from ssl_jax.errors import UnreadableError, UserError

PATH, LABEL, SPLIT = ("path", "file", "filename", "image"), ("label", "class", "target"), "split"


def read(data: Data) -> Source:
    """The images listed in the table data.path, in its order; see `table.read_table` for the format.

    With data.bands, a row lists an image by one of its files, or by what their names share, and keeps this as its name.

    Column names are not case-sensitive. Paths are in the column that data.image_column names, or else in path, file,
    filename or image. They are absolute or relative to the table's folder; \\ counts as / in a path without /. The
    column split may say train, val or test. A single label is in the column that data.labels names, or else in label,
    class or target; an empty cell, or nan, means unknown. For several labels per image, data.labels names the columns;
    see `table.several_labels`. data.group names the column with the patient or owner; no group may be in two parts.
    Errors name the line. Warnings say which images are listed again, and with other labels.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; set it to a table (.csv, .tsv) of image files")
    where, table_path = f"config.data.path={data.path!r}", Path(data.path).expanduser()
    table = read_table(table_path, where)
    paths, parts = paths_of(table, data.image_column), _parts(table)
    groups = _groups(table, parts, data.group) if data.group else None
    labels, classes, single = None, [], [""] * len(paths)
    columns: list[str] = []  # those of the labels
    if len(data.labels) > 1:
        labels = several_labels(table, data.labels, paths, data, 0.0 if data.blank == "zeros" else np.nan)
        classes, columns = list(data.labels), [table.demand("labels", name) for name in data.labels]
    elif column := table.demand("labels", data.labels[0]) if data.labels else table.find(*LABEL):
        single, columns = single_label(table, column), [column]
        classes = sorted(set(single) - {""})
        if all(name.isdecimal() for name in classes):
            classes.sort(key=int)
    folder = f"{table_path.parent}/"
    places = [path if path.startswith("/") else folder + path for path in paths]
    found = _bands(places, data.bands) if data.bands else [(place, (), "") for place in places]
    shared = [os.path.relpath(place[0], folder) for place in found] if data.bands else paths
    warn_of_repeats(table, shared, [*columns, *filter(None, [table.find(SPLIT)])])
    rows: dict[str, list[int]] = {"train": []}
    for row, part in enumerate(parts):
        rows.setdefault(part, []).append(row)
    selected = [row for part in pick_parts(rows, data.split, where) for row in part]
    objects = table.known(table.demand("pairs", data.pairs)) if data.pairs else None
    files = [
        File(
            found[row][0],
            paths[row],
            single[row] or None,
            table.at(row),
            # An image whose object is not given is an object of its own.
            "" if objects is None else objects[row] or f"{paths[row]}{table.at(row)}",
            *found[row][1:],
        )
        for row in selected
    ]
    labels = None if labels is None else labels[selected]
    groups = None if groups is None else groups[selected]
    return from_files(files, classes, data, where, labels=labels, groups=groups)


def _bands(places: Sequence[str], bands: Sequence[str]) -> list[tuple[str, tuple[str, ...], str]]:
    """(what the names of its files share, these files, what is wrong with them) of the image at each place."""

    @functools.cache
    def files_in(folder: str) -> dict[str, list[str]]:
        try:
            names = sorted(os.listdir(folder))  # noqa: PTH208 - names are enough
        except OSError:  # no such folder: all of its files are missing
            return {}
        return by_stem(f"{folder}/{name}" for name in names if PurePath(name).suffix.lower() in EXTENSIONS)

    found = []
    for place in places:
        folder, name = os.path.split(place)
        stem = PurePath(name).stem if PurePath(name).suffix.lower() in EXTENSIONS else name
        image = split_band(stem, bands)
        image = stem if image is None else image
        files, problem = band_files(files_in(folder), image, bands)
        if problem and Path(place).is_dir():  # an image whose files are called like the endings alone
            files, problem = band_files(files_in(place), "", bands)
            folder, image = os.path.split(place)
        found.append((f"{folder}/{image}" if image else folder, files, problem))
    return found


def bands_at(path: str, bands: Sequence[str]) -> tuple[str, ...]:
    """The files of the image with this file. Raises UnreadableError if one is missing."""
    [(_, files, problem)] = _bands([path], bands)
    if problem:
        raise UnreadableError(problem)
    return files


def paths_of(table: Table, column: str = "") -> list[str]:
    """The image of each row: from `column` (data.image_column), or else from the first of PATH that exists."""
    name = table.demand("image_column", column) if column else table.find(*PATH)
    if name is None:
        raise UserError(
            f"{table.where}: no column of paths, such as {', '.join(PATH)}; the columns are {', '.join(table.header)}; "
            "name it with config.data.image_column"
        )
    paths = table.filled(name, "the path of an image file")
    return [path if "/" in path else path.replace("\\", "/") for path in paths]


def _parts(table: Table) -> list[str]:
    """The part of each row: train, val or test."""
    name = table.find(SPLIT)
    if name is None:
        return ["train"] * len(table.lines)
    cells = table.column(name)
    invalid = [cells.index(cell) for cell in set(cells) if cell.lower() not in PARTS]
    if invalid:
        row = min(invalid)
        raise table.fail(row, f"split={cells[row]!r}; allowed: {', '.join(PARTS)}")
    return [PARTS[cell.lower()] for cell in cells]


def _groups(table: Table, parts: list[str], group: str) -> np.ndarray:
    """The column `group` as int64 [N]. Raises UserError if a cell is empty or a group is in two parts."""
    values = table.filled(table.demand("group", group), "the group of the image")
    groups = group_numbers(values)
    if rows := in_two_parts(groups, parts):
        row, other = rows
        conflict = f"{group} {values[row]!r} is in {parts[row]}, but{table.at(other)} in {parts[other]}"
        raise table.fail(row, f"{conflict}; all images of one {group} must be in the same part")
    return groups
