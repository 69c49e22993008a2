"""Weights under the names of timm, torchvision and Hugging Face's transformers, with what builds the network there.

Sources: the modules of timm 1.0, torchvision 0.28 and transformers 5 with these parameters. A network that has no
counterpart there is refused: what such a file would compute is another function.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.encoder import Encoder, model_of
from ssl_jax.errors import UserError
from ssl_jax.models import resolve_model, to_torch
from ssl_jax.models.vit import sin_cos

Arrays = dict[str, np.ndarray]
VIT_SIZES = {192: "tiny", 384: "small", 768: "base"}  # width -> timm's name for it
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
        weights, name = vit.weights, f"vit_{VIT_SIZES.get(vit.width, 'base')}_patch16_224"
        arguments |= {"img_size": encoder.size, "patch_size": vit.patch, "embed_dim": vit.width, "depth": vit.depth}
        arguments |= {"num_heads": vit.heads, "global_pool": "token" if model.pool == "cls" else "avg"}
        arguments |= {"fc_norm": False}
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
            "crop_pct": 1.0,
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
        if head and model.pool != "cls":
            raise _NoCounterpartError(
                "a classifier on the mean of the patches; ViTForImageClassification reads the token"
            )
        vit = _vit(encoder, weights)
        named, config = _vit_names(vit.weights), _vit_config(vit, encoder)
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
            "size": {"shortest_edge": side},
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


KNOWN = re.compile(
    r"(cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias))"
)


def _vit(encoder: Encoder, weights: Arrays) -> _ViT:
    """A plain ViT; whatever else is in its weights (registers, LayerScale, ...) is refused."""
    if strange := [name for name in weights if not KNOWN.fullmatch(name)]:
        raise _NoCounterpartError(f"{min(strange)}: a part of the ViT that this format is not written for")
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    model, side = _model(encoder), encoder.size // patch
    heads = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}.get(model.name, 0)
    if not heads or not {f"blocks.{i}.attn.qkv.bias" for i in range(depth)} <= set(weights):
        raise _NoCounterpartError(f"model.name={model.name}: not a plain ViT")
    # What no name of a weight shows, and what the tables of options here do not say.
    plain = {"heads": (0, heads), "mlp": ("gelu",), "eps": (1e-6,), "positions": ("fixed", "learned")}
    plain |= {"class_token": (True,), "grid": (0, side)}
    for key, allowed in plain.items():
        if getattr(model, key) not in allowed:
            raise _NoCounterpartError(f"model.{key}={getattr(model, key)!r}: not a plain ViT")
    if "pos_embed" not in weights:  # fixed ones, of which the class token has none
        table = np.concatenate([np.zeros((1, width), np.float32), sin_cos(side, side, width)])
        weights = weights | {"pos_embed": table[None]}
    return _ViT(weights, width, heads, depth, patch)


def _vit_names(weights: Arrays) -> Arrays:
    """From timm's names to transformers' of ViTModel, queries, keys and values apart."""
    fixed = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    inside = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
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
            named[f"{layer}.{inside[part]}.{leaf}"] = array
    return named


def _vit_config(vit: _ViT, encoder: Encoder) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": len(vit.weights["blocks.0.mlp.fc1.bias"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
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
    return {"embedding": np.asarray(hidden[:, 0] if pool == "cls" else hidden[:, 1:].mean(1))}


def _torchvision_name(state: Mapping[str, Any]) -> str:
    blocks = len({".".join(name.split(".")[:2]) for name in state if name.startswith("layer")})
    return {8: "resnet18", 16: "resnet50" if "layer1.0.conv3.weight" in state else "resnet34"}[blocks]
