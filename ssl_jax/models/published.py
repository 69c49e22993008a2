"""What a file of weights holds, by its keys and shapes, and how its names become those of the networks here.

A family is a row of FAMILIES: how it is recognised, how its names map, what its weights do not say. The other options
of config.model follow from shapes (`_vit`, `_resnet`, `_convnext`). Names here are timm's for a ViT and a ConvNeXt,
and torchvision's, which are timm's too, for a ResNet.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.config import Model
from ssl_jax.errors import UserError
from ssl_jax.models import convnext, resnet, vit
from ssl_jax.models.weight_files import WeightFile, arrays_of, locate, shapes_of

Shapes = Mapping[str, tuple[int, ...]]
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# name: (pattern, replacement). "#0" and so on: the parts that are joined along the first axis, in this order.
_HF_VIT: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?(\w+)$", r"patch_embed.proj.\1"),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.(\w+)$", r".attn.qkv.\1#0"),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.(\w+)$", r".attn.qkv.\1#1"),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.(\w+)$", r".attn.qkv.\1#2"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.(\w+)$", r".mlp.fc1.\1#0"),
    (r"\.mlp\.up_proj\.(\w+)$", r".mlp.fc1.\1#1"),
    (r"^layernorm\.", "norm."),
)
_TIMM_VIT: Rules = (
    (r"^(register_tokens|storage_tokens)$", "reg_token"),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.mlp\.(?:fc1_g|w1)\.(\w+)$", r".mlp.fc1.\1#0"),
    (r"\.mlp\.(?:fc1_x|w2)\.(\w+)$", r".mlp.fc1.\1#1"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_TORCHVISION_VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
_HF_CONVNEXT: Rules = (
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsample_layers\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.pointwise_conv", ".mlp.fc"),
    (r"^layer_norm\.", "head.norm."),
)
_AUTHORS_CONVNEXT: Rules = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.", "stages.#."),
    (r"^stages\.#\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv", ".mlp.fc"),
    (r"^norm\.", "head.norm."),
)
_TORCHVISION_CONVNEXT: Rules = (
    (r"^features\.0\.", "stem."),
    (r"^features\.([246])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.layer_scale$", ".gamma"),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"^classifier\.0\.", "head.norm."),
)


class Family(NamedTuple):
    """about: in words. anchor: a key of the family's first layer; what stands before it is a prefix, such as "module.",
    of all its keys. has, lacks: patterns of further keys. implied: options that do not follow from shapes."""

    about: str
    kind: str  # of network: vit, resnet or convnext
    anchor: str
    rules: Rules = ()
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    implied: Mapping[str, Any] = {}


_PROJECTION = "embeddings.patch_embeddings.projection.weight"
_PLAIN = {"resize": "plain"}
_DINOV3 = {"positions": "rotary", "eps": 1e-5}
FAMILIES = (
    Family(
        "DINOv2 with registers (Hugging Face)", "vit", _PROJECTION, _HF_VIT, has=("layer_scale1", "register_tokens")
    ),
    Family("DINOv2 (Hugging Face)", "vit", _PROJECTION, _HF_VIT, has=("layer_scale1",), implied=_PLAIN),
    Family("I-JEPA (Hugging Face)", "vit", _PROJECTION, _HF_VIT, lacks=("embeddings.cls_token",), implied=_PLAIN),
    Family("ViT or ViT-MAE (Hugging Face)", "vit", _PROJECTION, _HF_VIT, implied=_PLAIN),
    Family("DINOv3 ViT (Hugging Face)", "vit", "embeddings.patch_embeddings.weight", _HF_VIT, implied=_DINOV3),
    Family("DINOv3 ViT (timm)", "vit", "patch_embed.proj.weight", _TIMM_VIT, (r"\.gamma_1$",), (), _DINOV3),
    Family("DINOv3 ViT (its authors)", "vit", "patch_embed.proj.weight", _TIMM_VIT, ("storage_tokens",), (), _DINOV3),
    Family("DINOv2 with registers (its authors)", "vit", "patch_embed.proj.weight", _TIMM_VIT, ("register_tokens",)),
    Family("ViT (timm, DINO, DINOv2, MAE, MoCo v3, I-JEPA)", "vit", "patch_embed.proj.weight", _TIMM_VIT),
    Family("ViT (torchvision)", "vit", "conv_proj.weight", _TORCHVISION_VIT, has=("encoder_layer_0",)),
    Family("ConvNeXt (timm)", "convnext", "stem.0.weight", has=("conv_dw",)),
    Family("DINOv3 ConvNeXt (Hugging Face)", "convnext", "stages.0.downsample_layers.0.weight", _HF_CONVNEXT),
    Family("ConvNeXt (its authors, DINOv3)", "convnext", "downsample_layers.0.0.weight", _AUTHORS_CONVNEXT),
    Family("ConvNeXt (torchvision)", "convnext", "features.0.0.weight", _TORCHVISION_CONVNEXT, has=("layer_scale",)),
    Family("ResNet (torchvision, timm, MoCo, SwAV, DINO)", "resnet", "conv1.weight", has=(r"layer1\.0\.conv1",)),
)
# Of several networks in one file: the one that its authors evaluate.
_PREFERRED = ("teacher.", "target_encoder.", "encoder_q.", "base_encoder.")
# What an encoder does not need: heads, decoders, mask tokens, queues, counters.
_IGNORED = re.compile(
    r"^(fc|heads?|classifier|pooler|projection_head|prototypes|decoder\w*|predictor|dino_head|ibot_head)\.(?!norm\.)"
    r"|^(embeddings\.)?mask_token$|^decoder_|num_batches_tracked$|bias_mask$|^(rope_embed|rope)\.|^norms\."
)
_NOT_WEIGHTS = re.compile(r"(^|\.)(exp_avg(_sq)?|momentum_buffer|param_groups)(\.|$)")
FIRST_LAYERS = ("patch_embed.proj.weight", "conv1.weight", "stem.0.weight")


class Published(NamedTuple):
    """A recognised file."""

    file: WeightFile
    family: Family
    names: dict[str, list[str]]  # name here -> names in the file, whose arrays are joined along the first axis
    shapes: dict[str, tuple[int, ...]]  # of the arrays under the names here
    ignored: list[str]  # names in the file that an encoder does not need
    model: dict[str, Any]  # the options of config.model that follow
    size: int  # side of the images, px, that it was trained on; 0: unknown
    channels: int
    normalised: bool  # whether a file beside it names mean and std

    @property
    def about(self) -> str:
        return self.family.about


def recognise(file: WeightFile) -> Published:
    """What the file holds. Raises UserError, one line, if it is nothing known here."""
    shapes = shapes_of(file)
    family, prefix = _family(file, shapes)
    names: dict[str, list[tuple[int, str]]] = {}
    ignored = [name for name in shapes if not name.startswith(prefix)]
    for name in (name for name in shapes if name.startswith(prefix)):
        short = name.removeprefix(prefix)
        for pattern, replacement in family.rules:
            short = re.sub(pattern, replacement, short)
        if _IGNORED.search(short):
            ignored.append(name)
            continue
        short, _, part = short.partition("#")
        names.setdefault(short, []).append((int(part or 0), name))
    if family.kind == "vit":
        _split_biases(names)
    parts = {name: [source for _, source in sorted(sources)] for name, sources in names.items()}
    joined = {name: _joined([shapes[source] for source in sources]) for name, sources in parts.items()}
    model, size = _KINDS[family.kind](joined, file)
    model = {**family.implied, **model, **_normalisation(file)}
    channels = next(joined[name][1] for name in FIRST_LAYERS if name in joined)
    return Published(file, family, parts, joined, sorted(ignored), model, size, channels, "mean" in model)


def _family(file: WeightFile, shapes: Shapes) -> tuple[Family, str]:
    for family in FAMILIES:
        prefixes = [name.removesuffix(family.anchor) for name in shapes if f".{name}".endswith(f".{family.anchor}")]
        prefixes.sort(key=lambda p: (next((i for i, w in enumerate(_PREFERRED) if w in p), len(_PREFERRED)), len(p)))
        for prefix in prefixes:
            own = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
            has_all = all(any(re.search(pattern, name) for name in own) for pattern in family.has)
            if has_all and not any(name in own for name in family.lacks):
                return family, prefix
    if any(_NOT_WEIGHTS.search(name) for name in shapes):
        raise UserError(f"{file.name}: an optimizer's state, not the weights of a network; allowed: model.safetensors")
    held = ", ".join(sorted(shapes)[:3]) or "nothing"
    known = ", ".join(dict.fromkeys(family.about.partition(" (")[0] for family in FAMILIES))
    raise UserError(f"{file.name}: holds no encoder that is known here ({held}, ...); known: {known}")


def _split_biases(names: dict[str, list[tuple[int, str]]]) -> None:
    """Without a bias of keys, those of queries and values have names of their own: attn.q_bias, attn.v_bias."""
    for name in [name for name in names if name.endswith(".attn.qkv.bias")]:
        if {part for part, _ in names[name]} == {0, 2}:
            for part, source in names.pop(name):
                names[name.replace("qkv.bias", "v_bias" if part else "q_bias")] = [(0, source)]


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]


def _count(shapes: Shapes, pattern: str) -> int:
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)


def _normalisation(file: WeightFile) -> dict[str, Any]:
    """Mean and std, where a file beside the weights names them."""
    timm = file.config.get("pretrained_cfg", {})
    mean = file.preprocessor.get("image_mean") or timm.get("mean")
    std = file.preprocessor.get("image_std") or timm.get("std")
    return {"mean": tuple(mean), "std": tuple(std)} if mean and std else {}


# Heads are in no shape: those of published networks by their features, beside vit.ARCHITECTURES.
_HEADS = {1280: 16, 1408: 16, 1664: 16, 4096: 32}


def _vit(shapes: Shapes, file: WeightFile) -> tuple[dict[str, Any], int]:
    features, _, patch, _ = shapes["patch_embed.proj.weight"]
    block = "blocks.0."
    if f"{block}mlp.fc2.weight" not in shapes or f"{block}attn.qkv.weight" not in shapes:
        raise UserError(f"{file.name}: a ViT whose blocks are of another kind; allowed: attention and one MLP")
    hidden = shapes[f"{block}mlp.fc2.weight"][1]
    swiglu = shapes[f"{block}mlp.fc1.weight"][0] == 2 * hidden
    known = {width: (name, heads) for name, (width, heads, _) in vit.ARCHITECTURES.items()}
    usual = known.get(features, ("", _HEADS.get(features, 0)))[1]
    if features == 1280 and swiglu:  # DINOv3 ViT-H+
        usual = 20
    named = file.config.get("num_attention_heads") or file.config.get("model_args", {}).get("num_heads")  # timm's
    heads = named or usual or (features // 64 if features % 64 == 0 else 0)
    if not heads:
        raise UserError(f"{file.name}: {features} features; how many heads they have stands in config.json: missing")
    same = [name for name, (_, count, _) in vit.ARCHITECTURES.items() if count == heads]
    name = known[features][0] if features in known else same[0] if same else "vit_base"
    base, its_heads, its_depth = vit.ARCHITECTURES[name]
    depth = _count(shapes, r"blocks\.(\d+)\.")
    ratio = hidden / features
    model: dict[str, Any] = {"name": name, "width": features / base, "patch": patch}
    model |= {"depth": 0 if depth == its_depth else depth, "heads": 0 if heads == its_heads else heads}
    model |= {"mlp": "swiglu" if swiglu else "gelu", "mlp_ratio": ratio if swiglu or ratio != 4 else 0.0}
    model |= {"class_token": "cls_token" in shapes, "registers": shapes.get("reg_token", (0, 0))[1]}
    model |= {"layer_scale": 1.0} if f"{block}ls1.gamma" in shapes else {}
    if f"{block}attn.qkv.bias" not in shapes:
        model["qkv_bias"] = "no_key" if f"{block}attn.q_bias" in shapes else "none"
    if "cls_token" not in shapes:
        model["pool"] = "mean"
    size = file.config.get("image_size", 0)
    if "pos_embed" in shapes:
        side = int(shapes["pos_embed"][1] ** 0.5)  # N or 1 + N positions
        if shapes["pos_embed"][1] - side**2 not in (0, 1):
            raise UserError(f"{file.name}: {shapes['pos_embed'][1]} positions; allowed: those of a square of patches")
        model |= {"positions": "learned", "grid": side}
        size = size or side * patch
    if eps := file.config.get("layer_norm_eps"):
        model["eps"] = eps
    return model, size if isinstance(size, int) else size[0]


def _resnet(shapes: Shapes, file: WeightFile) -> tuple[dict[str, Any], int]:
    depths = tuple(_count(shapes, rf"layer{i}\.(\d+)\.") for i in range(1, 5))
    block = resnet.bottleneck if "layer1.0.conv3.weight" in shapes else resnet.basic
    stem, width = shapes["conv1.weight"][-1], shapes["conv1.weight"][0]
    for name, (widths, its_depths, its_block) in resnet.ARCHITECTURES.items():
        if (its_depths, its_block) == (tuple(d for d in depths if d), block):
            kind = {} if name == "resnet_thin" else {"stem": "imagenet" if stem == 7 else "small"}
            return {"name": name, "width": width / widths[0], **kind}, 0
    known = ", ".join(resnet.ARCHITECTURES)
    raise UserError(f"{file.name}: a ResNet with {depths} blocks, which is none of {known}")


def _convnext(shapes: Shapes, file: WeightFile) -> tuple[dict[str, Any], int]:
    depths = tuple(_count(shapes, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(4))
    width = shapes["stem.0.weight"][0]
    same = [(abs(widths[0] - width), name) for name, (widths, d) in convnext.ARCHITECTURES.items() if d == depths]
    if not same:
        known = ", ".join(convnext.ARCHITECTURES)
        raise UserError(f"{file.name}: a ConvNeXt with {depths} blocks, which is none of {known}")
    name = min(same)[1]
    return {"name": name, "width": width / convnext.ARCHITECTURES[name][0][0]}, 0


_KINDS: dict[str, Callable[[Shapes, WeightFile], tuple[dict[str, Any], int]]] = {
    "vit": _vit,
    "resnet": _resnet,
    "convnext": _convnext,
}


# Use.


def follow(model: Model, channels: int, size: int = 0) -> Model:
    """`model` with what follows from the file that model.init names. Following twice changes nothing.

    channels, size: of the images. Raises UserError if an option contradicts the file, or its patch does not fit them.
    """
    file = locate(model.init)
    if file.own:
        return _as_exported(model, file)
    found = recognise(file)
    usual = Model()
    implied = dict(found.model)
    if found.normalised or found.channels != channels:
        implied |= _adapted_normalisation(found.model, channels)
    for key, value in implied.items():
        given = getattr(model, key)
        if given in (getattr(usual, key), value) or _means_the_same(key, given, value, found):
            continue
        what = f"{found.file.name} is a {found.about} with {key}={value!r}"
        raise UserError(f"config.model.{key}={given!r}: {what}; leave config.model.{key} out")
    patch = implied.get("patch", 0)
    if patch and size % patch:
        near = f"multiples of {patch}, such as {max(1, round(size / patch)) * patch}"
        raise UserError(f"config.data.size={size}: {file.name} has patches of {patch} px; allowed: {near}")
    changes = {key: value for key, value in implied.items() if getattr(model, key) == getattr(usual, key)}
    return replace(model, **changes)


def _means_the_same(key: str, given: Any, value: Any, found: Published) -> bool:
    if key == "width":  # which is rounded; another network has other shapes
        return abs(given - value) <= 0.1 * value
    if key in ("depth", "heads") and not value:
        return given == vit.ARCHITECTURES[found.model["name"]][2 if key == "depth" else 1]
    return key == "layer_scale"  # an initial value


def _as_exported(model: Model, file: WeightFile) -> Model:
    """With the options in encoder.json where model.name is left open; else the options as they are. UserError if the
    encoder has another name."""
    options = file.config.get("model")
    if not isinstance(options, dict):
        return model
    if model.name and model.name != (own := options.get("name") or model.name):
        what = f"{file.name} is the encoder of a run, with name={own!r}"
        raise UserError(f"config.model.name={model.name!r}: {what}; leave config.model.name out")
    if model.name:
        return model
    kept = {key: getattr(model, key) for key in ("dtype", "remat", "drop_path", "conv", "init", "lora")}
    known: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in options.items() if hasattr(model, key)
    }
    return replace(model, **{**known, **kept})


def _adapted_normalisation(implied: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Mean and std for images of `channels` channels, as `adapted` changes the first layer."""
    mean, std = (implied.get(key) or default for key, default in (("mean", MEAN), ("std", STD)))
    if channels == len(mean):
        return {} if (tuple(mean), tuple(std)) == (MEAN, STD) else {"mean": tuple(mean), "std": tuple(std)}
    if channels == 1:
        return {"mean": (round(sum(mean) / len(mean), 6),), "std": (round(sum(std) / len(std), 6),)}
    repeated = [tuple(values[i % len(values)] for i in range(channels)) for values in (mean, std)]
    return {"mean": repeated[0], "std": repeated[1]}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def adapted(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The kernel [D, C, k, k] of a first layer for images with `channels` channels: [D, channels, k, k].

    One channel gets the sum of all; more get those of the file in turn, times C / channels, so that equal channels give
    what they gave before. Source: adapt_input_conv in timm, which does the same.
    """
    own = kernel.shape[1] if kernel.ndim == 4 else channels
    if own == channels:
        return kernel
    if channels == 1:
        return kernel.sum(1, keepdims=True)
    return kernel[:, np.arange(channels) % own] * np.float32(own / channels)


def weights_of(found: Published, channels: int) -> dict[str, np.ndarray]:
    """The arrays under the names here, float32, for images with `channels` channels."""
    arrays = arrays_of(found.file)
    weights = {}
    for name, sources in found.names.items():
        parts = [np.asarray(arrays[source], np.float32) for source in sources]
        weights[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if name.endswith(".gamma"):  # torchvision's has two further axes
            weights[name] = weights[name].reshape(-1)
        if (mask := f"{sources[0]}_mask") in arrays:  # DINOv3's authors: 0 for the biases of keys
            weights[name] = np.where(arrays[mask] == 0, np.float32(0), weights[name])
    if "pos_embed" in weights and "cls_token" in weights and found.model["grid"] ** 2 == weights["pos_embed"].shape[1]:
        weights["pos_embed"] = np.pad(weights["pos_embed"], ((0, 0), (1, 0), (0, 0)))  # timm: the class token has none
    return adapted_weights(weights, channels)


def adapted_weights(weights: Mapping[str, np.ndarray], channels: int) -> dict[str, np.ndarray]:
    """The weights of a network known here, with its first layer `adapted`."""
    first = {name: adapted(weights[name], channels) for name in FIRST_LAYERS if name in weights}
    return {**weights, **first}
