"""A training step of one recipe in PyTorch: images/s and memory; `gpu.py` starts it.

    peer/bin/python benchmarks/gpu_peer.py SETTINGS.json

Losses and heads are lightly's, put together by lightly_peer.py, with a ResNet of torchvision or a ViT of timm; MAE and
SimMIM are those of transformers. Views are random tensors that lie ready on the device: none is drawn, where ssl_jax
draws them in its step. Networks run under autocast to bfloat16 (if the recipe of ours does), ResNets in the memory
format channels last, the optimizer is fused. compiled: each network by torch.compile.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightly_peer
import torch
from torch import nn

LEAST, SECONDS = 5, 5.0  # steps, and how long they are measured


def backbone(run: SimpleNamespace) -> nn.Module:
    if run.model.startswith("resnet"):
        import torchvision

        net = getattr(torchvision.models, run.model)()
        net.fc = nn.Identity()
        return net
    import timm

    name = {"vit_small": "vit_small_patch16_224", "vit_tiny": "vit_tiny_patch16_224"}[run.model]
    return timm.create_model(name, num_classes=0, img_size=run.views[0], dynamic_img_size=True)


class Masked(nn.Module):
    """MAE or SimMIM of transformers, which bring their losses along."""

    def __init__(self, run: SimpleNamespace):
        super().__init__()
        import transformers

        side = run.views[0]
        sizes = {"vit_tiny": (192, 12, 3), "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16)}[run.model]
        about = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), sizes))
        about |= {"intermediate_size": 4 * sizes[0], "image_size": side, "patch_size": 16}
        if run.method.name == "mae":
            self.net = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**about))
            self.extra = {}
        else:
            config = transformers.ViTConfig(**about, encoder_stride=16)
            self.net = transformers.ViTForMaskedImageModeling(config)
            count = (side // 16) ** 2
            hidden = torch.arange(count) < 0.6 * count
            self.extra = {"bool_masked_pos": hidden.expand(run.batch, -1).to(run.device)}

    def loss(self, views, step):
        return self.net(views[0], **self.extra).loss

    def after_update(self, step):
        pass


def main() -> None:
    run = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    run.method = SimpleNamespace(**run.method)
    cuda = run.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    lightly_peer.backbone = backbone
    torch.manual_seed(0)
    masked = run.method.name in ("mae", "simmim")
    peer = Masked(run) if masked else lightly_peer.METHODS[run.method.name](run)
    layout = torch.channels_last if run.model.startswith("resnet") else torch.contiguous_format
    peer = peer.to(run.device, memory_format=layout).train()
    if run.compiled:
        for part in [peer.net] if masked else [*peer.online, *getattr(peer, "target", ())]:
            part.compile()
    parameters = [p for p in peer.parameters() if p.requires_grad]
    kind, options = (torch.optim.AdamW, {}) if "vit" in run.model else (torch.optim.SGD, {"momentum": 0.9})
    optimizer = kind(parameters, lr=1e-3, weight_decay=1e-4, fused=cuda, **options)
    views = [torch.rand(run.batch, 3, s, s, device=run.device).contiguous(memory_format=layout) for s in run.views]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(run.device, torch.bfloat16, enabled=run.dtype == "bfloat16"):
            loss = peer.loss(views, 0)
        loss.backward()
        optimizer.step()
        peer.after_update(0)
        if cuda:
            torch.cuda.synchronize()

    began = time.perf_counter()
    for _ in range(3):  # compiles, for views of each size
        step()
    compiling, times = time.perf_counter() - began, []
    began = time.perf_counter()
    while len(times) < LEAST or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    found = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "software": f"torch {torch.__version__}",
        "model": run.model,
        "batch": run.batch,
        "micro_batch": 0,
        "dtype": run.dtype,
        "step_s": round(seconds, 4),
        "images_per_s": round(run.batch / seconds),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
        "compile_s": round(compiling, 1) if run.compiled else 0.0,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
