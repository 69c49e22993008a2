"""Support devices (tubes, catheters, pacemakers), and things on the skin that only look like findings."""

import numpy as np

from ssl_jax.phantom.anatomy import Chest
from ssl_jax.phantom.canvas import soft_step

KINDS = {"tube": 0.35, "catheter": 0.5, "stomach": 0.35, "pacemaker": 0.22, "drain": 0.12}  # chance given any device
NEEDED_BY = {"drain": "Pneumothorax"}  # a chest drain is more likely with air in the chest


def support_devices(chest: Chest, margin: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """The density of an exam's devices, float32 [size, size]; at least one."""
    chances = {kind: chance + 0.4 * (margin.get(NEEDED_BY.get(kind, ""), -1) > 0) for kind, chance in KINDS.items()}
    drawn = [kind for kind, chance in chances.items() if rng.random() < chance]
    curves, image = [], np.zeros_like(chest.lung)
    for kind in drawn or [str(rng.choice(list(KINDS)))]:
        side, p = int(rng.choice((-1, 1))), chest.person
        wobble = rng.uniform(-0.02, 0.02, 3)
        if kind == "tube":  # in the windpipe
            curves.append(([wobble[0], wobble[1], wobble[2]], [-1.15, -0.7, p["hilum_y"] - rng.uniform(0.2, 0.4)], 0.8))
        elif kind == "catheter":  # from the neck or below the collarbone to the vein above the heart
            start = (0.25, -1.1) if rng.random() < 0.5 else (0.6, -0.62)
            bend = (side * 0.17 + wobble[0], -0.62 + wobble[1])
            curves.append(([side * start[0], bend[0], -0.1, -0.11 + wobble[2]], [start[1], bend[1], -0.4, 0.05], 0.55))
        elif kind == "stomach":
            curves.append(
                (
                    [wobble[0], wobble[1], 0.03, 0.2 + wobble[2], 0.34],
                    [-1.15, -0.3, 0.25, p["base"] + 0.12, p["base"] + 0.2],
                    0.5,
                )
            )
        elif kind == "pacemaker":
            x, y = side * rng.uniform(0.45, 0.6), rng.uniform(-0.55, -0.4)
            image += 0.9 * soft_step(1 - chest.canvas.blob(x, y, 0.11, 0.09) ** 2, 0.2)
            curves.append(
                ([x, side * 0.2, -0.1, -0.05, 0.15 + wobble[0]], [y, -0.58, -0.3, 0.1, p["base"] - 0.05], 0.6)
            )
        else:  # a drain from the flank upwards
            x, y = chest.in_lung(side, 1.15, 0.8)
            curves.append(([x, x - side * 0.2, x - side * 0.22], [y, y - 0.25 + wobble[0], y - 0.65], 0.7))
    smooth = [(*_curve(x, y), dense) for x, y, dense in curves]
    return image + (0.7 * chest.canvas.lines(smooth, 0.010) if smooth else 0)


def skin(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Folds, nipples and buttons, which look like findings but are independent of every label."""
    image = np.zeros_like(chest.lung)
    if rng.random() < 0.25:  # a fold, much like the edge of a collapsed lung
        side, x = int(rng.choice((-1, 1))), rng.uniform(0.4, 0.75)
        down = np.linspace(rng.uniform(-0.6, -0.2), rng.uniform(0.1, 0.5), 6)
        fold = side * (x + rng.uniform(-0.12, 0.12) * down + rng.uniform(-0.1, 0.1) * down**2)
        image += rng.uniform(0.08, 0.2) * chest.canvas.lines([(fold, down, 1.0)], 0.01)
    if rng.random() < 0.35:
        x, y, dense = rng.uniform(0.42, 0.55), rng.uniform(0.15, 0.35), rng.uniform(0.08, 0.25)
        for side in (-1, 1):
            image += dense * soft_step(1 - chest.canvas.blob(side * x, y + rng.uniform(-0.02, 0.02), 0.03, 0.03), 0.5)
    for _ in range(int(rng.choice((0, 0, 0, 1, 3)))):
        at = chest.canvas.blob(rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.6), 0.028, 0.028)
        image += rng.uniform(0.3, 0.8) * soft_step(1 - at, 0.3) * soft_step(at - float(rng.choice((-1, 0.25))), 0.2)
    return image


def _curve(x: list[float], y: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """A smooth curve near the corners: the quadratic B-spline of a polygon, with its ends."""
    points = np.stack([x, y], axis=1)
    for _ in range(2):  # Chaikin's corner cutting
        inner = np.stack([0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]], 1)
        points = np.concatenate([points[:1], inner.reshape(-1, 2)[1:-1], points[-1:]])
    return points[:, 0], points[:, 1]
