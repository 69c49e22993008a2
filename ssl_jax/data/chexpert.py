"""CheXpert as Stanford delivers it: train.csv and valid.csv, fourteen observations, the patient in the path.

Source: https://arxiv.org/abs/1901.07031.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.files import File, from_files, printable
from ssl_jax.data.source import Source
from ssl_jax.data.table import Table, read_table, several_labels
from ssl_jax.errors import NoPartError, UserError, unknown

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
# Ten findings, as many as the study had: without the absence of any, the two rarest kinds and the devices.
STUDY = tuple(
    name
    for name in OBSERVATIONS
    if name not in ("No Finding", "Enlarged Cardiomediastinum", "Pleural Other", "Support Devices")
)
PRESETS = {(): OBSERVATIONS, ("study",): STUDY, ("competition",): COMPETITION}
PARTS = {"train": ("train",), "val": ("valid",), "test": ("test", "valid")}  # of each the first table that is there
PATIENT = re.compile(r"patient(\d+)")


def read(data: Data) -> Source:
    """The images of data.path, the folder that holds train.csv and valid.csv, in their order.

    split: train; val, the hand-labelled valid.csv; test, test.csv or without one valid.csv; all. data.frontal chooses
    the views, data.labels the observations (names, ("study",), ("competition",), () for all fourteen), data.uncertain
    and data.blank what becomes of -1 and of nothing (`table.several_labels`). Images are gray unless data.channels says
    otherwise. groups are the patients' numbers. UserError if a patient of train.csv is in another table too.
    """
    if not data.path:
        raise UserError("config.data.path='': missing; allowed: the folder of CheXpert, which holds train.csv")
    where, root = f"config.data.path={data.path!r}", Path(data.path).expanduser()
    if data.pairs not in ("", "patient"):
        raise UserError(f"config.data.pairs={data.pairs!r}: allowed for chexpert: patient")
    if data.split not in (*PARTS, "all"):
        raise unknown("config.data.split", data.split, [*PARTS, "all"])
    names = tuple(PRESETS.get(tuple(data.labels), data.labels))
    there = [name for name in ("train", "valid", "test") if (root / f"{name}.csv").is_file()]
    wanted = there if data.split == "all" else [n for n in PARTS[data.split] if n in there][:1]
    if not wanted:
        if not there:
            raise UserError(f"{where}: no train.csv in it; allowed: the folder of CheXpert")
        raise NoPartError(f"{where}: no {data.split} part; available: {', '.join(there)}")
    # A patient of the training images in a test would make the test worthless.
    read_too = [n for n in there if n in wanted or "train" in wanted]
    tables = {name: read_table(root / f"{name}.csv", f"{root / name}.csv") for name in read_too}
    patients = {name: _patients(table) for name, table in tables.items()}
    for name in read_too:
        if name == "train" or "train" not in patients:
            continue
        both = np.intersect1d(patients["train"], patients[name])
        if len(both):
            at = [tables[n].at(int(np.flatnonzero(patients[n] == both[0])[0])) for n in ("train", name)]
            raise UserError(
                f"{where}: patient {both[0]} is in train.csv{at[0]} and in {name}.csv{at[1]}; allowed: in one of them"
            )
    chosen = [(tables[name], patients[name], _views(tables[name], data.frontal)) for name in wanted]
    blank = "zeros" if data.blank == "auto" else data.blank

    def labels(table: Table, rows: np.ndarray) -> np.ndarray:
        return several_labels(table, names, table.column("Path", "path"), data, blank)[rows]

    return from_files(
        [file for table, _, rows in chosen for file in _files(table, rows, root, data.pairs)],
        list(names),
        dataclasses.replace(data, channels=data.channels or 1),
        where,
        labels=np.concatenate([labels(table, rows) for table, _, rows in chosen]),
        groups=np.concatenate([numbers[rows] for _, numbers, rows in chosen]),
    )


def _patients(table: Table) -> np.ndarray:
    """int64 [N] from the paths."""
    column = table.column("Path", "path")
    found = [PATIENT.search(row[column]) for row in table.rows]
    for n, match in enumerate(found):
        if match is None:
            raise table.fail(n, f"Path={table.rows[n][column]!r}: no patient in it; allowed: .../patient00001/...")
    return np.array([int(match[1]) for match in found if match], np.int64)


def _views(table: Table, wanted: str) -> np.ndarray:
    """Numbers of the rows whose Frontal/Lateral is `wanted`."""
    if wanted == "all":
        return np.arange(len(table.rows))
    column = table.column("Frontal/Lateral", "frontal")
    return np.flatnonzero([row[column].strip().lower() == wanted for row in table.rows])


def _files(table: Table, rows: np.ndarray, root: Path, pairs: str) -> list[File]:
    column = table.column("Path", "path")
    made = []
    for n in rows:
        # The first folder is the name of the download (CheXpert-v1.0-small), whatever the folder is called here.
        path = table.rows[n][column].strip().partition("/")[2]
        match = PATIENT.search(path) if pairs else None
        made.append(File(f"{root}/{path}", printable(path), None, "", table.at(n), match[0] if match else ""))
    return made
