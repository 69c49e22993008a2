"""Write tests/reference/weights.npz: what transformers, timm and torchvision make of given weights, in float64.

    pip install torch==2.13.0 torchvision==0.28.0 timm==1.0.31 transformers==5.24.0
    python benchmarks/weights_reference.py

Every network is small, and its weights come from `weight` below, which the test uses too. So only this is stored: the
names and shapes of the weights as each library writes them, its config.json, and the class and patch tokens.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent.parent / "tests" / "reference" / "weights.npz"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
# Height and width of the images, px. ViTs have patches of 4 px and positions for 7 x 7 of them.
VIT_SIZES, CONV_SIZES = ((28, 28), (20, 36)), ((64, 64), (57, 75))
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
SMALL |= {"image_size": 28, "patch_size": 4}
TIMM = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 28, "patch_size": 4, "dynamic_img_size": True}
CONVNEXT = {"depths": [3, 3, 9, 3], "hidden_sizes": [8, 16, 32, 64]}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a weight by its name; numpy promises that RandomState's numbers never change."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return np.exp(0.2 * normal).astype(np.float32)
    if len(shape) in (2, 4) and "token" not in name:
        return (normal / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    if len(shape) > 1:  # tokens, positions, LayerScale of torchvision's ConvNeXt
        return (0.3 + 0.3 * normal).astype(np.float32)
    scale = any(word in name for word in ("lambda1", "gamma")) or name.endswith("weight")
    return ((0.5 if scale else 0.0) + 0.2 * normal).astype(np.float32)


def images(height: int, width: int) -> np.ndarray:
    """float32 [2, height, width, 3] in [0, 1]."""
    return np.random.RandomState(height + width).random_sample((2, height, width, 3)).astype(np.float32)


def transformers_model(kind: str, **options):
    """(the network, names and shapes of its file, its config.json): what save_pretrained writes is what is read."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    model_class, config_class = getattr(transformers, f"{kind}Model"), getattr(transformers, f"{kind}Config")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        model_class(config_class(**options)).save_pretrained(folder)
        shapes = {name: tuple(value.shape) for name, value in load_file(file).items()}
        made = {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}
        save_file(made, file, metadata={"format": "pt"})
        model = model_class.from_pretrained(folder)
        return model.double().eval(), shapes, json.loads((Path(folder) / "config.json").read_text())


def with_weights(model):
    """(the network, names and shapes of its weights, {})."""
    import torch

    state = model.state_dict()
    made = {k: torch.from_numpy(weight(k, tuple(v.shape))) if v.ndim else v for k, v in state.items()}
    model.load_state_dict(made)
    return model.double().eval(), {k: tuple(v.shape) for k, v in state.items() if v.ndim}, {}


def families():
    """name: (network, shapes, config, function (network, images) -> class token, patch tokens [B, N, D], sizes)."""
    import timm
    import torch
    import torchvision
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    def tokens(before, **options):
        def run(model, x):
            y = model(x, **options).last_hidden_state
            return (y[:, 0] if before else y.mean(1)), y[:, before:]

        return run

    def mae(model, x):
        count = x.shape[2] // 4 * (x.shape[3] // 4)
        order = torch.arange(count, dtype=torch.float64).expand(len(x), -1)
        y = model(x, noise=order, interpolate_pos_encoding=True).last_hidden_state
        return y[:, 0], y[:, 1:]

    def timm_tokens(model, x):
        y = model.forward_features(x)
        return y[:, 0], y[:, model.num_prefix_tokens :]

    def torchvision_vit(model, x):
        y = model._process_input(x)
        y = model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), y], 1))
        return y[:, 0], y[:, 1:]

    def conv_map(
        model, x
    ):  # the place-wise LayerNorm of the map is this library's own choice where DINOv3 is not asked
        return model(x).flatten(1), None

    swiglu = {"use_swiglu_ffn": True}
    registers = {"num_register_tokens": 4}
    resize = {"interpolate_pos_encoding": True}
    yield "dinov2", *transformers_model("Dinov2", **SMALL), tokens(1), VIT_SIZES
    yield "dinov2-swiglu", *transformers_model("Dinov2", **SMALL, **swiglu), tokens(1), VIT_SIZES
    made = transformers_model("Dinov2WithRegisters", **SMALL, **registers)
    yield "dinov2-registers", *made, (lambda m, x: (tokens(1)(m, x)[0], tokens(5)(m, x)[1])), VIT_SIZES
    yield "vit-mae", *transformers_model("ViTMAE", **SMALL, mask_ratio=0.0), mae, VIT_SIZES
    yield "vit-hf", *transformers_model("ViT", **SMALL), tokens(1, **resize), VIT_SIZES
    yield "ijepa", *transformers_model("IJepa", **SMALL), tokens(0, **resize), VIT_SIZES
    for name, more in {"dinov3": {}, "dinov3-swiglu": {"use_gated_mlp": True, "hidden_act": "silu"}}.items():
        made = transformers_model("DINOv3ViT", **SMALL, **registers, **more)
        yield name, *made, (lambda m, x: (tokens(1)(m, x)[0], tokens(5)(m, x)[1])), VIT_SIZES
    for name in ("vit_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"):
        yield f"timm-{name}", *with_weights(timm.create_model(name, **TIMM)), timm_tokens, VIT_SIZES
    for name in ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"):
        yield f"timm-{name}", *with_weights(timm.create_model(name, **TIMM)), timm_tokens, VIT_SIZES
    vit = torchvision.models.VisionTransformer(28, 4, 2, 3, 24, 96)
    yield "torchvision-vit", *with_weights(vit), torchvision_vit, VIT_SIZES[:1]
    yield "dinov3-convnext", *transformers_model("DINOv3ConvNext", **CONVNEXT), tokens(1), CONV_SIZES
    dims, depths = CONVNEXT["hidden_sizes"], CONVNEXT["depths"]
    made = timm.create_model("convnext_tiny", depths=depths, dims=dims, num_classes=0)
    yield "timm-convnext", *with_weights(made), conv_map, CONV_SIZES
    settings = [CNBlockConfig(*s) for s in zip(dims, [*dims[1:], None], depths, strict=True)]
    model, shapes, config = with_weights(ConvNeXt(settings, num_classes=5))
    model.classifier[2] = torch.nn.Identity()
    yield "torchvision-convnext", model, shapes, config, conv_map, CONV_SIZES
    made = with_weights(timm.create_model("resnet18", num_classes=0))
    yield "timm-resnet18", *made, conv_map, CONV_SIZES


def main() -> None:
    import torch

    stored, about = {}, {}
    for name, model, shapes, config, run, sizes in families():
        config = {k: v for k, v in config.items() if k not in ("architectures", "transformers_version")}
        if name.startswith(("timm-vit", "torchvision-vit")):
            config = {"num_attention_heads": 3}  # in no shape
        about[name] = {"shapes": shapes, "config": config, "sizes": sizes}
        for height, width in sizes:
            x = torch.from_numpy((images(height, width) - MEAN) / STD).permute(0, 3, 1, 2)
            with torch.no_grad():
                found = run(model, x)
            for part, value in zip(("class", "patches"), found, strict=True):
                if value is not None:
                    stored[f"{name}/{height}x{width}/{part}"] = value.numpy().astype(np.float32)
        print(name, flush=True)
    np.savez_compressed(OUT, about=json.dumps(about), **stored)
    print(f"{OUT}: {len(stored)} arrays, {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
