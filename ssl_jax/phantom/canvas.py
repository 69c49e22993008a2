"""Body coordinates for every pixel, and the few shapes that anatomy and findings are drawn with.

Body coordinates: x to the patient's left (right in the image), y down; the chest spans about -1 to 1.
"""

import functools
from collections.abc import Sequence

import numpy as np

# x [..., n], y [..., n]: one or more curves through n points in body coordinates; and the density of the line.
Curve = tuple[np.ndarray, np.ndarray, float]


class Canvas:
    """An image of size x size pixels, seen under a pose. x, y: float32 [size, size], body coordinates of the pixels."""

    def __init__(self, size: int, *, turn: float, scale: float, stretch: float, shift: tuple[float, float]):
        """turn: degrees; scale: image half-widths per unit; stretch: of the height against the width; shift: of the
        body's middle, in image half-widths."""
        self.size = size
        angle = np.deg2rad(turn)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.forward = rotation * scale * np.array([1.0, stretch])  # body -> image, half-widths
        self.shift = np.array(shift)
        self.pixel = size / 2 * scale * stretch**0.5  # pixels in a body unit
        centres = (np.arange(size) + 0.5) / size * 2 - 1
        u, v = centres[None, :] - shift[0], centres[:, None] - shift[1]
        back = np.linalg.inv(self.forward)
        self.x = (back[0, 0] * u + back[0, 1] * v).astype(np.float32)
        self.y = (back[1, 0] * u + back[1, 1] * v).astype(np.float32)

    def lines(self, curves: Sequence[Curve], width: float) -> np.ndarray:
        """Soft lines of standard deviation `width` (body units). A line of density 1 has the value 1 in its middle."""
        corners = [np.stack([x, y]) for x, y, _ in curves]
        begin = self._pixels(np.concatenate([c[..., :-1].reshape(2, -1) for c in corners], axis=1))
        end = self._pixels(np.concatenate([c[..., 1:].reshape(2, -1) for c in corners], axis=1))
        density = np.repeat([c[2] for c in curves], [c[0, ..., 1:].size for c in corners])
        length = np.hypot(*(end - begin))
        dots = max(2, int(1.5 * length.max()))  # per segment
        place = (np.arange(dots) + 0.5) / dots
        where = begin[:, :, None] + (end - begin)[:, :, None] * place
        weight = np.repeat(density * length / dots, dots)
        sigma = _rounded(max(width * self.pixel, 0.45))
        peak = np.sqrt(2 * np.pi) * sigma  # a blurred line of one unit per pixel has its maximum at 1 / peak
        return self.blur(self._splat(where.reshape(2, -1), weight), sigma) * np.float32(peak)

    def _pixels(self, points: np.ndarray) -> np.ndarray:
        """Body coordinates [2, n] in pixels."""
        return (self.forward @ points + self.shift[:, None] + 1) * (self.size / 2) - 0.5

    def _splat(self, dots: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Shares each dot among the four pixels around it; dots outside the image are dropped."""
        rim = self.size + 2  # pixels -1 to size
        dots = np.clip(dots, -1, self.size - 1e-6) + 1
        corner = dots.astype(np.int32)
        right, below = dots - corner
        place = corner[1] * rim + corner[0]
        lower = below * weight
        upper = weight - lower
        places = np.concatenate([place, place + 1, place + rim, place + rim + 1])
        upper_right, lower_right = right * upper, right * lower
        shares = np.concatenate([upper - upper_right, upper_right, lower - lower_right, lower_right])
        image = np.bincount(places, shares, minlength=rim * rim)
        return image.reshape(rim, rim)[1:-1, 1:-1].astype(np.float32)

    def blur(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian blur, sigma in pixels; edges repeat."""
        kernel = _blur_matrix(self.size, _rounded(sigma))
        return kernel @ image @ kernel.T

    def cloud(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """Smooth noise of mean 0 and deviation about 1 with `cells` cells across the image."""
        rise = _rise_matrix(self.size, cells)
        return rise @ rng.standard_normal((cells, cells), np.float32) @ rise.T

    def blob(self, x: float, y: float, across: float, down: float) -> np.ndarray:
        """Squared distance from (x, y) in units of the half-axes."""
        return ((self.x - x) / np.float32(across)) ** 2 + ((self.y - y) / np.float32(down)) ** 2


def soft_step(distance: np.ndarray, softness: float) -> np.ndarray:
    """0 outside, 1 inside, with an edge of width `softness` around distance 0."""
    step = distance * np.float32(1 / softness)
    step += np.float32(0.5)
    return step.clip(0, 1, out=step)


def _rounded(sigma: float) -> float:
    """To sixteenths, so that few different matrices are needed."""
    return round(sigma * 16) / 16


@functools.lru_cache(maxsize=256)
def _blur_matrix(size: int, sigma: float) -> np.ndarray:
    if sigma <= 0:
        return np.eye(size, dtype=np.float32)
    offsets = np.arange(-int(4 * sigma) - 1, int(4 * sigma) + 2)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    matrix = np.zeros((size, size))
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)), weight)
    return matrix.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _rise_matrix(size: int, cells: int) -> np.ndarray:
    """From `cells` values to `size`, by smooth interpolation."""
    place = np.linspace(0, cells - 1, size)
    distance = abs(place[:, None] - np.arange(cells))
    weights = np.where(distance < 1, 0.5 + 0.5 * np.cos(np.pi * np.minimum(distance, 1)), 0)
    return (weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32)
