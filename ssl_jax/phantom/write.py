"""Phantom data on disk, in the layout of CheXpert's own download, so that its reader takes them as they are."""

import functools
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from ssl_jax.errors import UserError
from ssl_jax.files import write_bytes, write_csv
from ssl_jax.phantom.draw import draw
from ssl_jax.phantom.patients import OBSERVATIONS, Patient, Study, make_patient

COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
FOLDERS = ("train", "valid")
# Test patients are numbered from here, so that a patient of either part stays the same however many are made.
FIRST_TEST, LAST = 90_001, 99_999
VERSION = 1  # of the drawings: raised whenever an image of the same seed changes
QUALITY = 90  # of the JPEGs
CHUNK = 16  # patients a process is given at a time

Row = list[str]


def write(
    out: Path,
    *,
    patients: int,
    seed: int = 0,
    size: int = 128,
    test: int = 300,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes images, masks, train.csv, valid.csv and phantom.json into the folder `out`; returns the number of images.

    patients: training patients, about two images each. test: images with clean labels in valid.csv, of other patients.
    workers: processes. progress(done, total patients) is called from this process.
    The same call finishes a folder that was left unfinished. UserError for numbers out of range and if `out` holds
    anything else.
    """
    for name, value, low, high in (
        ("patients", patients, 1, FIRST_TEST - 1),
        ("seed", seed, 0, 2**63),
        ("size", size, 32, 1024),
        ("test", test, 1, LAST - FIRST_TEST),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name}={value}: allowed: {low} to {high}")
    _begin(out, {"phantom": True, "version": VERSION, "seed": seed, "patients": patients, "size": size, "test": test})
    wanted = [(0, number, None) for number in range(1, patients + 1)] + list(_test_patients(seed, test))
    tables: tuple[list[Row], ...] = ([], [])
    work = functools.partial(_write_patient, out, seed, size)
    for done, ((part, *_), rows) in enumerate(zip(wanted, _run(work, wanted, workers), strict=True), 1):
        tables[part].extend(rows)
        if progress:
            progress(done, len(wanted))
    for folder, table in zip(FOLDERS, tables, strict=True):  # last: a folder with its tables is complete
        write_csv(out / f"{folder}.csv", COLUMNS, table)
    return sum(map(len, tables))


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Makes the folder, or sees that it was made with the same numbers."""
    out.mkdir(parents=True, exist_ok=True)
    told = out / "phantom.json"
    if not told.is_file():
        if any(out.iterdir()):
            raise UserError(f"--out={str(out)!r}: not empty; allowed: a new folder")
        write_bytes(told, (json.dumps(about, indent=1) + "\n").encode())
    there = json.loads(told.read_text())
    if there != about:
        different = ", ".join(f"{key}={there.get(key)}" for key in about if there.get(key) != about[key])
        raise UserError(f"--out={str(out)!r}: holds phantoms with {different}; allowed: a new folder, or the same")


def _test_patients(seed: int, images: int) -> Iterator[tuple[int, int, int]]:
    """Part, number and images of as many test patients as it takes; the last one may give fewer than there are."""
    for number in range(FIRST_TEST, LAST + 1):
        there = sum(study.views for study in make_patient(seed, 1, number).studies)
        yield 1, number, min(there, images)
        images -= there
        if images <= 0:
            return


def _row(patient: Patient, study: Study, view: int) -> Row:
    labels = study.truth if patient.part else study.labels
    texts = ["" if math.isnan(labels[name]) else f"{labels[name]:.1f}" for name in OBSERVATIONS]
    path = f"phantom/{_place(patient, study, view)}.jpg"
    return [
        path,
        "Female" if patient.female else "Male",
        f"{patient.age}",
        "Frontal",
        "AP" if study.ap else "PA",
        *texts,
    ]


def _place(patient: Patient, study: Study, view: int) -> str:
    return f"{FOLDERS[patient.part]}/patient{patient.number:05d}/study{study.number}/view{view}_frontal"


def _run(work: Callable[[Any], list[Row]], wanted: list[Any], workers: int) -> Iterator[list[Row]]:
    if workers < 2:
        with threadpool_limits(1):
            yield from map(work, wanted)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Spawned: a fork would copy the locks of a parent in which JAX runs threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        yield from pool.map(work, wanted, chunksize=CHUNK)


def _start_worker() -> None:
    import multiprocessing
    import signal
    import threading

    threadpool_limits(1)  # matrices of this size gain nothing from threads, which wait for one another
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the work

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a parent that is killed tells nobody


def _write_patient(out: Path, seed: int, size: int, wanted: tuple[int, int, int | None]) -> list[Row]:
    """Draws the first images of a patient, or all; returns their rows. wanted: part, number, how many."""
    part, number, images = wanted
    patient = make_patient(seed, part, number)
    views = [(study, view) for study in patient.studies for view in range(1, study.views + 1)][:images]
    for study, view in views:
        place = _place(patient, study, view)
        path = out / f"{place}.jpg"
        if path.is_file():
            continue
        made = draw(patient, study, view, size)
        masks = out / "masks" / place
        if made.masks:
            masks.mkdir(parents=True, exist_ok=True)
        for name, mask in made.masks.items():
            (masks / f"{name}.png").write_bytes(_encode(mask.astype(np.uint8) * 255, "PNG", compress_level=1))
        write_bytes(path, _encode(made.image, "JPEG", quality=QUALITY))  # last: an image that is there has its masks
    return [_row(patient, study, view) for study, view in views]


def _encode(image: np.ndarray, kind: str, **options: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind, **options)
    return content.getvalue()
