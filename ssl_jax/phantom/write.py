"""Writes phantom data in the layout of CheXpert's own download, so that the same reader reads both."""

import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from ssl_jax.errors import UserError
from ssl_jax.files import read_json, write_bytes, write_csv, write_json
from ssl_jax.phantom.draw import draw
from ssl_jax.phantom.patients import OBSERVATIONS, Exam, Patient, make_patient

COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
FOLDERS = ("train", "valid")
# Test patients are numbered from here, so that the number of patients in one part does not change the other.
FIRST_TEST, LAST = 90_001, 99_999
VERSION = 1  # of the drawings: raised whenever an image of the same seed changes
QUALITY = 90  # of the JPEGs
CHUNK = 16  # patients that a process gets at a time

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

    patients: training patients, with about two images each. test: images of other patients, with clean labels, in
    valid.csv. workers: processes. progress(done, total patients) is called from this process.

    Repeating the call completes an unfinished folder. UserError for numbers out of range, or if `out` holds anything
    else.
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
    jobs = [(0, number, None) for number in range(1, patients + 1)] + list(_test_patients(seed, test))
    tables: tuple[list[Row], ...] = ([], [])
    work = functools.partial(_write_patient, out, seed, size)
    for done, ((part, *_), rows) in enumerate(zip(jobs, _run(work, jobs, workers), strict=True), 1):
        tables[part].extend(rows)
        if progress:
            progress(done, len(jobs))
    for folder, table in zip(FOLDERS, tables, strict=True):  # last: a folder that has its tables is complete
        write_csv(out / f"{folder}.csv", COLUMNS, table)
    return sum(map(len, tables))


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Creates the folder, or checks that an existing one has the same numbers."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "phantom.json"
    if not file.is_file():
        if any(out.iterdir()):
            raise UserError(f"--out={str(out)!r}: not empty; allowed: a new folder")
        write_json(file, about)
    saved = read_json(file)
    if saved != about:
        different = ", ".join(f"{key}={saved.get(key)}" for key in about if saved.get(key) != about[key])
        raise UserError(
            f"--out={str(out)!r}: holds phantoms with {different}; allowed: the same numbers or a new folder"
        )


def _test_patients(seed: int, images: int) -> Iterator[tuple[int, int, int]]:
    """Part, number and image count of as many test patients as needed; the last one may use only some images."""
    for number in range(FIRST_TEST, LAST + 1):
        available = sum(exam.views for exam in make_patient(seed, 1, number).exams)
        yield 1, number, min(available, images)
        images -= available
        if images <= 0:
            return


def _row(patient: Patient, exam: Exam, view: int) -> Row:
    labels = exam.truth if patient.part else exam.labels
    texts = ["" if math.isnan(labels[name]) else f"{labels[name]:.1f}" for name in OBSERVATIONS]
    path = f"phantom/{_place(patient, exam, view)}.jpg"
    return [
        path,
        "Female" if patient.female else "Male",
        f"{patient.age}",
        "Frontal",
        "AP" if exam.ap else "PA",
        *texts,
    ]


def _place(patient: Patient, exam: Exam, view: int) -> str:
    return f"{FOLDERS[patient.part]}/patient{patient.number:05d}/study{exam.number}/view{view}_frontal"


def _run(work: Callable[[Any], list[Row]], jobs: list[Any], workers: int) -> Iterator[list[Row]]:
    if workers < 2:
        with threadpool_limits(1):
            yield from map(work, jobs)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Spawned: a fork would copy the locks of a parent in which JAX runs threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        yield from pool.map(work, jobs, chunksize=CHUNK)


def _start_worker() -> None:
    import multiprocessing
    import signal
    import threading

    threadpool_limits(1)  # matrices of this size gain nothing from threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends the work

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a killed parent cannot tell us


def _write_patient(out: Path, seed: int, size: int, job: tuple[int, int, int | None]) -> list[Row]:
    """Draws the first images of a patient and returns their rows. job: part, number, image count (None: all)."""
    part, number, images = job
    patient = make_patient(seed, part, number)
    views = [(exam, view) for exam in patient.exams for view in range(1, exam.views + 1)][:images]
    for exam, view in views:
        place = _place(patient, exam, view)
        path = out / f"{place}.jpg"
        if path.is_file():
            continue
        phantom = draw(patient, exam, view, size)
        masks = out / "masks" / place
        if phantom.masks:
            masks.mkdir(parents=True, exist_ok=True)
        for name, mask in phantom.masks.items():
            (masks / f"{name}.png").write_bytes(_encode(mask.astype(np.uint8) * 255, "PNG", compress_level=1))
        # Last: an existing image has its masks. Thousands of them are not worth waiting for the disk each time.
        write_bytes(path, _encode(phantom.image, "JPEG", quality=QUALITY), durable=False)
    return [_row(patient, exam, view) for exam, view in views]


def _encode(image: np.ndarray, kind: str, **options: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind, **options)
    return content.getvalue()
