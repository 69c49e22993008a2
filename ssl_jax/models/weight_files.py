"""Files of weights as the field has them: .safetensors, .pth, a folder, Hugging Face's local cache. No network."""

import contextlib
import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ssl_jax.errors import UserError, first_line
from ssl_jax.files import read_weights

SAFETENSORS, TORCH = ".safetensors", (".pth", ".pt", ".bin", ".tar", ".ckpt")
UNFINISHED = (".incomplete", ".part", ".crdownload")  # of Hugging Face, curl and browsers
AGAIN = "download it again"
HUGGING = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # in a folder of Hugging Face


class WeightFile(NamedTuple):
    """paths: the files of the weights, usually one; config, preprocessor: what Hugging Face's JSON files beside it say;
    own: whether this library exported it, with the options of its network in an encoder.json."""

    paths: tuple[Path, ...]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    own: bool = False

    @property
    def name(self) -> str:
        return str(self.paths[0])


def locate(text: str, key: str = "config.model.init") -> WeightFile:
    """The weights that `text` names: a file, a folder (a run's, or one with model.safetensors), or the OWNER/NAME of a
    model in the local cache of Hugging Face. Raises UserError if there are none; key: the option to blame."""
    path = Path(text).expanduser()
    if not path.exists():
        path = cached(path) or _missing(path, text, key)
    if path.is_file():
        return WeightFile((path,), *_beside(path.parent, path.name), own=path.name == "encoder.safetensors")
    for own in (path / "encoder", path):
        if (own / "encoder.safetensors").is_file():
            return WeightFile((own / "encoder.safetensors",), *_beside(own, "encoder.safetensors"), own=True)
    if (index := path / "model.safetensors.index.json").is_file():
        parts = sorted({path / name for name in _json(index).get("weight_map", {}).values()})
        if missing := [part for part in parts if not part.is_file()]:
            raise UserError(f"{missing[0]}: missing; {index.name} names it; {AGAIN}")
        return WeightFile(tuple(parts), *_beside(path, "model.safetensors"))
    found = sorted(p for p in path.iterdir() if p.suffix == SAFETENSORS)
    found = found or sorted(p for p in path.iterdir() if p.suffix in TORCH)
    preferred = [p for p in found if p.stem in ("model", "pytorch_model")] or found
    if len(preferred) != 1:
        held = f"{len(found)} files of weights; name one" if found else "no encoder.safetensors or model.safetensors"
        raise UserError(f"{key}={text!r}: not found; the folder holds {held}")
    return WeightFile((preferred[0],), *_beside(path, preferred[0].name))


def cached(path: Path) -> Path | None:
    """The folder of a model in Hugging Face's local cache, if its weights are there.

    path: OWNER/NAME, which may have become an absolute path
    """
    if not _is_hub_name(path) or importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in HUGGING:
        with contextlib.suppress(ValueError):  # no name that the Hub allows
            if isinstance(file := try_to_load_from_cache(_hub_name(path), name), str):
                return Path(file).parent
    return None


def _hub_name(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _is_hub_name(path: Path) -> bool:
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", _hub_name(path))
    return bool(named) and path.suffix not in (SAFETENSORS, *TORCH)


def _missing(path: Path, text: str, key: str) -> NoReturn:
    allowed = "allowed: a run folder, a .safetensors file or its folder, or OWNER/NAME of Hugging Face's local cache"
    wanted, repo = f"{key}={text!r}: not found", _hub_name(path)
    if not _is_hub_name(path):
        raise UserError(f"{wanted}; {allowed}")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{wanted}; {allowed}, which needs: pip install huggingface_hub")
    cure = f"`hf download {repo}` fetches it, a gated model only after its page has granted access"
    raise UserError(f"{wanted}, and the weights of {repo} are not in the local cache; {cure}; {allowed}")


def _beside(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json; of an encoder of this library, encoder.json. {} without them."""
    if name == "encoder.safetensors":
        return _json(folder / "encoder.json"), {}
    if not name.startswith(("model.", "model-", "pytorch_model")):
        return {}, {}
    return _json(folder / "config.json"), _json(folder / "preprocessor_config.json")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); {AGAIN}") from error
    return value if isinstance(value, dict) else {}


def shapes_of(file: WeightFile) -> dict[str, tuple[int, ...]]:
    """The shape of each array by name. Raises UserError for a file that holds no weights, or was cut short."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in file.paths:
        stat = path.stat()
        shapes |= _shapes(path, stat.st_size, stat.st_mtime_ns)
    return shapes


@functools.lru_cache(maxsize=8)
def _shapes(path: Path, size: int, changed: int) -> Mapping[str, tuple[int, ...]]:
    del changed
    if path.suffix in TORCH:
        return {name: value.shape for name, value in _torch_arrays(path).items()}
    header = _header(path, size)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _header(path: Path, size: int) -> dict[str, Any]:
    """The header of a .safetensors file. https://huggingface.co/docs/safetensors#format."""
    with path.open("rb") as opened:
        start = opened.read(64)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a pointer of Git LFS, not the weights themselves; `git lfs pull` fetches them")
        if path.suffix == ".json":
            raise UserError(f"{path}: a JSON file (a config or tokenizer), no weights; allowed: a {SAFETENSORS} file")
        if path.suffix in UNFINISHED:
            raise UserError(f"{path}: a download that was not finished; {AGAIN}")
        if path.suffix != SAFETENSORS:
            raise UserError(f"{path}: no file of weights; allowed: {SAFETENSORS}, {', '.join(TORCH)}")
        opened.seek(8)
        try:
            header = json.loads(opened.read(length)) if 8 + length <= size else None
            needed = max((e["data_offsets"][1] for n, e in (header or {}).items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            header = None
    if header is None:
        raise UserError(
            f"{path}: not readable as {SAFETENSORS}, empty or cut short; {AGAIN}, or restore it from a copy"
        )
    if size < (total := 8 + length + needed):
        raise UserError(f"{path}: cut short: {size} of {total} bytes; {AGAIN}, or restore it from a copy")
    return header


def arrays_of(file: WeightFile) -> dict[str, np.ndarray]:
    """The arrays by name. Raises UserError if a file is damaged or a value is NaN or infinite."""
    arrays: dict[str, np.ndarray] = {}
    for path in file.paths:
        cure = f"{AGAIN}, or restore it from a copy"
        arrays |= _torch_arrays(path) if path.suffix in TORCH else read_weights(path, cure)
    return arrays


def _torch_arrays(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch.save wrote, nested names joined by dots. Never unpickles anything else."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{path}: needs torch to be read: pip install 'ssl_jax[torch]'; or convert it to {SAFETENSORS}")
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever foreign bytes make it raise
        reason = f"not a file of torch.save, or cut short; {AGAIN}"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"holds {code[1]}, which is more than weights and is not loaded; save the weights alone"
        raise UserError(f"{path}: {reason}") from error
    arrays: dict[str, np.ndarray] = {}

    def flatten(value, name):
        if isinstance(value, Mapping):
            for key, each in value.items():
                flatten(each, f"{name}.{key}" if name else str(key))
        elif isinstance(value, torch.Tensor):
            wide = value.float() if value.is_floating_point() else value
            arrays[name] = wide.detach().numpy()

    flatten(content, "")
    return arrays
