"""How many planted problems does `ssl-jax check` find, and how much else does it list?

    python benchmarks/check.py --workdir=runs/demo/pretrain/simclr             Fashion-MNIST
    python benchmarks/check.py --data=runs/phantoms --images=5000              other images, without an encoder

Takes 20,000 images of the data (--images), writes them to a folder as PNG files, and a tenth of as many as a test set.
Among the training images it plants 100 copies (a third each re-encoded as JPEG, cropped by 5 %, 20 % brighter or
darker) and 100 wrong labels, each drawn from the other classes; among the test images 20 copies of training images of
the same three kinds. Then it runs the command and compares check.csv with what was planted.

Recall is the share of the planted that is listed. Precision is the share of the listed that was planted: too low where
the data had copies and wrong labels before.
"""

import argparse
import csv
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from ssl_jax.cli import _print_warnings
from ssl_jax.commands import check
from ssl_jax.config import Data
from ssl_jax.data import open_source
from ssl_jax.settings import data_of

KINDS = ("re-encoded", "cropped", "brightness")


def altered(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    if kind == "re-encoded":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
        return Image.open(file)
    if kind == "brightness":
        return ImageEnhance.Brightness(image).enhance(float(rng.choice([0.8, 1.2])))
    width, height = image.size
    margin = 0.05 * np.array([width, height])
    left, top = rng.uniform(0, margin)
    box = (left, top, left + width - margin[0], top + height - margin[1])
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def plant(root: Path, data: Data, images: int, rng: np.random.Generator) -> dict[str, dict[str, str]]:
    """Writes the folder; returns problem -> name of the image -> the kind of copy, or the class of a wrong label."""
    source = open_source(data)
    tests = images // 10
    order = rng.permutation(len(source))[: images + tests]
    train, test = order[:images], order[images:]
    single = source.labels is not None and not source.multilabel
    classes = source.classes if single else ["all"]
    labels = source.labels if single else np.zeros(len(source), int)
    picked = rng.permutation(train)[:220]
    wrong = dict.fromkeys(picked[:100].tolist()) if len(classes) > 1 else {}
    planted: dict[str, dict[str, str]] = {"near duplicate": {}, "leak": {}, "label": {}}

    def write(image: Image.Image, part: str, label: int, name: str) -> str:
        path = root / part / f"{label:02} {classes[label].replace('/', ' ')}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return path.relative_to(root).as_posix()

    def picture(i: int) -> Image.Image:
        array = source.load(i)
        return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)

    names = {}
    for part, indices in (("train", train), ("test", test)):
        for i in indices.tolist():
            label = int(labels[i])
            if i in wrong:
                label = int(rng.choice([c for c in range(len(classes)) if c != label]))
            names[i] = write(picture(i), part, label, f"{i:06}.png")
            if i in wrong:
                planted["label"][names[i]] = classes[labels[i]]
    for place, i in enumerate(picked[100:].tolist()):
        kind, leak = KINDS[place % 3], place >= 100
        copy = altered(picture(i), kind, rng)
        name = write(copy, "test" if leak else "train", int(labels[i]), f"z {i:06} {kind}.png")
        planted["leak" if leak else "near duplicate"][names[i] if leak else name] = kind
    return planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="", help="run folder of the encoder; empty: none")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="folder for the images and the result; empty: a temporary one")
    arguments = parser.parse_args()
    _print_warnings()
    with tempfile.TemporaryDirectory() as temporary:
        root, out = (Path(arguments.out or temporary) / name for name in ("images", "check"))
        data = data_of(arguments.data, "--data", Data())
        planted = plant(root, data, arguments.images, np.random.default_rng(arguments.seed))
        begun = time.perf_counter()
        check(str(root), arguments.workdir, out=str(out))
        print(f"{time.perf_counter() - begun:.0f} s")
        with (out / "check.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    for problem, wanted in planted.items():
        listed = {row["path"] for row in rows if row["problem"] == problem}
        right = listed & wanted.keys()
        if not wanted or (problem == "label" and not arguments.workdir):
            continue
        precision = len(right) / max(len(listed), 1)
        print(f"{problem}: recall {len(right) / len(wanted):.2f}, precision {precision:.2f} ({len(listed)} listed)")
        if problem != "label":
            kinds = {k: [name for name, kind in wanted.items() if kind == k] for k in KINDS}
            print("  " + json.dumps({k: f"{len(right & set(names))} of {len(names)}" for k, names in kinds.items()}))


if __name__ == "__main__":
    main()
