"""CheXpert as Stanford distributes it: train.csv and valid.csv, fourteen observations, the patient in the path.

Source: https://arxiv.org/abs/1901.07031.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.folder import File, from_files
from ssl_jax.data.source import Source, pick_parts
from ssl_jax.data.table import Table, in_two_parts, read_table, several_labels, warn_of_repeats
from ssl_jax.errors import UserError, unknown

OBSERVATIONS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # section 4
# The ten findings of the published study: without "No Finding", the two rarest ones and the devices.
STUDY = tuple(
    name
    for name in OBSERVATIONS
    if name not in ("No Finding", "Enlarged Cardiomediastinum", "Pleural Other", "Support Devices")
)
PRESETS = {"study": STUDY, "competition": COMPETITION}
TABLES = {"train": "train.csv", "val": "valid.csv", "test": "test.csv"}
# The first folder of a path in a table is the name of the download (CheXpert-v1.0-small); it is ignored.
PATH = re.compile(r"(?:.*/)?([^/]+/patient(\d{1,18})/.+)")


def read(data: Data) -> Source:
    """The images listed in train.csv and valid.csv in the folder data.path, in this order.

    split: train; val (the hand-labelled valid.csv); test (test.csv or, if it is missing, valid.csv); or all.
    data.frontal selects the projection. data.labels selects the observations: names, ("study",), ("competition",), or
    () for all fourteen. data.uncertain and data.blank say what -1 and an empty cell mean (`table.several_labels`).
    Images are gray unless data.channels is set. groups are patient numbers. Raises UserError if a patient is in two
    tables.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; set it to the folder of CheXpert, which contains train.csv")
    if data.pairs not in ("", "patient"):
        raise UserError(f"config.data.pairs={data.pairs!r}: allowed with chexpert: patient")
    where, root = f"config.data.path={data.path!r}", Path(data.path).expanduser()
    names = _observations(data.labels)
    paths = {part: root / name for part, name in TABLES.items() if (root / name).is_file()}
    if not paths:
        raise UserError(f"{where}: contains no train.csv; set it to the folder with train.csv and the folder train")
    parts = pick_parts({part: part for part in paths}, data.split, where)
    # Reads all tables, whatever the part: a test on patients from the training images would be worthless.
    lists = {part: _List(read_table(path, f"{where}: {path.name}"), data.frontal) for part, path in paths.items()}
    _check_patients(lists, where)
    blank = np.nan if data.blank == "ignore" else 0.0
    selected = [lists[part] for part in parts]
    files = [file for each in selected for file in each.files(root, data.pairs)]
    if not files:
        raise UserError(f"config.data.frontal={data.frontal!r}: {where} has no such images; use all")
    return from_files(
        files,
        names,
        dataclasses.replace(data, channels=data.channels or 1, bands=()),
        where,
        labels=np.concatenate([several_labels(e.table, names, e.paths, data, blank)[e.rows] for e in selected]),
        groups=np.concatenate([e.patients[e.rows] for e in selected]),
    )


class _List:
    """The images in a table: paths [N] below the folder, patients int64 [N], and the rows of the projection `view`."""

    def __init__(self, table: Table, view: str):
        name = table.find("Path")
        if name is None:
            raise UserError(f"{table.where}: no column Path; the columns are {', '.join(table.header)}")
        cells = table.column(name)
        matches = [PATH.fullmatch(cell) for cell in cells]
        if None in matches:
            row = matches.index(None)
            example = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
            raise table.fail(row, f"{name}={cells[row]!r}: names no patient; expected a path like {example}")
        self.table, self.paths = table, [match[1] for match in matches if match]
        warn_of_repeats(table, self.paths, [each for each in OBSERVATIONS if each in table.header])
        self.patients = np.array([int(match[2]) for match in matches if match], np.int64)
        self.rows = self._rows(view)

    def _rows(self, view: str) -> np.ndarray:
        if view == "all":
            return np.arange(len(self.paths))
        name = self.table.find("Frontal/Lateral")
        if name:
            return np.flatnonzero([cell.lower() == view for cell in self.table.column(name)])
        # Lists of the test images, as found on the web, have only paths and observations.
        return np.flatnonzero([f"_{view}" in path for path in self.paths])

    def files(self, root: Path, pairs: str) -> list[File]:
        patients = self.patients.tolist()
        return [
            File(f"{root}/{path}", path, None, self.table.at(row), str(patients[row]) if pairs else "")
            for row, path in ((row, self.paths[row]) for row in self.rows.tolist())
        ]


def _observations(labels: tuple[str, ...]) -> list[str]:
    """The names of the observations that config.data.labels selects."""
    if len(labels) == 1 and labels[0] in PRESETS:
        return list(PRESETS[labels[0]])
    for name in labels:
        if name not in OBSERVATIONS:
            raise unknown("config.data.labels", name, (*OBSERVATIONS, *PRESETS))
    return list(labels or OBSERVATIONS)


def _check_patients(lists: Mapping[str, _List], where: str) -> None:
    patients = np.concatenate([each.patients for each in lists.values()])
    places = [(part, row) for part, each in lists.items() for row in range(len(each.patients))]
    if rows := in_two_parts(patients, [part for part, _ in places]):
        second, first = (f"{TABLES[part]}{lists[part].table.at(row)}" for part, row in map(places.__getitem__, rows))
        raise UserError(f"{where}: patient {patients[rows[0]]} is in {first} and in {second}; keep them in one table")
