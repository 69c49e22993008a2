"""Write tests/reference/randaugment.npz: what timm's RandAugment operations make of small images.

    pip install timm==1.0.31
    python benchmarks/randaugment_reference.py

SHAPE.image is uint8 [H, W, C]; for each case, SHAPE-OPERATION-LEVEL-SIGN is uint8 [H, W, C]. Interpolation is bicubic
and the fill that of ImageNet's mean, as in MAE's and DeiT's fine-tuning.
"""

from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from timm.data import auto_augment

OUT = Path(__file__).parent.parent / "tests" / "reference" / "randaugment.npz"
NAMES = {  # ours -> timm's
    "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}  # fmt: skip
LEVELS, SIGNED = (2.3, 5.0, 8.7, 10.0), ("rotate", "shear", "translate", *("color", "contrast", "brightness", "sharp"))
FILL = {3: (124, 116, 104), 1: 128}


def images() -> dict[str, np.ndarray]:
    """A gradient with noise and a dark corner, so that histograms are uneven, in colour and gray, and a constant."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    smooth = np.stack([9 * x + 20, 8 * y + 3 * x, 200 - 5 * x - 3 * y], axis=-1)
    coloured = np.clip(smooth + rng.integers(-25, 26, smooth.shape), 7, 243)
    coloured[:4, :6] = 12
    found = [coloured, coloured[..., :1], np.full((20, 20, 3), 90)]
    return {key: image.astype(np.uint8) for key, image in zip(("colour", "gray", "constant"), found)}


def main() -> None:
    made = {}
    for key, image in images().items():
        made[f"{key}.image"] = image
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        params = {"img_mean": FILL[image.shape[-1]], "interpolation": Image.Resampling.BICUBIC, "magnitude_std": 0}
        for name, theirs in NAMES.items():
            levels = (10.0,) if name in ("auto_contrast", "equalize", "invert") else LEVELS
            for level in levels[:1] if key == "constant" else levels:
                if (name, level) == ("posterize", 10.0):  # 0 bits: black, but an error with newer versions of Pillow
                    continue
                for sign in (1, -1) if name.startswith(SIGNED) else (1,):
                    op = auto_augment.AugmentOp(theirs, prob=1.0, magnitude=level, hparams=params)
                    with mock.patch("random.random", return_value=0.9 if sign < 0 else 0.1):
                        result = np.asarray(op(picture))
                    made[f"{key}-{name}-{level}-{sign}"] = result.reshape(image.shape)
    np.savez_compressed(OUT, **made)
    print(f"{OUT}: {len(made)} arrays, {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
