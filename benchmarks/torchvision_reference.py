"""Write what torchvision makes of small images: tests/reference/torchvision_ops.npz, computed in float64, and
tests/reference/torchvision_test_images.npz, as it reads test images with Pillow.

    pip install torch==2.13.0 torchvision==0.28.0
    python benchmarks/torchvision_reference.py

Ops: SHAPE.image is uint8 [H, W, C]; for each case, SHAPE-CASE.call is JSON (op and arguments), SHAPE-CASE.result
float32. Test images: HEIGHTxWIDTH-SIZE-SIDE.image, and what Resize(SIDE) and CenterCrop(SIZE) make of it (.result).
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812

OUT = Path(__file__).parent.parent / "tests" / "reference" / "torchvision_ops.npz"
TEST_IMAGES = OUT.with_name("torchvision_test_images.npz")
# height, width, size, side: wide, high, square, a side that stays, larger than before, rounded in every way.
TESTED = (
    *((40, 61, 24, 28), (61, 40, 24, 28), (33, 33, 24, 27), (28, 45, 24, 28), (13, 20, 24, 24), (41, 60, 23, 30)),
    *((60, 41, 23, 30), (35, 52, 21, 26), (5, 60, 8, 9), (60, 5, 8, 9)),
)
SHAPES = ((24, 24, 3), (15, 22, 3), (19, 13, 1), (7, 7, 1))
BILINEAR = {"interpolation": InterpolationMode.BILINEAR}
CORNERS = ([0, 0], [1, 0], [1, 1], [0, 1])  # shares of (width - 1, height - 1)
MOVED = ([0.2, 0.1], [0.9, 0.05], [0.75, 1], [0.1, 0.8])


def cases(height: int, width: int, channels: int) -> list[tuple[str, dict]]:
    start, end = ([[x * (width - 1), y * (height - 1)] for x, y in points] for points in (CORNERS, MOVED))
    box = {"top": 2, "left": 1, "height": height - 4, "width": width - 2}
    found: list[tuple[str, dict]] = [
        *(("adjust_brightness", {"factor": f}) for f in (0.4, 1.7)),
        *(("adjust_contrast", {"factor": f}) for f in (0.3, 1.6)),
        ("gaussian_blur", {"kernel_size": 3, "sigma": 0.4}),
        ("gaussian_blur", {"kernel_size": 7, "sigma": 1.7}),
        ("solarize", {"threshold": 0.5}),
        ("horizontal_flip", {}),
        *(("rotate", {"degrees": d}) for d in (10.0, -33.0, 90.0, 180.0)),
        ("rotate", {"degrees": 25.0, "fill": 0.6}),
        ("perspective", {"startpoints": start, "endpoints": end}),
        ("translate", {"dx": 3, "dy": -2}),
        *(("resized_crop", {**box, "size": s}) for s in ((4, 5), (height, width), (29, 33))),
        ("resized_crop", {"top": 0, "left": 0, "height": height, "width": width, "size": (height // 2, width + 5)}),
    ]
    if channels == 3:
        found += [
            *(("adjust_saturation", {"factor": f}) for f in (0.0, 0.5, 1.8)),
            *(("adjust_hue", {"shift": s}) for s in (-0.5, -0.13, 0.08, 0.4)),
            ("to_grayscale", {}),
        ]
    return found


def torchvision_result(op: str, image: torch.Tensor, a: dict) -> torch.Tensor:
    """`image` is [C, H, W]; ops and arguments have the names of ssl_jax.augment.ops."""
    calls = {
        "adjust_brightness": lambda: F.adjust_brightness(image, a["factor"]),
        "adjust_contrast": lambda: F.adjust_contrast(image, a["factor"]),
        "adjust_saturation": lambda: F.adjust_saturation(image, a["factor"]),
        "adjust_hue": lambda: F.adjust_hue(image, a["shift"]),
        "to_grayscale": lambda: F.to_grayscale(image, num_output_channels=3),
        "gaussian_blur": lambda: F.gaussian_blur(image, [a["kernel_size"]] * 2, [a["sigma"]] * 2),
        "solarize": lambda: F.solarize(image, a["threshold"]),
        "horizontal_flip": lambda: F.horizontal_flip(image),
        "rotate": lambda: F.rotate(image, a["degrees"], fill=a.get("fill"), **BILINEAR),
        "perspective": lambda: F.perspective(image, a["startpoints"], a["endpoints"], **BILINEAR),
        "translate": lambda: F.affine(image, 0.0, [a["dx"], a["dy"]], 1.0, [0.0, 0.0], **BILINEAR),
        "resized_crop": lambda: F.resized_crop(
            image, a["top"], a["left"], a["height"], a["width"], list(a["size"]), antialias=True, **BILINEAR
        ),
    }
    return calls[op]()


def main() -> None:
    rng = np.random.default_rng(0)
    made = {}
    for shape in SHAPES:
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        image[:2, :3] = 128  # gray pixels, black and white: the corner cases of hue and clipping
        image[-1, -1], image[-1, 0] = 0, 255
        key = "x".join(map(str, shape))
        made[f"{key}.image"] = image
        planes = torch.from_numpy(image).permute(2, 0, 1).to(torch.float64) / 255
        for number, (op, arguments) in enumerate(cases(*shape)):
            result = torchvision_result(op, planes, arguments).permute(1, 2, 0)
            made[f"{key}-{number:02}_{op}.call"] = np.array(json.dumps([op, arguments]))
            made[f"{key}-{number:02}_{op}.result"] = result.numpy().astype(np.float32)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **made)
    tested = {}
    for height, width, size, side in TESTED:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        read = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(size)])
        key = f"{height}x{width}-{size}-{side}"
        tested |= {f"{key}.image": image, f"{key}.result": np.asarray(read(Image.fromarray(image)))}
    np.savez_compressed(TEST_IMAGES, **tested)
    print(f"{OUT}: {(len(made) - len(SHAPES)) // 2} cases, {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
