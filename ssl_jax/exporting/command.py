"""`ssl-jax export`: a network as a file that other programs run, checked before it is said to be written."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from ssl_jax import embedding, files
from ssl_jax.classifier import load_classifier
from ssl_jax.config import Config, Data
from ssl_jax.data import open_source
from ssl_jax.encoder import Encoder
from ssl_jax.errors import UserError, first_line, unknown
from ssl_jax.evaluate.finetuning import Classifier
from ssl_jax.exporting import card, checking, inference, weights
from ssl_jax.load import load_with_settings
from ssl_jax.report.record import read_run
from ssl_jax.run_folder import RunFolder
from ssl_jax.settings import data_of, images_only, settings_of

FORMATS = ("onnx", "stablehlo", "timm", "torchvision", "huggingface")
NEEDS = {"timm": "timm", "torchvision": "torchvision", "huggingface": "transformers"}
FILES = {"onnx": "model.onnx", "stablehlo": "model.stablehlo"}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
IMAGES = 8  # for the comparison
PROTOBUF = 1_900_000_000  # bytes of weights above which ONNX keeps them in a second file: protobuf holds 2 GiB


class Subject(NamedTuple):
    """What is exported. classifier: None for an encoder; config: of its run, if there is one; sample: data to compare
    on, if they are known"""

    encoder: Encoder
    classifier: Classifier | None
    config: Config | None
    sample: Data | None
    about: dict[str, Any]


def export(
    workdir: str,
    format: str,
    out: str,
    features: str = "cls",
    step: int | str = "",
    opset: int = 18,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a new folder `out`: the network in this format, README.md (a model card), export.json (what was compared
    and how far it differs) and, of a classifier, labels.txt. Returns the content of export.json.

    The files are made under another name and run. If they compute something else than the network, nothing is left.
    """
    folder = Path(out)
    if format not in FORMATS:
        raise unknown("--format", format, FORMATS)
    if features not in embedding.FEATURES:
        raise unknown("--features", features, embedding.FEATURES)
    if folder.exists():
        raise UserError(f"--out={out}: exists already; allowed: a new folder")
    if format == "onnx":
        require_onnx()
    subject = _load(workdir, step, overrides)
    if subject.classifier and features != "cls":
        raise UserError(f"--features={features}: not of a classifier, which gives probabilities; export its run")
    if features != "cls" and format in NEEDS:
        raise UserError(f"--features={features}: with --format=onnx or stablehlo; {format} holds weights alone")
    images, described = _images(subject)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if format in NEEDS:
            facts, use, result = _weights(subject, format, temporary, images)
        else:
            facts, use, result = _program(subject, format, features, opset, temporary, images)
        result = {"format": format, "features": features, "images": described, **result}
        _write_beside(subject, format, temporary, facts, use, workdir)
        files.write_json(temporary / "export.json", result)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for line in facts:
        print(line)
    print(f"written: {out}")
    return result


def require_onnx() -> None:
    if missing := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format=onnx: needs {' and '.join(missing)}: pip install 'ssl_jax[onnx]'")


def _load(workdir: str, step: int | str, overrides: Sequence[str]) -> Subject:
    run = RunFolder(workdir)
    if not (run.path / "classifier.json").is_file():
        encoder, config = load_with_settings(workdir, step, overrides)
        known = run.config.is_file()
        return Subject(encoder, None, config if known else None, config.data if known else None, encoder.about)
    if step != "":
        raise UserError(f"--step={step}: not of a classifier, which has no checkpoints")
    classifier = load_classifier(workdir)
    about = dict(classifier.about)
    config, sample = settings_of(run.path, overrides, about.get("read", {})), None
    with contextlib.suppress(UserError):  # gone
        sample = data_of(str(about.get("data", "")), "--data", config.data)
    parent = RunFolder(run.path.parent)  # where the docs put a classifier
    of_run = settings_of(parent.path, ()) if parent.config.is_file() else None
    return Subject(classifier.fitted_encoder, classifier, of_run, sample, about)


def _images(subject: Subject) -> tuple[np.ndarray, str]:
    """uint8 [N, S, S, C] of the run, or random ones if these cannot be had; and what they are, in words."""
    encoder, why = subject.encoder, "the data are not known"
    if subject.sample is not None:
        try:
            source = open_source(images_only(encoder.data(dataclasses.replace(subject.sample, cache=""))), "all")
            images = source.load_many(range(min(IMAGES, len(source))))
            return images, f"{len(images)} images of the run"
        except UserError as error:
            why = first_line(error)
    shape = (IMAGES, encoder.size, encoder.size, encoder.channels)
    print(f"compared on random images: {why}")
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8), f"{IMAGES} random images"


def _expected(subject: Subject, images: Any, features: str) -> dict[str, np.ndarray]:
    """What the library computes, in float32."""
    encoder = inference.in_float32(subject.encoder)
    with jax.default_matmul_precision("highest"):
        if subject.classifier is None:
            return embedding.features_of(encoder, images, features)
        return {"probabilities": subject.classifier._replace(encoder=encoder).predict(images)}


def _program(
    subject: Subject, kind: str, features: str, opset: int, folder: Path, images: np.ndarray
) -> tuple[list[str], str, dict[str, Any]]:
    encoder, classifier = subject.encoder, subject.classifier
    made = inference.of_classifier(classifier) if classifier else inference.of_encoder(encoder, features)
    path = folder / FILES[kind]
    count, height, width = jax.export.symbolic_shape("N, H, W")
    image = jax.ShapeDtypeStruct((count, height, width, encoder.channels), np.uint8)
    if kind == "onnx":
        _save_onnx(made, image, opset, path, subject)
    else:
        exported = jax.export.export(jax.jit(made.function), platforms=PLATFORMS)(image)
        files.write_bytes(path, bytes(exported.serialize()))
    large = np.repeat(np.repeat(images[:1], 2, axis=1), 3, axis=2)[:, :, :-1]  # of another size and not square
    batches = [images, images[:1], large]
    run = checking.run_onnx if kind == "onnx" else checking.run_stablehlo
    found = run(path, batches)
    wanted = [_expected(subject, list(batch), features) for batch in batches]
    _check_decisions(classifier, found)
    same, one, other = (checking.compare(f, w) for f, w in zip(found, wanted, strict=True))
    differences = {"same_size": max(same, one), "resized": other}
    checking.check(differences, kind)
    outputs = ", ".join(f"{name} {list(array.shape[1:])}" for name, array in found[0].items())
    where = "ONNX Runtime" if kind == "onnx" else "a new process"
    facts = [
        f"{path.name}: images uint8 [N, H, W, {encoder.channels}] of any number and size -> {outputs} per image",
        f"Inside: {inference.described(encoder)}; then it is normalised",
        f"Compared in {where}: the largest relative difference is {differences['same_size']:.1e}, and "
        f"{other:.1e} where an image has to be resized",
        *_in_float32(encoder),
    ]
    return facts, _use(kind, path.name), {"differences": differences, "compared": where, "opset": opset}


def _in_float32(encoder: Encoder) -> list[str]:
    dtype = encoder.about["model"].get("dtype", "float32")
    return [f"It computes in float32; the run computed in {dtype}"] * (dtype != "float32")


def _save_onnx(made: inference.Inference, image: Any, opset: int, path: Path, subject: Subject) -> None:
    import onnx

    from ssl_jax.exporting import onnx_writer

    known = {"size": subject.encoder.size, "classes": subject.about.get("classes", [])}
    facts = {name: json.dumps(value, ensure_ascii=False) for name, value in known.items()}
    model = onnx_writer.write(made.function, image, opset, facts)
    weighs = sum(len(array.raw_data) for array in model.graph.initializer)
    onnx.save_model(model, path, save_as_external_data=weighs > PROTOBUF, location=f"{path.name}.weights")
    onnx.checker.check_model(path)


def _check_decisions(classifier: Classifier | None, found: Sequence[dict[str, np.ndarray]]) -> None:
    """Raises UserError if `predicted` does not follow from the file's own probabilities."""
    for outputs in found:
        if classifier is None or "predicted" not in outputs:
            continue
        limits, shares = inference.thresholds(classifier), outputs["probabilities"]
        wanted = shares >= limits if classifier.multilabel else shares.argmax(axis=1)
        if not np.array_equal(wanted, outputs["predicted"]):
            raise UserError("predicted: does not follow from the probabilities; nothing was written")


def _use(kind: str, name: str) -> str:
    if kind == "onnx":
        return (
            f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}")\n'
            'outputs = session.run(None, {"images": images})  # uint8 [N, H, W, C]'
        )
    return (
        "import pathlib\n\nfrom jax import export\n\n"
        f'program = export.deserialize(bytearray(pathlib.Path("{name}").read_bytes()))\n'
        "outputs = program.call(images)  # uint8 [N, H, W, C]; a dict"
    )


def _weights(subject: Subject, kind: str, folder: Path, images: np.ndarray) -> tuple[list[str], str, dict[str, Any]]:
    encoder, classifier, head = subject.encoder, subject.classifier, None
    classes = list(subject.about.get("classes", []))
    if classifier:
        if classifier.pixels is not None:
            why = "the classifier votes with a regression on raw pixels, for which it has no place"
            raise UserError(f"--format={kind}: {why}; use --format=onnx or stablehlo")
        head = np.asarray(classifier.params["head"]["w"]), np.asarray(classifier.params["head"]["b"])
    prepared = inference.preprocessing(encoder)
    made = weights.exported(kind, encoder, prepared, head, classes)
    files.write_weights(folder / "model.safetensors", made.weights)
    for name, value in made.files.items():
        files.write_bytes(folder / name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    x = (images.astype(np.float32) / 255 - np.array(prepared["mean"])) / np.array(prepared["std"])
    pool, library = encoder.about["model"].get("pool", "cls"), NEEDS[kind]
    facts = [
        f"model.safetensors: {sum(a.size for a in made.weights.values()):,} values under the names of {library}",
        f"Images: {inference.described(encoder)}; from 0 to 1, less mean {prepared['mean']}, divided by std "
        f"{prepared['std']}",
    ]
    if classifier and classifier.multilabel:
        facts += ["Several classes can apply: take a sigmoid of each logit, not a softmax"]
    if library != "torchvision" and not classifier and encoder.about["model"].get("name", "").startswith("vit"):
        token = "the class token" if pool == "cls" else "the mean of the patch tokens"
        facts += [f"The embedding is {token} after the last LayerNorm"]
    try:
        found = weights.run_there(kind, folder, x.astype(np.float32), classifier is not None, pool)
    except ImportError as error:
        facts += [f"Not run: {library} is not installed here ({first_line(error)}); the file was not compared"]
        return facts, made.call, {"differences": {}, "compared": "not run"}
    except Exception as error:  # whatever the other library raises
        problem = error if isinstance(error, UserError) else f"{library} cannot run the files: {first_line(error)}"
        raise UserError(f"--format={kind}: not written: {problem}") from error
    with jax.default_matmul_precision("highest"):
        own = inference.in_float32(encoder)
        wanted = {"embedding": own.embed(images)}
        if classifier:
            wanted = {"logits": classifier._replace(encoder=own).logits(images)}
    differences = {"same_size": checking.compare(found, wanted)}
    checking.check(differences, kind)
    facts += [f"Compared in {library}: the largest relative difference is {differences['same_size']:.1e}"]
    return [*facts, *_in_float32(encoder)], made.call, {"differences": differences, "compared": library}


def _write_beside(subject: Subject, kind: str, folder: Path, facts: Sequence[str], use: str, workdir: str) -> None:
    """README.md and labels.txt."""
    if classes := subject.about.get("classes"):
        files.write_bytes(folder / "labels.txt", ("\n".join(classes) + "\n").encode())
    run = RunFolder(Path(workdir).parent if subject.classifier else workdir)
    evaluations, images = list[Any](), 0
    if subject.config is not None and run.config.is_file():
        evaluations = [each for each in read_run(run).evaluations if each.get("mean")]
        images = run.read_environment().get("data", {}).get("images", 0)
    text = card.card(kind, subject.about, facts, use, subject.config, images, evaluations)
    files.write_bytes(folder / "README.md", text.encode())
