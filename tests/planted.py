"""Folders of pictures with known problems: for tests of `ssl-jax check`."""

import shutil

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

SIDE = 32


def picture(rng, label):
    """Smooth noise on a band whose height tells the class (0, 1, 2)."""
    noise = Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    array = np.asarray(noise, np.float32) * 0.5
    array[label * 10 : label * 10 + 10] += 110
    return Image.fromarray(array.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def cropped(image, share=0.05):
    width, height = image.size
    left, top = share / 2 * width, share / 2 * height
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, width - left, height - top))


def plant(root, images=240, each=5, seed=0):
    """Writes root/train/CLASS and root/test/CLASS, and returns what is wrong: problem -> set of names.

    `each` images are re-encoded, cropped by 5 % and brightened; copied exactly; leaked into the test set; mislabelled.
    """
    rng = np.random.default_rng(seed)
    names, planted = [], {}
    for i in range(images):
        part, label = "train" if i < 0.8 * images else "test", i % 3
        path = root / part / "abc"[label] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng, label).save(path)
        names.append(path)
    train = [path for path in names if path.parts[-3] == "train"]
    chosen = iter(rng.permutation(len(train)).tolist())

    def some():
        return [train[next(chosen)] for _ in range(each)]

    def save(image, path, suffix, **options):
        new = path.with_name(f"z{path.stem}{suffix}")  # sorted last: the original stays
        image.save(new, **options)
        return new.relative_to(root).as_posix()

    copies = {save(Image.open(path), path, "-jpeg.jpg", quality=80) for path in some()}
    copies |= {save(cropped(Image.open(path)), path, "-crop.png") for path in some()}
    copies |= {save(ImageEnhance.Brightness(Image.open(path)).enhance(1.2), path, "-bright.png") for path in some()}
    planted["near duplicate"] = copies
    planted["duplicate"] = {save(Image.open(path), path, "-same.png", compress_level=1) for path in some()}
    leaks = some()
    for path in leaks:
        shutil.copy(path, root / "test" / path.parts[-2] / f"leak-{path.name}")
    planted["leak"] = {path.relative_to(root).as_posix() for path in leaks}
    planted["label"] = set()
    for path in some():
        wrong = path.with_name(f"wrong-{path.name}")
        moved = root / "train" / "abc"[("abc".index(path.parts[-2]) + 1) % 3] / wrong.name
        path.rename(moved)
        planted["label"].add(moved.relative_to(root).as_posix())
    return planted
