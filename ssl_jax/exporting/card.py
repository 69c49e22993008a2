"""The model card that lies beside an exported network: README.md, as Hugging Face's hub reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.augment import preset_of, resolve_views
from ssl_jax.config import Config, View
from ssl_jax.report import words

LIBRARIES = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx"}
BY_HAND = "to be filled in"


def card(
    kind: str,
    about: Mapping[str, Any],
    facts: Sequence[str],
    use: str,
    config: Config | None,
    images: int,
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown. kind: the format; about: of the encoder or classifier; facts: sentences about the files; use: Python
    that runs them; config: of the run, if there is one; images: their number; evaluations: contents of evaluation/."""
    classes, model = about.get("classes", []), about["model"]
    what = f"classifier of {len(classes)} classes" if classes else "encoder"
    name = model.get("name") or "network"
    front = ["---", f"tags: [self-supervised-learning, {about.get('method') or 'scratch'}, ssl_jax]"]
    if kind in LIBRARIES:
        front.append(f"library_name: {LIBRARIES[kind]}")
    front += ["license: other  # fill in; it depends on the training images, too", "---"]
    parts = ["\n".join(front), f"# {name}, {what}", _list(facts), f"## Use\n\n```python\n{use}\n```"]
    parts += ["## Training", _list(_training(about, config, images))]
    parts += ["## Scores", _scores(about, evaluations)]
    if classes:
        parts += ["## Classes", _list(_classes(about))]
    parts += ["## Licence and limits", f"- Licence: {BY_HAND}\n- Intended use, and what it must not decide: {BY_HAND}"]
    return "\n\n".join(parts) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _training(about: Mapping[str, Any], config: Config | None, images: int) -> list[str]:
    lines = [f"Method: {about.get('method') or 'none'}", f"Step of the checkpoint: {about.get('step', '–')}"]
    if about.get("classes"):
        lines += [f"Fine-tuned on: {Path(str(about.get('data', '–'))).name}"]
    if config is None:
        return [*lines, f"Pretraining data and views: not known here; {BY_HAND}"]
    data, counted = config.data, f", {images:,} images" if images else ""
    place = Path(data.path).name if data.path else data.name
    lines += [f"Data of pretraining: {place}{counted}, at {about['size']} px"]
    lines += [f"Length: {config.train.duration}, {config.train.batch} images per step"]
    lines += [f"Views: preset {preset_of(config.augment.preset, about['size'])}"]
    first, *_ = resolve_views(config.augment, 2, about["size"])
    if changed := changes(first):
        lines += [
            f"Changed at random in every view: {'; '.join(changed)}. An encoder learns to ignore what its views change"
        ]
    return lines


def changes(view: View) -> list[str]:
    """What a view changes, in words."""
    low, high = view.crop_scale
    jitter = view.jitter_prob > 0
    told = {
        f"place and scale (crops of {low:.0%} to {high:.0%} of the area)": (low, high) != (1, 1),
        "left and right": view.flip > 0,
        f"rotation by up to {view.rotate:g} degrees": view.rotate > 0,
        f"position, by up to {view.translate:.0%} of the side": view.translate > 0,
        "perspective": view.perspective > 0 and view.perspective_prob > 0,
        f"shear by up to {view.shear:g} degrees": view.shear > 0,
        f"size, by factors of {view.zoom[0]:g} to {view.zoom[1]:g}": tuple(view.zoom) != (1, 1),
        "brightness": jitter and view.brightness > 0,
        "contrast": jitter and view.contrast > 0,
        "saturation": jitter and view.saturation > 0,
        "hue": jitter and view.hue > 0,
        "whether there is colour at all": view.gray > 0,
        "sharpness": view.blur > 0,
        "bright parts inverted": view.solarize > 0,
        "colours, sharpness and place (RandAugment)": view.randaugment > 0,
        "a part, which is replaced by noise": view.erase > 0,
    }
    return [text for text, applies in told.items() if applies]


def _scores(about: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if test := about.get("test"):
        intervals = test.get("interval", {})
        lines = []
        for name in ("top1", "balanced_accuracy", "macro_auc", "brier", "ece"):
            if isinstance(test.get(name), float):
                span = intervals.get(name)
                between = f" (95 % interval {span[0]:.4f} to {span[1]:.4f})" if isinstance(span, list | tuple) else ""
                lines.append(f"{words.title(name)}: {test[name]:.4f}{between}")
        parts.append(f"On {Path(str(about.get('test_data') or 'test data')).name}:\n\n{_list(lines)}")
    if evaluations:
        head = "| protocol | labels | draws | tested on | metric | mean ± half of the 95 % interval |"
        rows = [head, "|---|---|---|---|---|---|"]
        for e in evaluations:
            metric, half = e["metric"], e["interval"].get(e["metric"])
            mean = f"{e['mean'][metric]:.4f}" + ("" if half is None else f" ± {half:.4f}")
            cells = e["protocol"], e["labels"], e["seeds"], e["test"], words.title(metric), mean
            rows.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("Of the encoder:\n\n" + "\n".join(rows))
    return "\n\n".join(parts) or f"None known here: {BY_HAND}"


def _classes(about: Mapping[str, Any]) -> list[str]:
    thresholds = about.get("thresholds") or {}
    chosen = {name: each.get("threshold") for name, each in thresholds.items()}
    return [name + (f": present from {chosen[name]:.4f} on" if chosen.get(name) else "") for name in about["classes"]]
