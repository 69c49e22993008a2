"""Time and memory of a training step of DINOv2, here and put together from lightly's parts, at equal settings.

    python benchmarks/dinov2_step.py                         ssl_jax, views included
    peer/bin/python benchmarks/dinov2_step.py --lightly      torch, timm and lightly==1.6.0, views not included
    python benchmarks/dinov2_step.py --batch=3072 --micro_batch=32 --size=32    the same with ViT-Ti/4, two local views

ViT-S/16, two views of 224 px (half of them masked, 10 to 50 % of the patches), eight of 96 px, heads of 2048, 2048,
256 and 8192 for the image and for its patches, means as centres, KoLeo, AdamW, in float32. Prints a line of JSON.
"""

import argparse
import json
import resource
import statistics
import time


def ours(batch: int, micro_batch: int, size: int):
    """(a function of nothing that trains one step, MB of the program's intermediate values)"""
    import jax
    import numpy as np

    from ssl_jax.config import default, resolve
    from ssl_jax.data.source import Source
    from ssl_jax.parallel import make_mesh
    from ssl_jax.train import init_state, make_step, set_up

    config = default("dinov2")
    small = size <= 64
    config.data.update({"name": "synthetic", "size": size})
    config.model.update({"name": "vit_tiny" if small else "vit_small", "patch": 4 if small else 16})
    config.augment.local_views = 2 if small else 8
    config.augment.local.size = 16 if small else 96
    config.method.centring = "centre"
    config.train.update({"batch": batch, "micro_batch": micro_batch, "devices": 1, "duration": "100 steps"})
    config.optim.warmup = "1 steps"
    config.eval.online_probe = False
    resolved = resolve(config)
    images = np.random.default_rng(0).integers(0, 256, (max(64, batch), size, size, 3), np.uint8)
    source = Source([str(i) for i in range(len(images))], images.shape[1:], images.__getitem__)
    mesh, setup = make_mesh(1, batch, micro_batch), set_up(resolved, source)
    state = init_state(setup, 0, mesh)
    inputs = {"image": jax.device_put(images[:batch]), "index": np.arange(batch, dtype=np.int32)}
    compiled = jax.jit(make_step(setup, resolved, mesh), donate_argnums=0).lower(state, inputs).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, inputs)
        return float(metrics["loss"])

    return step, compiled.memory_analysis().temp_size_in_bytes / 1e6


def theirs(batch: int):
    import torch
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask, update_momentum
    from timm.models.vision_transformer import vit_small_patch16_224

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = MaskedVisionTransformerTIMM(vit=vit_small_patch16_224(dynamic_img_size=True))
            head = {"input_dim": 384, "hidden_dim": 2048, "bottleneck_dim": 256, "output_dim": 8192}
            self.head, self.patch_head = DINOProjectionHead(**head), DINOProjectionHead(**head)

    student, teacher = Network(), Network().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    dino, ibot, koleo = DINOLoss(output_dim=8192), IBOTPatchLoss(output_dim=8192), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.04)
    whole, small = torch.rand(2 * batch, 3, 224, 224), torch.rand(8 * batch, 3, 96, 96)

    def step():
        block = random_block_mask(size=(2 * batch, 14, 14), batch_mask_ratio=0.5)
        mask = torch.cat([torch.zeros(2 * batch, 1, dtype=torch.bool), block.flatten(1)], dim=1)
        with torch.no_grad():
            tokens = teacher.encoder.encode(whole)
            of_teacher = teacher.head(tokens[:, 0])
            patches_of_teacher = teacher.patch_head(tokens[mask])
        tokens = student.encoder.encode(whole, mask=mask)
        of_student = student.head(tokens[:, 0])
        patches_of_student = student.patch_head(tokens[mask])
        local = student.head(student.encoder.encode(small)[:, 0])
        loss = dino(list(of_teacher.chunk(2)), [*of_student.chunk(2), *local.chunk(8)], epoch=1)
        loss = loss + ibot(patches_of_teacher, patches_of_student, mask=block)
        loss = loss + 0.1 * sum(koleo(part) for part in tokens[:, 0].chunk(2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        update_momentum(student, teacher, 0.992)
        return float(loss)

    return step, None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lightly", action="store_true")
    for flag, value in (("batch", 8), ("micro_batch", 0), ("size", 224), ("repeats", 5)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    args = parser.parse_args()
    step, program = theirs(args.batch) if args.lightly else ours(args.batch, args.micro_batch, args.size)
    times = []
    for _ in range(args.repeats + 1):  # the first warms up
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    timed = times[1:] or times
    found = {"median_s": statistics.median(timed), "fastest_s": min(timed), "peak_gb": peak}
    print(json.dumps({**vars(args), **{k: round(v, 3) for k, v in found.items()}, "program_mb": program}))


if __name__ == "__main__":
    main()
