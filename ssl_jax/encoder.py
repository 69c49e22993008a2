"""A trained encoder as a value: embed images with it, export it, load it again."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import checkpoint
from ssl_jax.augment import center_view
from ssl_jax.config import Config, Data, Model
from ssl_jax.data.images import as_images
from ssl_jax.errors import UserError, first_line
from ssl_jax.files import COPY, read_json, read_weights, write_json, write_weights
from ssl_jax.models import build_encoder, from_torch, normalization, published, resolve_model, to_torch, weight_files
from ssl_jax.network import Network
from ssl_jax.run_folder import RunFolder

PIXELS_ON_CPU = 2**20  # at a time: 16 images of 224 px. ViT-S/16 is up to 40 % slower with 32 of them


class Encoder(NamedTuple):
    """A network with its params and stats.

    size: side of the training images, px; channels: their C; about: the content of encoder.json (model, method, ...)
    """

    network: Network
    params: Any
    stats: Any
    size: int
    channels: int
    about: dict[str, Any]

    def embed(self, images: Any, batch: int = 256, fixed: bool = False) -> np.ndarray:
        """Embeddings float32 [N, D] of N images.

        images: an array [N, H, W, C], or [N, H, W] of gray images; `Source.all_images`; or a list of arrays [H, W, C]
            and Pillow images, each of its own size. Integers are from 0 to 255, floats from 0 to 1. An image that is
            not `size` px large is treated like an image file: its central part is resized, as in training. A
            single image is a list of one.
        batch: images at a time, on a CPU at most a million pixels; if there are fewer, their number is padded to a
            power of two, which is compiled once.
        fixed: pad to `batch` instead, so that a single compilation serves calls with any number of images.

        Raises UserError for images of other values, axes or channels. No images have embeddings [0, D].
        """
        return self._features(images, batch, fixed)[0]

    def embed_dense(self, images: Any, batch: int = 256, fixed: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """`embed`, and the last feature map float32 [N, h, w, D]. UserError if the network has none."""
        embeddings, maps = self._features(images, batch, fixed, dense=True)
        return embeddings, maps

    @property
    def test_side(self) -> int:
        """config.data.test_side of its training: how an image of another size is resized; 0: the central square."""
        return self.about.get("read", {}).get("test_side", 0)

    @property
    def width(self) -> int:
        """D, the number of dimensions of an embedding."""
        return self.shapes()[0][0]

    def shapes(self, dense: bool = False) -> list[tuple[int, ...]]:
        """Of the embedding [D] and, if `dense`, the feature map [h, w, D] of an image."""
        image = jax.ShapeDtypeStruct((1, self.size, self.size, self.channels), np.uint8)
        return [found.shape[1:] for found in self._call(compiled_embed(self.network).eval_shape, image, dense)]

    def _features(self, images: Any, batch: int, fixed: bool, dense: bool = False) -> list[np.ndarray]:
        try:
            count = len(images)
        except TypeError:  # a number, a single Pillow image, a generator
            kind = type(images).__name__
            raise UserError(f"images: {kind}; allowed: an array [N, H, W, C], or a list such as [image]") from None
        if not count:
            return [np.zeros((0, *shape), np.float32) for shape in self.shapes(dense)]
        if jax.default_backend() == "cpu":
            batch = min(batch, 1 << max(0, (PIXELS_ON_CPU // self.size**2).bit_length() - 1))
        full, whole = batch if fixed else min(batch, 1 << (count - 1).bit_length()), list[np.ndarray]()
        for start in range(0, count, full):
            part = as_images(images, slice(start, start + full), self.size, self.channels, self.test_side)
            padded = np.pad(part, [(0, full - len(part)), (0, 0), (0, 0), (0, 0)])
            found = self._call(compiled_embed(self.network), padded, dense)
            whole = whole or [np.empty((count, *each.shape[1:]), each.dtype) for each in found]
            for all_of_them, each in zip(whole, found, strict=True):
                all_of_them[start : start + len(part)] = np.asarray(each)[: len(part)]
        return whole

    def _call(self, function: Callable[..., Any], images: Any, dense: bool) -> tuple[Any, ...]:
        if not dense:
            return (function(self.params, self.stats, images),)
        try:
            return function(self.params, self.stats, images, dense=True)
        except TypeError as error:
            if "dense" not in str(error):
                raise
            raise UserError("features: this network has no feature map; allowed: cls, the embedding") from None

    def data(self, data: Data) -> Data:
        """`data` with the size and channels that this encoder expects."""
        return dataclasses.replace(data, size=self.size, channels=self.channels)


@functools.cache
def _without_ynnpack() -> dict[str, Any]:
    """The option of the compiler, or none: on another platform, or with a version of XLA that does not know it."""
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(1.0).compile()
    except Exception:
        return {}
    return options


@functools.cache
def compiled_embed(network: Network) -> Any:
    """(params, stats, images uint8 [N, S, S, C], dense=False) -> embeddings, or with dense=True embeddings and maps.

    On a CPU, ResNets do without YNNPACK, whose products are slower there than XLA's other ones: benchmarks/. (Training
    is faster with it, and so are ViTs.)
    """

    def embed(params, stats, images, **dense):
        return network.apply(params, stats, center_view(images, images.shape[1]), train=False, **dense)[0]

    return jax.jit(embed, static_argnames="dense", compiler_options=compiler_options(network))


def compiler_options(network: Network) -> dict[str, Any]:
    """With which a frozen encoder is compiled; see `compiled_embed`."""
    return {} if network.patch else _without_ynnpack()


# Equal networks must be the same object, so that jit compiles each only once per process.
build = functools.cache(build_encoder)


def random_encoder(model: Model, size: int, channels: int, seed: int) -> Encoder:
    """A freshly initialised encoder: the start of training from scratch."""
    model = resolve_model(model, size, channels=channels)
    network = build(model, channels, size)
    params, stats = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, size, size, channels)))
    metadata = _metadata(model, size, channels, method="scratch", seed=seed)
    return Encoder(network, params, stats, size, channels, metadata)


def _metadata(model: Model, size: int, channels: int, **more: Any) -> dict[str, Any]:
    mean, std = normalization(model, channels)
    model_dict = dataclasses.asdict(model)
    return {"model": model_dict, "size": size, "channels": channels, "mean": mean, "std": std, **more}


def with_drop_path(encoder: Encoder, rate: float) -> Encoder:
    """`encoder` with drop path at this rate when it is trained. UserError if its network has no branches."""
    key = f"config.finetune.drop_path={rate:g}"
    if "model" not in encoder.about:
        raise UserError(f"{key}: this encoder does not say what its network is; allowed: negative, its own rate")
    model = dataclasses.replace(model_of(encoder.about), drop_path=rate)
    network = build(resolve_model(model, encoder.size, channels=encoder.channels), encoder.channels, encoder.size)
    if rate and not network.drop_path:
        raise UserError(f"{key}: leaves out branches of a ViT or ConvNeXt; allowed for other networks: 0")
    return encoder._replace(network=network)


def export(folder: Path, encoder: Encoder) -> None:
    """Writes encoder.safetensors (torchvision's names and layouts) and encoder.json, from which `rebuild` works.

    encoder.json comes last: with it the export is complete. Raises UserError if a weight is NaN or infinite.
    """
    write_weights(folder / "encoder.safetensors", to_torch(encoder.params, encoder.stats))
    write_json(folder / "encoder.json", encoder.about)


def encoder_metadata(config: Config, size: int, channels: int, step: int) -> dict[str, Any]:
    """The `about` of an encoder that a run of `config` trained."""
    read = {"read": {"test_side": config.data.test_side}} if config.data.test_side else {}
    return _metadata(config.model, size, channels, method=config.method_name, step=step, seed=config.train.seed, **read)


def load_encoder(path: str | Path) -> Encoder:
    """The exported encoder of a run folder, or of a folder written by `export`; `ssl_jax.load_encoder` reads more.

    Raises UserError if there is none, if it is damaged, or if the weights do not fit the architecture in encoder.json.
    """
    folder = Path(path)
    folder = RunFolder(path).encoder if RunFolder(path).encoder.is_dir() else folder
    if not (folder / "encoder.json").is_file():
        hint = "allowed: a folder made by `ssl-jax pretrain` or `ssl-jax finetune`"
        if steps := checkpoint.steps(RunFolder(path).checkpoints):
            hint = "the run has not ended; run its pretrain command again, or use a checkpoint"
            hint += f" with step=latest, or step={' or '.join(map(str, steps))}"
        raise UserError(f"{path}: no encoder.json; {hint}")
    cure = f"{RunFolder.again}, or {COPY}"
    about = read_json(folder / "encoder.json", cure)
    return rebuild(about, read_weights(folder / "encoder.safetensors", cure))


def model_of(about: Mapping[str, Any]) -> Model:
    """The config.model of an encoder, from its `about`, without the weights that it started from."""
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["model"].items()}
    return plain(Model(**options))


def plain(model: Model) -> Model:
    """`model` as it is once trained: whatever its weights started from, and with its adapters merged."""
    return dataclasses.replace(model, init="", lora=0)


def rebuild(about: dict[str, Any], weights: Mapping[str, np.ndarray]) -> Encoder:
    """The encoder that `about` describes, with these weights under torchvision's names."""
    try:
        model, size, channels = model_of(about), about["size"], about["channels"]
    except (KeyError, TypeError, AttributeError) as error:  # a file that somebody has edited
        raise UserError(f"encoder.json or classifier.json: describes no encoder ({first_line(error)})") from error
    encoder = random_encoder(model, size, channels, seed=0)
    params, stats = from_torch(weights, encoder.params, encoder.stats)
    return encoder._replace(params=params, stats=stats, about=about)


def started_from(network: Network, init: str) -> Network:
    """`network` with the weights of an exported or published encoder as its initial ones (config.model.init).

    The first layer is adapted to the channels of the images (`published.adapted`).
    Raises UserError if there is no such file; its init does so if the weights are damaged or of another network.
    """
    file = published.locate(init)

    def load(rng, x):
        return from_torch(_weights_of(file, x.shape[-1]), *network.init(rng, x))

    return network._replace(init=load)


def _weights_of(file: published.WeightFile, channels: int) -> Mapping[str, np.ndarray]:
    cure = f"config.model.init needs a run folder or a sound .safetensors file; {COPY}"
    if file.own:
        return published.adapted_weights(read_weights(file.paths[0], cure), channels)
    try:
        found = published.recognise(file)
    except UserError:  # of a network of another package; what is none here has been refused before (`resolve_model`)
        return published.arrays_of(file)
    return published.weights_of(found, channels)


def published_encoder(model: Model, size: int, channels: int) -> Encoder:
    """The encoder with the weights of model.init, as it is, for images of `size` px with `channels` channels.

    Its network follows from the file, where `model` leaves it open. Raises UserError as `resolve_model` and
    `started_from` do.
    """
    encoder = random_encoder(model, size, channels, seed=0)
    weights = _weights_of(published.locate(model.init), channels)
    params, stats = from_torch(weights, encoder.params, encoder.stats)
    about = {**encoder.about, "method": Path(model.init).name}
    return encoder._replace(params=params, stats=stats, about=about)


def given_encoder(path: str, size: int, channels: int, dtype: Any = "") -> Encoder:
    """The encoder of a run or an export, or published weights for images of `size` px. dtype: that it computes in; "":
    as it was trained, or float32."""
    place = Path(path).expanduser()
    folder = place if place.exists() else weight_files.cached(place) or place
    if place.is_file() or any((folder / name).is_file() for name in weight_files.HUGGING):
        return published_encoder(Model(init=str(place), dtype=dtype or "float32"), size, channels)
    try:
        found = load_encoder(place)
    except UserError as error:
        if place.exists():
            raise
        raise UserError(f"{error}, a file of weights, or OWNER/NAME after `hf download`") from error
    if not dtype:
        return found
    model = dataclasses.replace(model_of(found.about), dtype=dtype)
    return found._replace(network=build(resolve_model(model, found.size), found.channels, found.size))
