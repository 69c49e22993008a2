"""Seconds of one training step (forward, backward, SGD), and of embedding, here and in PyTorch, in the same run.

    pip install torch==2.13.0
    python benchmarks/conv_bench.py [--repeats=10] [--task=training,embedding]
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/conv_bench.py    # large pages, for both

Steps of the two alternate, and the fastest of each counts, so that other work on the machine disturbs both alike.
PyTorch runs the same layers in its fastest memory format for CPUs (channels last).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch_resnet import resnet

from ssl_jax.config import Model
from ssl_jax.encoder import Encoder
from ssl_jax.models import build_encoder
from ssl_jax.models.resnet import ARCHITECTURES

# name, stem, side in px, channels, images
TRAINING = (
    ("resnet18", "small", 32, 3, 64),
    ("resnet18", "imagenet", 64, 3, 64),
    ("resnet_thin", "auto", 28, 1, 512),
)
EMBEDDING = (
    ("resnet18", "imagenet", 224, 3, 32),
    ("resnet18", "imagenet", 64, 3, 256),
    ("vit_small", "auto", 224, 3, 32),
)


class TorchViT(torch.nn.Module):
    """ViT-S/16 without a class token, whose layers take PyTorch's fused path in evaluation."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 384, 16, 16)
        layer = torch.nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)

    def forward(self, x):
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


def torch_net(name, stem, channels):
    """The same layers in PyTorch; basic blocks only."""
    if name.startswith("vit"):
        return TorchViT()
    widths, depths, _ = ARCHITECTURES[name]
    first = (5, 2) if name == "resnet_thin" else (7, 2) if stem == "imagenet" else (3, 1)
    return resnet(channels, widths, depths, stem=first, pool=stem == "imagenet")


def torch_step(name, stem, x):
    """A function of nothing that trains one step."""
    net = torch_net(name, stem, x.shape[-1]).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def step():
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()

    return step


def jax_step(name, stem, x, how):
    """The same here, and the seconds that compiling took."""
    network = build_encoder(Model(name=name, stem=stem, conv=how), x.shape[-1], x.shape[1])
    state = jax.jit(network.init)(jax.random.key(0), x)

    def train(state, x):
        def loss(params):
            y, after = network.apply(params, state[1], x, train=True)
            return jnp.square(y).mean(), after

        grads, after = jax.grad(loss, has_aux=True)(state[0])
        return jax.tree.map(lambda p, g: p - 1e-3 * g, state[0], grads), after

    start = time.perf_counter()
    compiled = jax.jit(train, donate_argnums=0).lower(state, x).compile()
    seconds = time.perf_counter() - start

    def step():
        nonlocal state
        state = jax.block_until_ready(compiled(state, x))

    return step, seconds


def torch_embed(name, stem, x):
    net = torch_net(name, stem, x.shape[-1]).to(memory_format=torch.channels_last).eval()
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: net(images))


def jax_embed(name, stem, x, how):
    """`Encoder.embed`, from uint8 to numpy."""
    network = build_encoder(Model(name=name, stem=stem, conv=how), x.shape[-1], x.shape[1])
    encoder = Encoder(network, *jax.jit(network.init)(jax.random.key(0), x), x.shape[1], x.shape[-1], {})
    images = np.asarray(x * 255, np.uint8)

    def step():
        return encoder.embed(images)

    start = time.perf_counter()
    step()
    return step, time.perf_counter() - start


def fastest(steps, repeats):
    """The shortest time in seconds of each function of a dict, called in turn."""
    times = {name: [] for name in steps}
    for _ in range(repeats + 1):  # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: min(t[1:]) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--task", default="training,embedding")
    args = parser.parse_args()
    repeats = args.repeats
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, fastest of {repeats}")
    cases = [("training", case) for case in TRAINING] + [("embedding", case) for case in EMBEDDING]
    functions = {"training": (torch_step, jax_step), "embedding": (torch_embed, jax_embed)}
    for task, (name, stem, size, channels, batch) in cases:
        if task not in args.task.split(","):
            continue
        in_torch, in_jax = functions[task]
        x = np.random.default_rng(0).random((batch, size, size, channels), np.float32)
        steps, compiling = {"torch": in_torch(name, stem, x)}, {}
        for how in ("native", "patches")[: 1 if name.startswith("vit") else 2]:
            steps[how], compiling[how] = in_jax(name, stem, jnp.asarray(x), how)
        times = fastest(steps, repeats)
        print(f"{task}: {name}, {stem} stem, {size} px, {batch} images")
        for how, seconds in times.items():
            ratio = f"{seconds / times['torch']:.2f} of torch"
            extra = f", compiled in {compiling[how]:.1f} s" if how in compiling else ""
            print(f"  {how:8} {seconds:6.3f} s  {batch / seconds:6.0f} images/s  {ratio}{extra}", flush=True)


if __name__ == "__main__":
    main()
