"""Weights under the names of timm, torchvision and Hugging Face's transformers, with what builds the network there.

Sources: the modules of timm 1.0, torchvision 0.28 and transformers 5 with these parameters. A network that has no
counterpart there is refused: what such a file would compute is another function.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ssl_jax.encoder import Encoder, model_of
from ssl_jax.errors import UserError
from ssl_jax.models import resolve_model, to_torch
from ssl_jax.models.vit import ARCHITECTURES, resized_grid, sin_cos

Arrays = dict[str, np.ndarray]
TIMM_VITS = {"vit_tiny", "vit_small", "vit_base", "vit_large"}  # known there with patches of 16 px
RESNETS = {"resnet18": "basic", "resnet34": "basic", "resnet50": "bottleneck"}


class Exported(NamedTuple):
    """weights: for model.safetensors; files: the other files, by name, for JSON; call: Python that loads it"""

    weights: Arrays
    files: dict[str, dict[str, Any]]
    call: str


def exported(
    kind: str, encoder: Encoder, prepared: Mapping[str, Any], head: tuple[np.ndarray, np.ndarray] | None, classes: list
) -> Exported:
    """kind: timm, torchvision or huggingface. prepared: `inference.preprocessing`; head: weights [D, K] and bias [K] of
    a classifier. Raises UserError where the architecture has no counterpart."""
    makers: dict[str, Callable[..., Exported]] = {"timm": _timm, "torchvision": _torchvision, "huggingface": _hugging}
    try:
        return makers[kind](encoder, prepared, head, classes)
    except _NoCounterpartError as error:
        raise UserError(f"--format={kind}: {error}; use --format=onnx or stablehlo") from None


class _NoCounterpartError(Exception):
    pass


def _torchvision(encoder: Encoder, prepared: Mapping[str, Any], head, classes) -> Exported:
    model = _resnet(encoder, "torchvision")
    if encoder.channels != 3:
        raise _NoCounterpartError(f"images of {encoder.channels} channels; torchvision's networks take 3")
    if model.width != 1:
        raise _NoCounterpartError(f"{model.name} of model.width={model.width:g}; torchvision has none")
    weights = to_torch(encoder.params, encoder.stats) | _head("fc", head)
    count = f"num_classes={len(classes)}" if head else ""
    lines = [f"model = torchvision.models.{model.name}({count})"]
    lines += [] if head else ["model.fc = torch.nn.Identity()"]
    lines += ['model.load_state_dict(safetensors.torch.load_file("model.safetensors"), strict=False)']
    return Exported(weights, {"preprocessing.json": dict(prepared)}, "\n".join(lines))


def _timm(encoder: Encoder, prepared: Mapping[str, Any], head, classes) -> Exported:
    """A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    weights, model = to_torch(encoder.params, encoder.stats), _model(encoder)
    arguments: dict[str, Any] = {"in_chans": encoder.channels}
    if "pos_embed" in weights or "cls_token" in weights:
        vit = _vit(encoder, weights)
        if model.eps != 1e-6:
            raise _NoCounterpartError(f"model.eps={model.eps:g}; timm's is 1e-06")
        weights, name = vit.weights, f"{model.name if model.name in TIMM_VITS else 'vit_base'}_patch16_224"
        arguments |= {"img_size": encoder.size, "patch_size": vit.patch, "embed_dim": vit.width, "depth": vit.depth}
        arguments |= {"num_heads": vit.heads, "global_pool": "token" if model.pool == "cls" else "avg"}
        arguments |= {"fc_norm": False, "mlp_ratio": vit.hidden / vit.width}
        arguments |= {"init_values": model.layer_scale} if model.layer_scale else {}
        if model.registers:  # whose networks have no position of the class token there: it becomes part of the token
            of_token, table = np.split(weights["pos_embed"], [1], axis=1)
            weights = weights | {"cls_token": weights["cls_token"] + of_token, "pos_embed": table}
            arguments |= {"reg_tokens": model.registers, "no_embed_class": True}
        weights |= _head("head", head)
        first, last = "patch_embed.proj", "head"
    else:
        model = _resnet(encoder, "timm")
        if model.width != 1:
            raise _NoCounterpartError(f"{model.name} of model.width={model.width:g}; timm has none")
        weights, name, first, last = weights | _head("fc", head), model.name, "conv1", "fc"
    size = [encoder.channels, encoder.size, encoder.size]
    about = {
        "architecture": name,
        "num_classes": len(classes) if head else 0,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "ssl_jax",
            "input_size": size,
            "interpolation": "bilinear",
            "crop_pct": _share(encoder.size, prepared["test_side"]),
            "crop_mode": "center",
            "mean": list(prepared["mean"]),
            "std": list(prepared["std"]),
            "num_classes": len(classes) if head else 0,
            "first_conv": first,
            "classifier": last,
        },
    }
    if head:
        about["label_names"] = classes
    call = 'model = timm.create_model("local-dir:FOLDER", pretrained=True)'
    return Exported(weights, {"config.json": about}, call)


def _hugging(encoder: Encoder, prepared: Mapping[str, Any], head, classes) -> Exported:
    """A folder for `AutoModel.from_pretrained(FOLDER)`, in the names that transformers' own checkpoints have."""
    weights, model = to_torch(encoder.params, encoder.stats), _model(encoder)
    if "cls_token" in weights:
        vit = _vit(encoder, weights)
        if model.registers or model.layer_scale:
            named, config, kind = _dinov2(vit, encoder, model)
            prefix = f"{config['model_type']}."
            if head:  # there it reads the class token and, after it, the mean of the patches
                halves = [head[0], np.zeros_like(head[0])]
                head = np.concatenate(halves if model.pool == "cls" else halves[::-1]), head[1]
        else:
            if head and model.pool != "cls":
                reads = "ViTForImageClassification reads the token"
                raise _NoCounterpartError(f"a classifier on the mean of the patches; {reads}")
            named, config = _vit_names(vit.weights, VIT_NAMES), _vit_config(vit, encoder, model)
            prefix, kind = "vit.", "ViT"
        named = {f"{prefix * bool(head)}{name}": array for name, array in named.items()} | _head("classifier", head)
    else:
        model = _resnet(encoder, "transformers")
        named, config = _resnet_names(weights), _resnet_config(model.name, weights, encoder)
        prefix, kind = "resnet.", "ResNet"
        named = {f"{prefix * bool(head)}{name}": array for name, array in named.items()} | _head("classifier.1", head)
    architecture = f"{kind}ForImageClassification" if head else f"{kind}Model"
    config |= {"architectures": [architecture], "torch_dtype": "float32"}
    if head:
        config |= {
            "id2label": {str(i): name for i, name in enumerate(classes)},
            "label2id": {name: i for i, name in enumerate(classes)},
        }
    side = encoder.size
    files = {"config.json": config}
    if encoder.channels == 3:
        files["preprocessor_config.json"] = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": prepared["test_side"]},
            "resample": 2,  # bilinear
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(prepared["mean"]),
            "image_std": list(prepared["std"]),
        }
    auto = "AutoModelForImageClassification" if head else "AutoModel"
    return Exported(named, files, f'model = transformers.{auto}.from_pretrained("FOLDER")')


def _share(size: int, side: int) -> float:
    """The crop_pct from which timm computes the shorter side as floor(size / crop_pct)."""
    share = size / side
    return share if math.floor(size / share) == side else math.nextafter(share, 0)


def _model(encoder: Encoder) -> Any:
    return resolve_model(model_of(encoder.about), encoder.size)


def _head(name: str, head: tuple[np.ndarray, np.ndarray] | None) -> Arrays:
    return {} if head is None else {f"{name}.weight": np.asarray(head[0]).T, f"{name}.bias": np.asarray(head[1])}


def _resnet(encoder: Encoder, where: str) -> Any:
    """The model of a ResNet as torchvision builds it."""
    model = _model(encoder)
    kernel = np.shape(encoder.params["conv1"]["kernel"])[0] if "conv1" in encoder.params else 0
    if model.name not in RESNETS:
        raise _NoCounterpartError(f"model.name={model.name} has no counterpart in {where}")
    if kernel != 7:
        raise _NoCounterpartError(
            f"{model.name} with the stem for small images (model.stem) has no counterpart in {where}"
        )
    return model


class _ViT(NamedTuple):
    weights: Arrays  # timm's names, with a table of positions
    width: int
    heads: int
    depth: int
    patch: int
    hidden: int  # features inside the MLPs


KNOWN = re.compile(
    r"(cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma))"
)


def _vit(encoder: Encoder, weights: Arrays) -> _ViT:
    """A ViT with or without registers and LayerScale, with positions for its images; any other one is refused."""
    if strange := [name for name in weights if not KNOWN.fullmatch(name)]:
        raise _NoCounterpartError(f"{min(strange)}: a part of the ViT that this format is not written for")
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    model, side = _model(encoder), encoder.size // patch
    if model.name not in ARCHITECTURES or not {f"blocks.{i}.attn.qkv.bias" for i in range(depth)} <= set(weights):
        raise _NoCounterpartError(f"model.name={model.name}: not a plain ViT")
    # What no name of a weight shows.
    plain = {"mlp": ("gelu",), "positions": ("fixed", "learned"), "class_token": (True,)}
    for key, allowed in plain.items():
        if getattr(model, key) not in allowed:
            raise _NoCounterpartError(f"model.{key}={getattr(model, key)!r}: not a plain ViT")
    if "pos_embed" in weights:
        first, table = np.split(np.asarray(weights["pos_embed"])[0], [1])
        learned = round(len(table) ** 0.5)
        grid = jnp.asarray(table.reshape(learned, learned, width))
        table = np.asarray(resized_grid(grid, side, side, model.resize))
    else:  # fixed ones, of which the class token has none
        first, table = np.zeros((1, width), np.float32), sin_cos(side, side, width)
    weights = weights | {"pos_embed": np.concatenate([first, table.reshape(-1, width)])[None]}
    heads = model.heads or ARCHITECTURES[model.name][1]
    return _ViT(weights, width, heads, depth, patch, len(weights["blocks.0.mlp.fc1.bias"]))


VIT_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINOV2_NAMES = {
    **{same: same for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    **{"attn.proj": "attention.output.dense", "ls1": "layer_scale1", "ls2": "layer_scale2"},
}


def _vit_names(weights: Arrays, inside: Mapping[str, str]) -> Arrays:
    """From timm's names to transformers', queries, keys and values apart; inside: of what is in a block."""
    fixed = {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    named: Arrays = {}
    for name, array in weights.items():
        if name in fixed:
            named[fixed[name]] = array
            continue
        module, _, leaf = name.rpartition(".")
        if module in fixed:
            named[f"{fixed[module]}.{leaf}"] = array
            continue
        _, number, part = module.split(".", 2)
        layer = f"encoder.layer.{number}"
        if part == "attn.qkv":
            for which, third in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                named[f"{layer}.attention.attention.{which}.{leaf}"] = third
        else:
            named[f"{layer}.{inside[part]}.{'lambda1' if leaf == 'gamma' else leaf}"] = array
    return named


def _dinov2(vit: _ViT, encoder: Encoder, model: Any) -> tuple[Arrays, dict[str, Any], str]:
    """Weights, config and class of a ViT with LayerScale, as 1 if it has none, and maybe registers."""
    ones = {f"blocks.{i}.ls{k}.gamma": np.ones(vit.width, np.float32) for i in range(vit.depth) for k in (1, 2)}
    named = _vit_names(ones | vit.weights, DINOV2_NAMES)
    named["embeddings.mask_token"] = np.zeros((1, vit.width), np.float32)  # which only its pretraining reads
    if vit.hidden % vit.width:
        raise _NoCounterpartError(
            f"an MLP of {vit.hidden / vit.width:g} times the width; DINOv2 has a whole number there"
        )
    config = _vit_config(vit, encoder, model) | {"model_type": "dinov2", "mlp_ratio": vit.hidden // vit.width}
    config |= {"drop_path_rate": 0.0, "use_swiglu_ffn": False, "layerscale_value": model.layer_scale or 1.0}
    if not model.registers:
        return named, config, "Dinov2"
    return (
        named,
        config | {"model_type": "dinov2_with_registers", "num_register_tokens": model.registers},
        "Dinov2WithRegisters",
    )


def _vit_config(vit: _ViT, encoder: Encoder, model: Any) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": vit.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.eps,
        "qkv_bias": True,
        "image_size": encoder.size,
        "patch_size": vit.patch,
        "num_channels": encoder.channels,
    }


def _resnet_names(weights: Arrays) -> Arrays:
    """From torchvision's names to transformers' of ResNetModel."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    named: Arrays = {}
    for name, array in weights.items():
        module, _, leaf = name.rpartition(".")
        if found := re.fullmatch(r"(conv|bn)1", module):
            named[f"embedder.embedder.{kinds[found[1]]}.{leaf}"] = array
            continue
        found = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))", module)
        if not found:
            raise _NoCounterpartError(f"{name}: not a weight of a plain ResNet")
        stage, block, kind, place, shortcut = found.groups()
        part = f"shortcut.{kinds[shortcut]}" if shortcut else f"layer.{int(place) - 1}.{kinds[kind]}"
        named[f"encoder.stages.{int(stage) - 1}.layers.{block}.{part}.{leaf}"] = array
    return named


def _resnet_config(name: str, weights: Arrays, encoder: Encoder) -> dict[str, Any]:
    stages = sorted({key.split(".")[0] for key in weights if key.startswith("layer")})
    depths = [len({key.split(".")[1] for key in weights if key.startswith(f"{stage}.")}) for stage in stages]
    last = 2 if RESNETS[name] == "basic" else 3
    return {
        "model_type": "resnet",
        "num_channels": encoder.channels,
        "embedding_size": len(weights["bn1.bias"]),
        "hidden_sizes": [len(weights[f"{stage}.0.bn{last}.bias"]) for stage in stages],
        "depths": depths,
        "layer_type": RESNETS[name],
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


# The other library at work: run only where it is installed.


def run_there(kind: str, folder: Any, images: np.ndarray, classifier: bool, pool: str) -> dict[str, np.ndarray]:
    """What timm, torchvision or transformers compute with the files in `folder`, for images float [N, S, S, C] that are
    normalised already: {"embedding"} or, of a classifier, {"logits"}. Raises ImportError if it is not installed."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    module: Any
    if kind == "timm":
        import timm

        module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    elif kind == "torchvision":
        import safetensors.torch
        import torchvision

        state = safetensors.torch.load_file(folder / "model.safetensors")
        name = _torchvision_name(state)
        module = getattr(torchvision.models, name)(num_classes=len(state["fc.bias"]) if classifier else 1000)
        module.fc = module.fc if classifier else torch.nn.Identity()
        lacking, strange = module.load_state_dict(state, strict=False)
        if strange or [key for key in lacking if not key.endswith("num_batches_tracked")]:
            raise UserError(f"{name} does not take these weights: {[*lacking, *strange][0]}")
    else:
        import transformers

        auto = transformers.AutoModelForImageClassification if classifier else transformers.AutoModel
        module = auto.from_pretrained(folder)
    with torch.no_grad():
        y = module.eval()(x)
    if classifier:
        return {"logits": np.asarray(y.logits if kind == "huggingface" else y)}
    if kind != "huggingface":
        return {"embedding": np.asarray(y)}
    hidden = y.last_hidden_state
    if hidden.ndim == 4:
        return {"embedding": np.asarray(hidden.mean((2, 3)))}
    before = 1 + getattr(module.config, "num_register_tokens", 0)
    return {"embedding": np.asarray(hidden[:, 0] if pool == "cls" else hidden[:, before:].mean(1))}


def _torchvision_name(state: Mapping[str, Any]) -> str:
    blocks = len({".".join(name.split(".")[:2]) for name in state if name.startswith("layer")})
    return {8: "resnet18", 16: "resnet50" if "layer1.0.conv3.weight" in state else "resnet34"}[blocks]
