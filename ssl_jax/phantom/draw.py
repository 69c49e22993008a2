"""An image of a patient: the chest, its findings, and the exposure."""

from dataclasses import dataclass

import numpy as np

from ssl_jax.phantom import anatomy, findings
from ssl_jax.phantom.canvas import Canvas
from ssl_jax.phantom.devices import skin, support_devices
from ssl_jax.phantom.patients import OPACITIES, Exam, Patient

PERSON, PLACES, POSE, NOISE, DEVICES = range(5)  # what a patient's random numbers are for


@dataclass(frozen=True)
class Phantom:
    """image: uint8 [size, size]; masks: observation -> bool [size, size], for what is present and visible."""

    image: np.ndarray
    masks: dict[str, np.ndarray]


def draw(patient: Patient, exam: Exam, view: int, size: int) -> Phantom:
    """Image `view` (from 1) of an exam; it depends on nothing else."""
    person = anatomy.draw_range(patient.rng(PERSON), anatomy.PERSON)
    rng = patient.rng(POSE, exam.number, view)
    pose = anatomy.draw_range(rng, anatomy.POSE)
    person["base"] -= pose["breath"] + 0.05 * exam.ap
    canvas = Canvas(
        size,
        turn=pose["turn"],
        scale=pose["scale"],
        stretch=pose["stretch"],
        shift=(pose["shift_x"], pose["shift_y"]),
    )
    margin, limited = exam.margin, {name: min(max(value, -2.5), 1.5) for name, value in exam.margin.items()}
    amounts = {name: findings.amount_of(name, margin[name]) for name in findings.DRAW}
    # A finding stays in the same place in all exams of a patient.
    places = {name: patient.rng(PLACES, i) for i, name in enumerate(findings.DRAW) if amounts[name]}
    side = findings.atelectasis_side(patient.rng(PLACES, list(findings.DRAW).index("Atelectasis")))
    lift = 0.07 * amounts["Atelectasis"]
    chest = anatomy.make_chest(
        canvas,
        person,
        rotation=pose["rotation"],
        # The heart is measured against the chest; its shadow is also larger when the patient lies down.
        heart=0.33 * (person["width"] - 0.78) + 0.04 * limited["Cardiomegaly"] + 0.045 + 0.02 * exam.ap,
        mediastinum=0.02 * limited["Enlarged Cardiomediastinum"] + 0.03,
        lifted=(lift * (side < 0), lift * (side > 0)),
        rng=patient.rng(PERSON, 1),
    )
    density = anatomy.bones_and_body(chest, patient.female, patient.rng(PERSON, 2))
    density -= person["lung"] * chest.lung - chest.vessels
    density += person["grain"] * canvas.cloud(patient.rng(PERSON, 3), size // 3) * chest.lung + skin(chest, rng)
    changes = {name: findings.DRAW[name](chest, amounts[name], place) for name, place in places.items()}
    if margin["Support Devices"] > 0:
        changes["Support Devices"] = support_devices(chest, margin, patient.rng(DEVICES, exam.number))
    density += sum(changes.values())
    return Phantom(expose(canvas, density, rng), make_masks(chest, exam, changes))


def make_masks(chest: anatomy.Chest, exam: Exam, changes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where each present observation changes the image. An observation that cannot be seen has no mask."""
    shapes = {name: abs(change) for name, change in changes.items() if exam.margin[name] > 0}
    masks = {name: shape > max(0.3 * shape.max(), 0.02) for name, shape in shapes.items()}
    if exam.truth["Cardiomegaly"]:
        masks["Cardiomegaly"] = chest.heart > 0.5
    if exam.truth["Enlarged Cardiomediastinum"]:
        width = chest.person["mediastinum"] + 0.06
        masks["Enlarged Cardiomediastinum"] = (chest.side < width) & (chest.wall > 0) & (chest.dome > 0)
    opaque = [masks.pop(name) if name == "haze" else masks[name] for name in OPACITIES if name in masks]
    if opaque:
        masks["Lung Opacity"] = np.logical_or.reduce(opaque)
    return {name: mask for name, mask in masks.items() if mask.any()}


def expose(canvas: Canvas, density: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Density as gray levels. Exposure is automatic, so brightness and contrast say nothing about the findings."""
    rim = canvas.size // 8
    middle = density[rim:-rim, rim:-rim]
    blurred = canvas.blur(density, rng.uniform(0.3, 0.9) * canvas.size / 128)
    level = (blurred - middle.mean()) / middle.std() * np.float32(rng.uniform(0.8, 1.25))
    bright, bend = rng.uniform(-0.35, 0.35), rng.uniform(0.25, 0.5)
    level += bright
    tone = np.tanh(bend * level) / np.tanh(2 * bend) * 0.5 + 0.5
    tone += np.float32(rng.uniform(0.008, 0.04)) * rng.standard_normal(density.shape, np.float32)
    return np.rint(tone * 255).clip(0, 255).astype(np.uint8)
