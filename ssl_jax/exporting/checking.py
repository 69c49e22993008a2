"""An exported file is run, by what its users will run it with, and compared with the network that it was made of."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.errors import UserError, first_line

LIMIT = 1e-4  # largest relative difference of what is computed for images of the network's own size
RESIZED_LIMIT = 0.05  # and of others: a pixel may be rounded to the next integer, which is 0.4 % of the range
Outputs = dict[str, np.ndarray]

# A process of its own, which has nothing but JAX and the file.
PROGRAM = """
import pathlib, sys
import numpy as np
from jax import export
program = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
with np.load(sys.argv[2]) as images:
    found = {f"{n}/{k}": np.asarray(v) for n, x in images.items() for k, v in program.call(x).items()}
np.savez(sys.argv[3], **found)
"""


def run_onnx(path: Path, batches: Sequence[np.ndarray]) -> list[Outputs]:
    """What ONNX Runtime computes with the file on the CPU. Raises UserError if it cannot run it."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return [dict(zip(names, session.run(names, {"images": images}), strict=True)) for images in batches]
    except Exception as error:  # its own kinds of error, which have no common class
        raise UserError(f"--format=onnx: ONNX Runtime cannot run the file: {first_line(error)}") from error


def run_stablehlo(path: Path, batches: Sequence[np.ndarray]) -> list[Outputs]:
    """What a new process computes with the file. Raises UserError if it cannot run it."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "images.npz", Path(folder) / "outputs.npz"
        named: Any = {str(i): images for i, images in enumerate(batches)}
        np.savez(given, **named)
        command = [sys.executable, "-c", PROGRAM, str(path.absolute()), str(given), str(made)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            problem = (process.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise UserError(f"--format=stablehlo: a new process cannot run the file: {problem}")
        with np.load(made) as arrays:
            found = dict(arrays)
    return [
        {name.partition("/")[2]: array for name, array in found.items() if name.startswith(f"{i}/")}
        for i in range(len(batches))
    ]


def compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest difference of any value, relative to the largest value of its array.

    Raises UserError if an array is missing, has another shape, or is not finite.
    """
    largest = 0.0
    for name, wanted in expected.items():
        array = np.asarray(found.get(name, ()), np.float64)
        if array.shape != wanted.shape or not np.isfinite(array).all():
            raise UserError(f"{name}: {list(array.shape)}; expected {list(wanted.shape)}, all of them finite")
        scale = max(float(np.abs(wanted).max(initial=0)), 1e-12)
        largest = max(largest, float(np.abs(array - wanted).max(initial=0)) / scale)
    return largest


def check(differences: Mapping[str, float], kind: str) -> None:
    """Raises UserError if a difference is too large. differences: "same_size" and, if it was tried, "resized"."""
    for name, difference in differences.items():
        limit = LIMIT if name == "same_size" else RESIZED_LIMIT
        if not difference <= limit:
            images = "images of the network's size" if name == "same_size" else "images of other sizes"
            raise UserError(
                f"--format={kind}: not written: on {images} the file computes something else: the largest relative "
                f"difference is {difference:.1e}; allowed: {limit:g}"
            )
