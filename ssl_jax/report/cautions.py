"""What a table of scores hides: an arm that was trained too briefly, and an arm that what costs nothing also reaches.

A cell is a mapping with "arm", "labels", "seed", "scores" and, after fine-tuning, "loss" (`finetuning.loss_curve`). The
references (`evaluate.references`) are cells, too; their "arm" is the name of the reference.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.evaluate.finetuning import still_falling
from ssl_jax.evaluate.references import Margin, over_pixels

NO_GAIN = 0.005  # of the score: more labels that bring less have not helped
Cell = Mapping[str, Any]
Where = tuple[str, int]  # arm, label count


def undertrained(cells: Sequence[Cell], references: Sequence[Cell], metric: str) -> dict[Where, str]:
    """The arms, with label counts, that probably were trained too briefly, and what shows it.

    Either the training loss still falls at the end, or fewer labels do as well as more, although something else (an
    arm, or a reference) is better with more.
    """
    scores = _by_seed([*cells, *references], metric)
    found: dict[Where, str] = {}
    for arm, count in (where for where in scores if where[0] in {cell["arm"] for cell in cells}):
        curves = [c["loss"] for c in cells if (c["arm"], c["labels"]) == (arm, count) and c.get("loss")]
        if curves and (reason := still_falling(np.mean(curves, axis=0))):
            found[arm, count] = reason
        for fewer in sorted({n for a, n in scores if a == arm and 1.5 * n <= count}, reverse=True):
            low, high = float(np.mean(scores[arm, fewer])), float(np.mean(scores[arm, count]))
            others = {a for a, n in scores if a != arm and (a, fewer) in scores and (a, count) in scores}
            enough = [np.mean(scores[a, count]) - np.mean(scores[a, fewer]) > NO_GAIN for a in others]
            if high - low <= min(NO_GAIN, (1 - low) / 20) and any(enough):  # close to 1, little is left to gain
                found[arm, count] = f"it does no better than with {fewer:,} ({100 * high:.1f} against {100 * low:.1f})"
                break
    return found


def margins(cells: Sequence[Cell], references: Sequence[Cell], metric: str) -> dict[Where, Margin]:
    """How far each arm lies above raw pixels at each label count, over the draws of labels that both have."""
    drawn: dict[tuple[int, int], dict[str, float]] = {}
    for cell in references:
        if metric in cell["scores"]:
            drawn.setdefault((cell["labels"], cell["seed"]), {})[cell["arm"]] = cell["scores"][metric]
    pairs: dict[Where, list[tuple[float, dict[str, float]]]] = {}
    for cell in cells:
        if (at := (cell["labels"], cell["seed"])) in drawn:
            pairs.setdefault((cell["arm"], cell["labels"]), []).append((cell["scores"][metric], drawn[at]))
    return {where: over_pixels(*zip(*each, strict=True)) for where, each in pairs.items()}


def _by_seed(cells: Sequence[Cell], metric: str) -> dict[Where, list[float]]:
    scores: dict[Where, list[float]] = {}
    for cell in cells:
        if metric in cell["scores"]:
            scores.setdefault((cell["arm"], cell["labels"]), []).append(cell["scores"][metric])
    return scores


def sentences(short: Mapping[Where, str], above: Mapping[Where, Margin], scores: Mapping[Where, float]) -> list[str]:
    """`undertrained` and `margins` in words; scores: the mean of each arm at each label count."""
    told = [
        f"{arm} looks undertrained with {count:,} labels: {reason}. Give it more finetune.steps, or a higher rate."
        for (arm, count), reason in short.items()
    ]
    failing: dict[tuple[str, str], list[str]] = {}
    for (arm, count), margin in above.items():
        if margin.words.startswith("not"):
            spread = "" if np.isnan(margin.half) else f" ± {100 * margin.half:.1f}"
            score, gain = 100 * scores[arm, count], f"{100 * margin.difference:+.1f}{spread} points"
            text = f"with {count:,} labels {score:.1f} against {100 * margin.score:.1f} ({margin.name}), {gain}"
            failing.setdefault((arm, margin.words), []).append(text)
    return told + [f"{arm} is {words}: {'; '.join(texts)}." for (arm, words), texts in failing.items()]


def to_json(short: Mapping[Where, str], above: Mapping[Where, Margin], scores: Mapping[Where, float]) -> dict[str, Any]:
    """For other programs and the report: {"undertrained": [...], "not_above_pixels": [...]}, by arm and label count."""
    return {
        "undertrained": [{"arm": arm, "labels": n, "because": reason} for (arm, n), reason in short.items()],
        "not_above_pixels": [
            {"arm": arm, "labels": n, "score": scores[arm, n], "pixels": margin.score, "by": margin.name}
            for (arm, n), margin in above.items()
            if margin.difference <= 0
        ],
    }
