"""A chest without findings: what varies between people, and how X-rays show it.

Densities are what a structure adds to the logarithm of the attenuation; a lung takes away about 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssl_jax.phantom.canvas import Canvas, Curve, soft_step

# What varies between patients, uniform. Lengths in body units (the chest spans about -1 to 1), densities as above.
PERSON: dict[str, tuple[float, float]] = {
    "width": (0.68, 0.88),  # of the rib cage at its base, half
    "top": (-0.88, -0.70),  # of the lungs
    "base": (0.36, 0.58),  # dome of the right diaphragm
    "shape": (1.8, 2.8),  # how square the shoulders of the rib cage are
    "dome": (0.10, 0.24),  # height of a dome
    "left_lower": (0.0, 0.09),  # the left dome below the right one
    "mediastinum": (0.085, 0.13),  # half-width
    "knob": (0.05, 0.10),  # radius of the aortic knob
    "heart_x": (-0.03, 0.04),
    "heart_tilt": (0.3, 1.2),
    "heart_tall": (0.28, 0.38),
    "lung": (0.85, 1.1),  # what a lung takes away
    "bulk": (0.5, 1.1),  # how much thicker the body is towards its middle
    "fat": (0.0, 0.25),
    "rib_gap": (0.125, 0.165),
    "rib_start": (0.0, 1.0),  # of a gap
    "rib_dip": (-0.16, -0.02),
    "rib_fall": (0.25, 0.55),
    "rib_width": (0.34, 0.5),  # of the gap
    "rib": (0.10, 0.24),
    "front_rib": (0.02, 0.10),
    "front_fall": (0.25, 0.5),
    "spine": (0.06, 0.22),
    "spine_width": (0.06, 0.085),
    "bend": (-0.06, 0.06),  # of the spine
    "collar": (0.06, 0.16),  # clavicles
    "collar_y": (-0.72, -0.58),
    "collar_tilt": (-0.16, 0.10),
    "vessels": (0.08, 0.28),
    "hilum_y": (-0.12, 0.04),
    "breast": (0.06, 0.2),
    "breast_x": (0.4, 0.52),
    "breast_y": (0.28, 0.5),
    "bubble": (0.0, 0.35),  # air in the stomach
    "tissue": (0.02, 0.07),  # unevenness
    "grain": (0.01, 0.035),  # fine structure of the lung
}
# What varies between images of a patient.
POSE: dict[str, tuple[float, float]] = {
    "turn": (-6.0, 6.0),  # degrees
    "scale": (0.88, 1.15),
    "stretch": (0.92, 1.12),
    "shift_x": (-0.09, 0.09),
    "shift_y": (-0.05, 0.13),
    "breath": (-0.10, 0.05),  # the diaphragm lower, with a deep breath, or higher
    "rotation": (-0.07, 0.07),  # of the spine against the front: the patient turned
}


@dataclass
class Chest:
    """A chest on its canvas. Arrays are float32 [size, size]."""

    canvas: Canvas
    person: dict[str, float]
    middle: np.ndarray  # x of the midline
    side: np.ndarray  # distance from the midline
    wall: np.ndarray  # distance inside the wall of the rib cage, negative outside
    dome: np.ndarray  # distance above the diaphragm, negative below
    lung: np.ndarray  # 0 to 1
    heart: np.ndarray  # 0 to 1
    vessels: np.ndarray  # density of the lungs' vessels

    @property
    def left(self) -> np.ndarray:
        """Where the patient's left is."""
        return self.canvas.x > self.middle

    def half_width(self, y: np.ndarray) -> np.ndarray:
        return rib_cage(y, self.person)

    def in_lung(self, side: int, across: float, down: float) -> tuple[float, float]:
        """The point at these fractions of a lung's width (from the middle) and height; side -1: right, 1: left."""
        p = self.person
        y = p["top"] + (p["base"] - p["top"]) * down
        near = p["mediastinum"] + 0.02
        return side * (near + (float(rib_cage(np.float32(y), p)) - near) * across), y


def draw_range(rng: np.random.Generator, ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {name: float(rng.uniform(*between)) for name, between in ranges.items()}


def rib_cage(y: Any, p: dict[str, float]) -> np.ndarray:
    """Half-width of the rib cage at a height."""
    rise = np.clip((y - p["top"]) / np.float32(p["base"] + 0.1 - p["top"]), 0, 1)
    return np.float32(p["width"]) * (1 - (1 - rise) ** np.float32(p["shape"])) ** np.float32(0.6)


def make_chest(
    canvas: Canvas,
    p: dict[str, float],
    *,
    rotation: float,
    heart: float,
    mediastinum: float,
    lifted: tuple[float, float],
    rng: np.random.Generator,
) -> Chest:
    """heart, mediastinum: half-width beyond the usual; lifted: how far the right and the left dome are raised."""
    x, y = canvas.x, canvas.y
    middle = np.float32(p["bend"]) * np.sin(3 * y) + np.float32(rotation) * (y + 0.3)
    offset = x - middle
    side, left = np.abs(offset), offset > 0
    wall = rib_cage(y, p) - np.abs(x)
    bow = (side - np.float32(0.45 * p["width"])) / np.float32(0.6 * p["width"])
    level = np.where(left, np.float32(p["base"] + p["left_lower"] - lifted[1]), np.float32(p["base"] - lifted[0]))
    dome = level + np.float32(p["dome"]) * bow**2 * 1.2 - y
    # Ventricle: a tilted ellipse to the left; atrium: a smaller one, whose edge is the right border of the heart.
    a, b = x - np.float32(0.13 + p["heart_x"] + 0.5 * heart + rotation), y - np.float32(p["base"] - 0.16)
    across, down = a - np.float32(p["heart_tilt"]) * 0.4 * b, b + np.float32(p["heart_tilt"]) * 0.25 * a
    ventricle = (across / np.float32(0.25 + heart)) ** 2 + (down / np.float32(p["heart_tall"])) ** 2
    atrium = canvas.blob(
        p["heart_x"] - 0.04 - 0.3 * heart + rotation, p["base"] - 0.2, 0.15 + 0.4 * heart, p["heart_tall"] * 0.9
    )
    heart_map = soft_step(1 - np.sqrt(np.minimum(ventricle, atrium)), 0.2)
    narrow = np.float32(p["mediastinum"] + mediastinum) * (1 + 0.35 * np.clip(y + 0.1, -0.5, 0.6) ** 2)
    knob = np.sqrt(canvas.blob(0.08 + 0.5 * mediastinum, p["hilum_y"] - 0.27, p["knob"] + 0.03, p["knob"] + 0.04))
    lung = soft_step(wall - 0.02, 0.04) * soft_step(dome, 0.03) * soft_step(side - narrow, 0.03)
    lung *= (1 - heart_map) * soft_step(knob - 1, 0.3)
    chest = Chest(canvas, p, middle, side, wall, dome, lung, heart_map, lung)
    chest.vessels = canvas.lines(vessel_tree(chest, rng), 0.011) * lung * np.float32(p["vessels"])
    return chest


def vessel_tree(chest: Chest, rng: np.random.Generator) -> list[Curve]:
    """Branches that run outwards from each hilum and become thinner."""
    curves: list[Curve] = []
    p, along = chest.person, np.linspace(0, 1, 7)
    for side in (-1, 1):
        angle = np.linspace(-1.3, 1.35, 10) + rng.uniform(-0.15, 0.15, 10)
        start_x = side * (p["mediastinum"] + rng.uniform(0.03, 0.08, (10, 1)))
        start_y = p["hilum_y"] + 0.09 * np.sin(angle)[:, None]
        length, bend = rng.uniform(0.3, 0.6, (10, 1)), rng.uniform(-0.5, 0.5, (10, 1))
        for turn, begin, dense in ((0.0, 0, 1.0), (0.5, 2, 0.6), (-0.55, 3, 0.5)):
            heading = angle[:, None] + bend * along[begin:] + turn * (along[begin:] - along[begin])
            x = start_x + side * np.cos(heading) * along[begin:] * length
            y = start_y + np.sin(heading) * along[begin:] * length * 1.25
            curves += [(x[:, :4], y[:, :4], dense), (x[:, 3:], y[:, 3:], dense * 0.55)]
    return curves


def ribs(chest: Chest, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Density of the posterior ribs. shift: moves a pixel's rib up or down, in body units (a broken rib)."""
    p = chest.person
    r = np.minimum(np.abs(chest.canvas.x) / np.float32(p["width"]), 1.3)
    phase = rib_phase(chest, r) + np.asarray(shift, np.float32) / np.float32(p["rib_gap"])
    across = (phase - np.floor(phase) - np.float32(0.5)) * np.float32(2 / p["rib_width"])
    profile = soft_step(1 - np.abs(across), 0.35) * (np.float32(0.65) + np.float32(0.35) * across * across)
    return profile * soft_step(chest.wall + 0.04, 0.06) * soft_step(chest.side - 0.1, 0.1) * np.float32(p["rib"])


def rib_phase(chest: Chest, r: np.ndarray) -> np.ndarray:
    """Number of the rib at a pixel; whole numbers lie between ribs. r: distance from the midline, 1 at the base."""
    p = chest.person
    return (chest.canvas.y - (np.float32(p["rib_dip"]) + np.float32(p["rib_fall"]) * r) * r) / np.float32(
        p["rib_gap"]
    ) + np.float32(p["rib_start"] + 8)


def front_ribs(chest: Chest) -> np.ndarray:
    p = chest.person
    r = np.abs(chest.canvas.x) / np.float32(p["width"])
    phase = (chest.canvas.y + np.float32(p["front_fall"]) * r) / np.float32(p["rib_gap"] * 1.15) + np.float32(
        p["rib_start"] * 3
    )
    across = np.abs(phase - np.floor(phase) - np.float32(0.5)) * np.float32(2 / (p["rib_width"] + 0.12))
    fade = soft_step(r - 0.45, 0.35) * soft_step(chest.wall, 0.05) * soft_step(0.35 - chest.canvas.y, 0.5)
    return soft_step(1 - across, 0.4) * fade * np.float32(p["front_rib"])


def bones_and_body(chest: Chest, female: bool, rng: np.random.Generator) -> np.ndarray:
    """Everything but lungs and findings."""
    p, x, y = chest.person, chest.canvas.x, chest.canvas.y
    shoulders = np.float32(p["top"] - 0.14) + 0.35 * np.clip(np.abs(x) - 0.25, 0, 1) ** 1.5
    flank = np.float32(p["width"] + 0.12 + p["fat"]) + 0.35 * np.clip(-y - 0.2, 0, 1)
    body = soft_step(y - shoulders, 0.06) * soft_step(flank - np.abs(x), 0.05)
    neck = soft_step(0.22 - np.abs(x), 0.05) * soft_step(shoulders + 0.3 - y, 0.2) * 0.8
    thick = 1.2 + np.float32(p["bulk"]) * np.sqrt(np.clip(1.05 - (x / flank) ** 2, 0, 1)) * 0.6
    image = np.maximum(body, neck) * thick
    image += (0.15 + 0.25 * soft_step(-chest.dome, 0.3)) * soft_step(chest.wall, 0.1) * soft_step(-chest.dome, 0.05)
    spine = soft_step(np.float32(p["spine_width"]) - chest.side, 0.04)
    discs = np.float32(0.85) + np.float32(0.15) * np.sin(y * np.float32(2 * np.pi / (p["rib_gap"] * 0.95)))
    image += spine * discs * np.float32(p["spine"])
    centre = np.maximum(0.3 * chest.heart, 0.2 * soft_step(np.float32(p["mediastinum"]) - chest.side, 0.06))
    image += centre * (0.35 + 0.65 * soft_step(chest.dome + 0.1, 0.3))
    trachea = soft_step(0.035 - np.abs(chest.side), 0.025) * soft_step(p["hilum_y"] - 0.12 - y, 0.1)
    image -= 0.22 * trachea
    image += ribs(chest) + front_ribs(chest)
    line = np.float32(p["collar_y"]) + np.float32(p["collar_tilt"]) * chest.side - 0.12 * chest.side**2
    image += (
        np.float32(p["collar"])
        * soft_step(0.032 - np.abs(y - line), 0.03)
        * soft_step(0.85 - chest.side, 0.05)
        * soft_step(chest.side - 0.08, 0.03)
    )
    if female:
        for side in (-1, 1):
            disc = chest.canvas.blob(side * p["breast_x"], p["breast_y"], 0.33, 0.27)
            image += np.float32(p["breast"]) * soft_step(1 - disc, 0.25) * (0.4 + 0.6 * soft_step(y - 0.1, 0.6))
    bubble = chest.canvas.blob(0.36, p["base"] + p["left_lower"] + 0.13, 0.16, 0.07)
    image -= np.float32(p["bubble"]) * soft_step(1 - bubble, 0.4) * soft_step(-chest.dome, 0.04)
    image += np.float32(p["tissue"]) * (chest.canvas.cloud(rng, 7) + 0.6 * chest.canvas.cloud(rng, 17))
    return image
