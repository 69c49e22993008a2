"""Generated images with a bright disc each, and where it is: for tests of what is done with lesions."""

import csv

import numpy as np
from PIL import Image


def disc(size, y, x, radius):
    """A mask: bool [size, size]."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    return np.hypot(rows - y, columns - x) < radius


def discs(n, size, radius=(2.0, 4.0), seed=0):
    """Images uint8 [n, size, size, 1] and masks bool [n, size, size]: a disc in the middle two thirds, on noise."""
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for _ in range(n):
        y, x = rng.uniform(size / 6, 5 * size / 6, 2)
        masks.append(disc(size, y, x, rng.uniform(*radius)))
        images.append(60 + 90 * masks[-1] + rng.normal(0, 5, (size, size)))
    return np.stack(images).clip(0, 255).astype(np.uint8)[..., None], np.stack(masks)


def write_discs(root, n, size, **how):
    """root/images/sub/<i>.png, root/masks/sub/<i>/Nodule.png, root/boxes.csv: the same lesions three times."""
    images, masks = discs(n, size, **how)
    rows = [["path", "left", "top", "right", "bottom", "class"]]
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for path, array in ((f"images/sub/{i}.png", image[..., 0]), (f"masks/sub/{i}/Nodule.png", 255 * mask)):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(root / path)
        y, x = np.nonzero(mask)
        rows.append([f"sub/{i}.png", x.min(), y.min(), x.max() + 1, y.max() + 1, "Nodule"])
    with (root / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return images, masks
