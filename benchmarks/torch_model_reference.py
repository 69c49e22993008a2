"""Write tests/reference/torch_models.npz: what torchvision's ResNets make of given weights, computed in float64.

    pip install torch==2.13.0 torchvision==0.28.0
    python benchmarks/torch_model_reference.py

Weights and images come from `weight` and `images` below, which the test uses too, so that only results are stored:
embeddings in evaluation and training mode, running statistics after one step of training, and the gradient of the
mean square of the embeddings with respect to the first convolution.
"""

import zlib
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent.parent / "tests" / "reference" / "torch_models.npz"
SIZES = {"resnet18": 64, "resnet50": 57}  # px; an odd size tells paddings apart
STATISTICS = ("bn1", "layer1.0.bn1", "layer4.0.downsample.1", "layer4.1.bn2")


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a weight by torchvision's name; numpy promises that RandomState's numbers never change."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 4:
        return (normal * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    if name.endswith("running_var"):
        return np.exp(0.2 * normal).astype(np.float32)
    # Bottlenecks add little to what goes around them, or rounding errors grow a hundredfold through 16 of them.
    centre = 0.0 if not name.endswith("weight") else 0.2 if "bn3" in name else 1.0
    return (centre + 0.1 * normal).astype(np.float32)


def images(size: int) -> np.ndarray:
    """float32 [4, size, size, 3] in [0, 1]."""
    return np.random.RandomState(0).random_sample((4, size, size, 3)).astype(np.float32)


def reference(name: str, size: int) -> dict[str, np.ndarray]:
    import torch
    import torchvision

    model = getattr(torchvision.models, name)().double()
    model.fc = torch.nn.Identity()
    state = {k: torch.from_numpy(weight(k, v.shape)) if v.ndim else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    x = torch.from_numpy(images(size)).double().permute(0, 3, 1, 2)
    made = {"eval": model.eval()(x), "train": (y := model.train()(x))}
    y.square().mean().backward()
    made["gradient"] = model.conv1.weight.grad
    for layer in STATISTICS:
        made[f"{layer}.running_mean"] = model.get_submodule(layer).running_mean
        made[f"{layer}.running_var"] = model.get_submodule(layer).running_var
    return {f"{name}/{key}": value.detach().numpy().astype(np.float32) for key, value in made.items()}


if __name__ == "__main__":
    found = {key: value for name, size in SIZES.items() for key, value in reference(name, size).items()}
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **found)
    print(f"{OUT}: {len(found)} arrays, {OUT.stat().st_size / 1000:.0f} kB")
