"""The figures of a study: score against label count, and who gains."""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.files import write_bytes

METRIC_NAMES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_auc": "Macro ROC AUC",
    "macro_ap": "Macro average precision",
    "brier": "Brier score",
    "recall": "recall",
    "auc": "ROC AUC",
}
BASELINE = "#6b7280"
# Okabe and Ito's palette, which colour-blind readers can tell apart; the baseline is gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "savefig.dpi": 150,
}


def curve(rows: Sequence[Mapping[str, Any]], path: Path, *, baseline: str, metric: str, of: str = "") -> None:
    """Score against label count (left) and paired difference to the baseline (right), with 95 % bands.

    rows: of `tables.summarise`. of: before each title, as "Phantoms: ". Without an arm to compare, the left part alone.
    """
    rows = [row for row in rows if row["metric"] == metric]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    color, others = _colors(arms, baseline), [a for a in arms if a != baseline]
    counts = sorted({row["labels"] for row in rows})
    with _figure(2 if others else 1, width=4.6, height=3.7) as (figure, axes):
        left = axes[0]
        for arm in arms:
            _band(left, [r for r in rows if r["arm"] == arm], "mean", "half", arm, color[arm])
        left.set_ylabel(f"{METRIC_NAMES[metric]}, %")
        left.set_title(f"{of}Test score")
        left.legend(frameon=False, loc="lower right")
        if others:
            right = axes[1]
            right.axhline(0, color=BASELINE, linewidth=1.2)
            for arm in others:
                mine = [r for r in rows if r["arm"] == arm and r["difference"] is not None]
                _band(right, mine, "difference", "difference_half", arm, color[arm])
            right.set_ylabel(f"difference to {baseline}, points")
            right.set_title(f"{of}Paired difference, same labels")
            low, high = right.get_ylim()
            right.set_ylim(min(low, -0.05 * (high - low)), max(high, 0.05 * (high - low)))
        for ax in axes:
            ax.set_xscale("log")
            ax.set_xticks(counts, [f"{n:,}" for n in counts])
            ax.minorticks_off()
            ax.set_xlabel("labelled images")
        _save(figure, path)


def gain_by_class(
    gains: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    baseline: str,
    metric: str,
    share: Mapping[str, float],
    of: str = "",
) -> None:
    """Each class's gain over the baseline, one panel a label count, with 95 % intervals.

    gains: of `tables.class_gains`. share: of each class among the training images. of: before the title. Up to 30
    classes have a line each: the most frequent on top, with a panel of their shares, or, where all are about equally
    frequent, the one that gains most with the fewest labels. More classes are dots over their share. Nothing to show:
    no file.
    """
    if not gains:
        return
    arms, counts = list(dict.fromkeys(g["arm"] for g in gains)), sorted({g["labels"] for g in gains})
    color, classes = _colors([baseline, *arms], baseline), list(dict.fromkeys(g["class"] for g in gains))
    lines, uneven = len(classes) <= 30, _uneven([share[c] for c in classes])
    first = {c: np.mean([g["gain"] for g in gains if (g["labels"], g["class"]) == (counts[0], c)]) for c in classes}
    order = sorted(classes, key=lambda c: share[c] if uneven else first[c])
    shares = lines and uneven
    height, width = 1.5 + 0.3 * len(classes) if lines else 3.8, 2.4 if lines else 3.0
    with _figure(len(counts) + shares, width=width, height=height, share="row") as (figure, panels):
        axes = panels[shares:]
        for ax in axes[1:]:
            ax.sharex(axes[0])
        if shares:
            _shares(panels[0], [100 * share[c] for c in order])
        for ax, count in zip(axes, counts, strict=True):
            (ax.axvline if lines else ax.axhline)(0, color=BASELINE, linewidth=1.2)
            for i, arm in enumerate(arms):
                mine = {g["class"]: g for g in gains if (g["arm"], g["labels"]) == (arm, count)}
                names = [c for c in order if c in mine]
                value = np.array([100 * mine[c]["gain"] for c in names])
                half = np.array([0 if math.isnan(h) else 100 * h for h in (mine[c]["half"] for c in names)])
                shift = (i - (len(arms) - 1) / 2) * 0.6 / len(arms)  # beside each other, so that none hides another
                style: dict[str, Any] = {"fmt": "o", "color": color[arm], "markersize": 4.5, "elinewidth": 1.4}
                if lines:
                    ax.errorbar(value, [order.index(c) - shift for c in names], xerr=half, label=arm, **style)
                else:
                    ax.errorbar([100 * share[c] * 1.1**shift for c in names], value, yerr=half, label=arm, **style)
            ax.set_title(f"{count:,} labels")
            if not lines:
                ax.set_xscale("log")
        if lines:
            panels[0].set_yticks(range(len(order)), order)
        what = f"gain in {METRIC_NAMES[metric]} over {baseline}, points"
        figure.supxlabel(what if lines else "share of the training images, %", fontsize=10)
        figure.supylabel("" if lines else what, fontsize=10)
        title = f"{arms[0]} against {baseline}" if len(arms) == 1 else "Gain by class"
        figure.suptitle(f"{of}{title}", x=0.01, ha="left", fontsize=11)
        if len(arms) > 1:
            figure.legend(
                *axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(arms), frameon=False
            )
        _save(figure, path)


def _shares(ax, percent: Sequence[float]) -> None:
    ax.barh(range(len(percent)), percent, color=BASELINE, alpha=0.55, height=0.6)
    ax.set_title("training images, %")


def _uneven(counts: Sequence[float]) -> bool:
    return max(counts) > 1.5 * min(counts)


def _band(ax, rows, mean, half, label, color):
    x = [row["labels"] for row in rows]
    y = np.array([100 * row[mean] for row in rows])
    spread = np.array([100 * (row[half] or 0) for row in rows])
    ax.plot(x, y, "o-", color=color, label=label, linewidth=1.8, markersize=4.5)
    ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.16, linewidth=0)


def _colors(arms: Sequence[str], baseline: str) -> dict[str, str]:
    others = [a for a in arms if a != baseline]
    return {baseline: BASELINE} | {a: COLORS[i % len(COLORS)] for i, a in enumerate(others)}


@contextlib.contextmanager
def _figure(columns: int, *, width: float, height: float, share: Any = False) -> Iterator[tuple[Any, Any]]:
    """(figure, array of its axes side by side) in our style: without a window, and without any state left behind."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        yield figure, figure.subplots(1, columns, squeeze=False, sharey=share)[0]


def scaling(plans: Sequence[Any], path: Path) -> None:
    """Predicted images/s against chips, a line for each kind of chip, beside what perfect scaling would give."""
    kinds = list(dict.fromkeys(one.version for one in plans))
    with _figure(1, width=5, height=3.7) as (figure, axes):
        for kind, color in zip(kinds, COLORS):
            of = sorted((p for p in plans if p.version == kind), key=lambda p: p.chips)
            chips = np.array([p.chips for p in of])
            axes[0].loglog(chips, [p.images_per_s for p in of], "o-", color=color, label=kind, base=2)
            axes[0].loglog(chips, of[0].images_per_s * chips / chips[0], ":", color=color, linewidth=1, base=2)
        axes[0].set(xlabel="chips", ylabel="images/s", title="Prediction, not a run; dotted: perfect scaling")
        axes[0].legend(frameon=False)
        _save(figure, path)


def _save(figure, path: Path) -> None:
    packed = io.BytesIO()
    figure.savefig(packed, format="png")
    write_bytes(path, packed.getvalue())


def reliability(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "Reliability") -> None:
    """Share of positives against the probability that was given, and how many predictions each point stands for.

    rows: of `evaluate.reliability`. Without any: no file.
    """
    if not rows:
        return
    with _figure(2, width=3.7, height=3.5) as (figure, (left, right)):
        left.plot([0, 1], [0, 1], color=BASELINE, linewidth=1.2, label="perfect")
        left.plot([r["predicted"] for r in rows], [r["observed"] for r in rows], "o-", color=COLORS[0], markersize=4.5)
        left.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="predicted probability", ylabel="share of positives")
        left.set_title(title)
        left.legend(frameon=False, loc="upper left")
        right.bar(
            [r["low"] for r in rows],
            [r["count"] for r in rows],
            width=[r["high"] - r["low"] for r in rows],
            align="edge",
            color=COLORS[0],
            alpha=0.6,
        )
        right.set(xlim=(0, 1.02), yscale="log", ylim=(0.5, None), xlabel="predicted probability", ylabel="predictions")
        right.set_title("How often each is given")
        _save(figure, path)
