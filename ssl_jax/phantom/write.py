"""Phantom data on disk, in the layout of CheXpert's own download, so that its reader takes them as they are."""

import functools
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from ssl_jax.errors import UserError
from ssl_jax.phantom.draw import draw
from ssl_jax.phantom.patients import OBSERVATIONS, Patient, Study, make_patient
from ssl_jax.run import write_bytes, write_csv

COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
FOLDERS = ("train", "valid")
# Test patients are numbered from here, so that a patient of either part stays the same however many are made.
FIRST_TEST, LAST = 90_001, 99_999
VERSION = 1  # of the drawings: raised whenever an image of the same seed changes
QUALITY = 90  # of the JPEGs
CHUNK = 32  # images a process is given at a time

Item = tuple[int, int, int, int]  # part, patient, study (from 0), view (from 1)


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
    workers: processes. progress(done, total images) is called from this process.
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
    train = _images(seed, 0, range(1, patients + 1))
    valid = itertools.islice(_images(seed, 1, range(FIRST_TEST, LAST + 1)), test)
    tables = [[(_item(*image), _row(*image)) for image in images] for images in (train, valid)]
    items = [item for table in tables for item, _ in table]
    chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    done = 0
    for count in _run(functools.partial(_write_chunk, out, seed, size), chunks, workers):
        done += count
        if progress:
            progress(done, len(items))
    for folder, table in zip(FOLDERS, tables, strict=True):  # last: a folder with its tables is complete
        write_csv(out / f"{folder}.csv", COLUMNS, (row for _, row in table))
    return len(items)


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


def _images(seed: int, part: int, numbers: Iterable[int]) -> Iterator[tuple[Patient, Study, int]]:
    for number in numbers:
        patient = make_patient(seed, part, number)
        for study in patient.studies:
            for view in range(1, study.views + 1):
                yield patient, study, view


def _item(patient: Patient, study: Study, view: int) -> Item:
    return patient.part, patient.number, study.number - 1, view


def _row(patient: Patient, study: Study, view: int) -> list[str]:
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


def _run(work: Callable[[list[Item]], int], chunks: list[list[Item]], workers: int) -> Iterator[int]:
    if workers < 2:
        with threadpool_limits(1):
            yield from map(work, chunks)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Spawned: a fork would copy the locks of a parent in which JAX runs threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        yield from pool.map(work, chunks)


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


_patient = functools.lru_cache(maxsize=1)(make_patient)  # for the images of one patient


def _write_chunk(out: Path, seed: int, size: int, chunk: list[Item]) -> int:
    for part, number, visit, view in chunk:
        patient = _patient(seed, part, number)
        study = patient.studies[visit]
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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _encode(made.image, "JPEG", quality=QUALITY))  # last: an image that is there has its masks
    return len(chunk)


def _encode(image: np.ndarray, kind: str, **options: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind, **options)
    return content.getvalue()
