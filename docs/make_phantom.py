"""Draws docs/phantom.jpg: a finding in each column, below it the same image with the finding's mask outlined.

python docs/make_phantom.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ssl_jax.phantom import Patient, draw, make_patient

OUT = Path(__file__).with_name("phantom.jpg")
SHOWN = (
    "Lung Lesion",
    "Fracture",
    "Pneumothorax",
    "Atelectasis",
    "Pneumonia",
    "Edema",
    "Pleural Effusion",
    "Cardiomegaly",
)


def first_with(name: str) -> Patient:
    """The first patient in whose first exam the finding is plain and few others are."""
    for number in range(1, 10_000):
        patient = make_patient(0, 0, number)
        exam = patient.exams[0]
        if exam.margin[name] > 0.4 and sum(exam.truth.values()) <= 3:
            return patient
    raise LookupError(name)


def main() -> None:
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(16, 4.6), squeeze=False)
    for name, (above, below) in zip(SHOWN, axes.T, strict=True):
        patient = first_with(name)
        phantom = draw(patient, patient.exams[0], 1, 128)
        for ax in (above, below):
            ax.imshow(phantom.image, cmap="gray", vmin=0, vmax=255)
            ax.axis("off")
        above.set_title(name, fontsize=10)
        below.contour(phantom.masks[name], [0.5], colors="red", linewidths=0.8)
    figure.suptitle("Phantom radiographs, drawn, 128 px; below, the masks", fontsize=11)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 0.98))
    figure.savefig(OUT, dpi=80, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main()
