"""What each finding adds to a chest. Every function returns the change of density, float32 [size, size], from which
the mask follows. `amount` grows with the margin: 0 is nothing, 0.5 at the threshold, about 1 plainly visible.
"""

from collections.abc import Callable

import numpy as np

from ssl_jax.phantom.anatomy import Chest, rib_phase, ribs
from ssl_jax.phantom.canvas import Curve, soft_step

Draw = Callable[[Chest, float, np.random.Generator], np.ndarray]


def edema(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Haze around the hila, fuller vessels, fine lines at the base."""
    p = chest.person
    around = (chest.side - 0.27) ** 2 / np.float32(0.07) + (
        chest.canvas.y - np.float32(p["hilum_y"] + 0.12)
    ) ** 2 / 0.13
    haze = np.exp(-around) * (1 + 0.25 * chest.canvas.cloud(rng, 24))
    ends = []
    for _ in range(14):
        x, y = chest.in_lung(int(rng.choice((-1, 1))), rng.uniform(0.75, 0.97), rng.uniform(0.65, 0.98))
        ends.append(((x, x - 0.09 * np.sign(x)), (y, y + rng.uniform(-0.02, 0.02))))
    across, down = np.array(ends).transpose(1, 0, 2)
    septa = chest.canvas.lines([(across, down, 1.0)], 0.006)
    return amount * (0.22 * haze * chest.lung + 0.7 * chest.vessels + 0.09 * septa)


def pleural_effusion(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Fluid that fills the angle between diaphragm and wall first, then rises with a meniscus; on one or both sides."""
    sides, balance = int(rng.integers(3)), rng.uniform(0.3, 1)
    right, left = (amount, amount * balance) if sides == 0 else (amount, 0.0) if sides == 1 else (0.0, amount)
    amounts = np.where(chest.left, np.float32(left), np.float32(right))
    near_wall = np.clip(1 - chest.wall / np.float32(0.5), 0, 1)
    # The angle is a little blunt in some healthy people, and sharp in some with fluid.
    height = amounts * (0.18 * amounts - 0.03 + 0.17 * near_wall**3) + np.float32(rng.uniform(-0.09, 0.04)) * near_wall
    fluid = soft_step(height - chest.dome, 0.05) * soft_step(chest.wall, 0.04) * (amounts > 0)
    return fluid * chest.lung * np.float32(0.75 * chest.person["lung"])


def consolidation(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A dense, even patch with a ragged outline, bounded by a straight fissure, with dark airways in it."""
    side = int(rng.choice((-1, 1)))
    x, y = chest.in_lung(side, rng.uniform(0.35, 0.7), rng.uniform(0.25, 0.85))
    radius = rng.uniform(0.13, 0.2) * (0.7 + 0.5 * amount)
    ragged = chest.canvas.blob(x, y, radius, radius * rng.uniform(0.7, 1.1)) + 0.35 * chest.canvas.cloud(rng, 14)
    fissure = (chest.canvas.y - y) * int(rng.choice((-1, 1))) + rng.uniform(-0.2, 0.2) * (chest.canvas.x - x)
    patch = soft_step(1 - ragged, 0.5) * soft_step(fissure + 0.35 * radius, 0.02)
    airways: list[Curve] = []
    for angle in rng.uniform(-0.7, 0.7, 3):
        reach = np.array([-0.8, 0.9]) * radius
        airways.append((x + side * np.cos(angle) * reach, y + np.sin(angle) * reach, 1.0))
    airy = 1 - 0.5 * np.minimum(chest.canvas.lines(airways, 0.008), 1)
    return (0.25 + 0.25 * amount) * patch * airy * chest.lung


def pneumonia(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Mottled, ill-defined patches in one region."""
    x, y = chest.in_lung(int(rng.choice((-1, 1))), rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.85))
    region = np.exp(-chest.canvas.blob(x, y, 0.24, 0.26))
    mottles = soft_step(chest.canvas.cloud(rng, 26) - 0.2, 0.9)
    return (0.3 + 0.3 * amount) * region * mottles * chest.lung


def haze(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A faint, even veil over a part of one lung."""
    x, y = chest.in_lung(int(rng.choice((-1, 1))), rng.uniform(0.4, 0.7), rng.uniform(0.2, 0.9))
    return (0.1 + 0.2 * amount) * np.exp(-(chest.canvas.blob(x, y, 0.26, 0.22) ** 2)) * chest.lung


def atelectasis(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """One to three bands near the base, roughly level. The raised diaphragm is drawn with the anatomy."""
    side, bands = atelectasis_side(rng), []
    for _ in range(int(rng.integers(1, 4))):
        x, y = chest.in_lung(side, rng.uniform(0.35, 0.6), rng.uniform(0.6, 0.92))
        along, tilt = np.linspace(-1, 1, 5) * rng.uniform(0.09, 0.2), rng.uniform(-0.5, 0.35) * side
        bands.append((x + along, y + tilt * along + rng.uniform(-0.3, 0.3) * along**2, 1.0))
    return (0.16 + 0.28 * amount) * np.minimum(chest.canvas.lines(bands, 0.016), 1.2) * chest.lung


def atelectasis_side(rng: np.random.Generator) -> int:
    """-1: right, 1: left."""
    return int(rng.choice((-1, 1)))


def lung_lesion(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """One to three round masses, as dense as spheres are."""
    image = np.zeros_like(chest.lung)
    for _ in range(int(rng.choice((1, 1, 1, 2, 3)))):
        x, y = chest.in_lung(int(rng.choice((-1, 1))), rng.uniform(0.3, 0.88), rng.uniform(0.22, 0.88))
        radius = rng.uniform(0.045, 0.085) * (0.8 + 0.4 * amount)
        disc = chest.canvas.blob(x, y, radius, radius * rng.uniform(0.85, 1.15))
        image += np.sqrt(np.clip(1.1 - disc, 0, 1)) * soft_step(1 - disc, 0.3)
    return (0.34 + 0.24 * amount) * image * (0.15 + 0.85 * chest.lung)


def pneumothorax(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Air between wall and lung: darker, without vessels, bounded by the thin edge of the lung, which is denser."""
    left = bool(rng.random() < 0.5)
    top = chest.person["top"]
    down = np.clip((chest.canvas.y - top) / np.float32(rng.uniform(0.7, 1.3)), 0, 1)
    gap = (0.08 + 0.24 * amount) * (1 - down**2)
    apex = chest.canvas.y - np.float32(top + 0.1 + 0.45 * amount * rng.uniform(0.4, 1))  # the lung sinks from the top
    beyond = np.minimum(chest.wall - 0.02 - gap, apex)  # negative in the air
    region = (chest.left == left) & (gap > 0.02)
    edge = soft_step(0.010 - np.abs(beyond), 0.016)
    air = soft_step(-beyond, 0.02)
    collapsed = soft_step(beyond, 0.02) * 0.06
    return region * chest.lung * (0.18 * edge + collapsed - air * (0.16 + 0.9 * chest.vessels))


def pleural_other(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A thickened, uneven pleura along one wall, or a cap on an apex."""
    left = bool(rng.random() < 0.5)
    place = np.float32(rng.uniform(-0.6, 0.3))
    thick = (0.05 + 0.06 * amount) * (1 + 0.5 * chest.canvas.cloud(rng, 12))
    band = soft_step(thick - chest.wall + 0.02, 0.03) * soft_step(0.3 - np.abs(chest.canvas.y - place), 0.1)
    return (
        (0.2 + 0.2 * amount) * band * soft_step(chest.wall, 0.03) * soft_step(chest.dome, 0.03) * (chest.left == left)
    )


def fracture(chest: Chest, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Three to five neighbouring ribs broken: a gap, the outer part displaced, and a bruise at the wall."""
    p, side = chest.person, int(rng.choice((-1, 1)))
    x, y = chest.in_lung(side, rng.uniform(0.6, 0.92), rng.uniform(0.2, 0.85))
    r = np.minimum(np.abs(chest.canvas.x) / np.float32(p["width"]), 1.3)
    rib = np.floor(rib_phase(chest, r))
    row, column = np.unravel_index(np.argmin(chest.canvas.blob(x, y, 1, 1)), rib.shape)
    broken = np.abs(rib - rib[row, column]) <= int(rng.integers(1, 3))
    outward = chest.canvas.x * side - np.float32(abs(x))
    near = broken & (outward > -0.08) & (outward < 0.28) & (np.abs(chest.canvas.y - y) < 0.4)
    step = np.float32((0.4 + 0.3 * amount) * p["rib_gap"] * rng.choice((-1, 1)))
    moved = ribs(chest, step * np.exp(-np.clip(outward, 0, 1) / 0.15) * (outward > 0) * near)
    gap = 1 - soft_step(0.018 - np.abs(outward), 0.012) * near
    lens = (0.13 + 0.08 * amount) * np.exp(-(((chest.canvas.y - y) / np.float32(0.14)) ** 2))
    bruise = soft_step(lens - 0.02 - chest.wall, 0.03)
    region = soft_step(chest.wall, 0.03) * (chest.left == (side > 0))
    return moved * gap - ribs(chest) + (0.3 + 0.25 * amount) * bruise * region


DRAW: dict[str, Draw] = {
    "Edema": edema,
    "Pleural Effusion": pleural_effusion,
    "Consolidation": consolidation,
    "Pneumonia": pneumonia,
    "haze": haze,
    "Atelectasis": atelectasis,
    "Lung Lesion": lung_lesion,
    "Pneumothorax": pneumothorax,
    "Pleural Other": pleural_other,
    "Fracture": fracture,
}
# Findings that are drawn faintly below the threshold, too: how fast the amount grows with the margin.
GRADED = {"Edema": 0.6, "Pleural Effusion": 0.4, "haze": 0.6}


def amount_of(name: str, margin: float) -> float:
    """How strongly a finding is drawn; 0: not at all."""
    if name in GRADED:
        return float(np.clip(0.5 + GRADED[name] * margin, 0, 1.6))
    return float(np.clip(0.5 + 0.5 * margin, 0.5, 1.3)) if margin > 0 else 0.0
