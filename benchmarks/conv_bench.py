"""Seconds of one training step (forward, backward, SGD) here and in PyTorch, in the same run.

    pip install torch==2.13.0
    python benchmarks/conv_bench.py [--repeats=10]

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
from ssl_jax.models import build_encoder
from ssl_jax.models.resnet import ARCHITECTURES

# name, stem, side in px, channels, images
CASES = (
    ("resnet18", "small", 32, 3, 64),
    ("resnet18", "imagenet", 64, 3, 64),
    ("resnet_thin", "auto", 28, 1, 512),
)


def torch_net(name, stem, channels):
    """The same layers in PyTorch; basic blocks only."""
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
    repeats = parser.parse_args().repeats
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, fastest of {repeats}")
    for name, stem, size, channels, batch in CASES:
        x = np.random.default_rng(0).random((batch, size, size, channels), np.float32)
        steps, compiling = {"torch": torch_step(name, stem, x)}, {}
        for how in ("native", "patches"):
            steps[how], compiling[how] = jax_step(name, stem, jnp.asarray(x), how)
        times = fastest(steps, repeats)
        print(f"{name}, {stem} stem, {size} px, {batch} images")
        for how, seconds in times.items():
            ratio = f"{seconds / times['torch']:.2f} of torch"
            extra = f", compiled in {compiling[how]:.1f} s" if how in compiling else ""
            print(f"  {how:8} {seconds:6.3f} s  {batch / seconds:6.0f} images/s  {ratio}{extra}", flush=True)


if __name__ == "__main__":
    main()
