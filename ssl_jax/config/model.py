"""The options of config.model: which encoder, and how it is computed."""

from dataclasses import dataclass
from typing import Literal

from ssl_jax.fields import option


@dataclass(frozen=True)
class Model:
    """The encoder."""

    name: str = option(
        "",
        "architecture; empty: that of `init`, else the method's, else resnet_thin up to 32 px on a CPU, or resnet18",
        registered="model",
    )
    stem: Literal["auto", "imagenet", "small"] = option(
        "auto",
        "ResNet: imagenet: 7x7, stride 2, and max-pool; small: 3x3, stride 1; auto: small up to 64 px, unless a CPU "
        "chooses the model",
    )
    zero_init: bool = option(
        False, "ResNet: blocks start as the identity: the scale of their last norm at 0 (arXiv 1706.02677, 5.1)"
    )
    width: float = option(1.0, "factor for all channel counts; ViT: for the features of each head", above=0)
    dtype: Literal["float32", "bfloat16", "float64"] = option(
        "float32", "of the computation; parameters and statistics stay float32; float64 needs JAX_ENABLE_X64=1"
    )
    patch: int = option(0, "ViT: side of a patch in px; 0: 16, up to 64 px the largest with 7 or more in a row", min=0)
    depth: int = option(0, "ViT: number of blocks; 0: of the architecture (12; large 24, huge 32, giant 40)", min=0)
    heads: int = option(0, "ViT: attention heads; 0: of the architecture", min=0)
    positions: Literal["fixed", "learned", "rotary"] = option(
        "fixed", "ViT: position embedding; fixed: sines and cosines; rotary: turned queries and keys (DINOv3)"
    )
    grid: int = option(0, "ViT: patches along a side that positions are learned for; 0: those of the images", min=0)
    resize: Literal["antialias", "plain", "dino"] = option(
        "antialias",
        "ViT: how learned positions are resized to other grids: as timm does; without antialiasing; or as DINO does, "
        "without it and by a factor for 0.1 patches more",
    )
    initial: Literal["xavier", "xavier_qkv", "normal"] = option(
        "xavier",
        "ViT: initial values of its matrices; xavier: MAE's; xavier_qkv: queries, keys and values apart, class token "
        "near 0 (MoCo v3); normal: with deviation 0.02 (DINO)",
    )
    class_token: bool = option(True, "ViT: whether there is one; without it (I-JEPA) pool has to be mean")
    registers: int = option(0, "ViT: number of register tokens", min=0)
    layer_scale: float = option(0.0, "ViT: initial value of the factor of each residual branch; 0: no factor", min=0)
    mlp: Literal["gelu", "swiglu"] = option("gelu", "ViT: kind of the MLP in each block")
    mlp_ratio: float = option(0.0, "ViT: its hidden width, relative to the features; 0: 4; swiglu: 8/3", min=0)
    qkv_bias: Literal["all", "no_key", "none"] = option("all", "ViT: biases of queries, keys and values")
    eps: float = option(1e-6, "ViT: epsilon of LayerNorm", above=0)
    freeze_patch: bool = option(False, "ViT: keep the initial, random projection of the patches (MoCo v3)")
    pool: Literal["cls", "mean"] = option(
        "cls", "ViT: the embedding is the class token (cls) or the mean of the patches"
    )
    remat: Literal["none", "blocks"] = option(
        "none", "blocks: recompute the inside of each block for the gradient, which saves memory"
    )
    drop_path: float = option(
        0.0, "ViT and ConvNeXt: probability of leaving out a branch in training, in the last block", min=0, below=1
    )
    conv: str = option(
        "auto",
        "on CPUs, how convolutions are computed: natively, as products of patches, or all by XLA (lax); auto: native",
        choices=("auto", "native", "patches", "lax"),
    )
    mean: tuple[float, ...] = option((), "per channel, for images in [0, 1]; empty: ImageNet's (3 channels) or 0.5")
    std: tuple[float, ...] = option((), "per channel; empty: ImageNet's (3 channels) or 0.25")
    init: str = option(
        "",
        "weights to start from: a run folder, a .safetensors file or its folder (docs/weights.md); empty: random",
        path=True,
    )
    lora: int = option(
        0, "ViT: train only low-rank adapters of this rank, added to its blocks' matrices; 0: train all", min=0
    )
