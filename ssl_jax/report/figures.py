"""The figures of a study: score by label count, and who gains."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.evaluate.references import PIXELS, RANDOM
from ssl_jax.plotting import BASELINE, COLORS, GAIN, SCORE, legend_below, limits, panels, plain, save
from ssl_jax.report.words import SCORES

MAX_ROWS = 30  # classes up to which each has a row of its own


def curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    baseline: str,
    metric: str,
    prefix: str = "",
    references: Sequence[Mapping[str, Any]] = (),
    shared: bool = True,
) -> None:
    """Score by label count (left) and paired difference to the baseline (right), with 95 % bands.

    rows: of `tables.summarise`. prefix: of each title, such as "Phantoms: ". If the baseline is the only arm, the right
    panel is left out. references: such rows of the references, of which raw pixels and random encoder get a thin line
    through the better of linear and kNN. shared: whether all arms had the same labels.
    """
    rows = [row for row in rows if row["metric"] == metric]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    colors, others = _colors(arms, baseline), [arm for arm in arms if arm != baseline]
    counts = sorted({row["labels"] for row in rows})
    columns = 2 if others else 1
    name = SCORES[metric].title
    with panels(columns, width=4.6 * columns, height=4.0) as (figure, axes):
        left = axes[0]
        shown = [_band(left, rows, arm, "mean", "half", colors[arm]) for arm in arms]
        for reference, style in ((PIXELS, "--"), (RANDOM, ":")):
            best = _best([r for r in references if r["metric"] == metric and r["arm"].startswith(reference)])
            if best:
                left.plot(*zip(*best.items(), strict=True), style, color=BASELINE, label=reference, linewidth=1.2)
                shown.append(np.array([*best.values()]))
        left.set_ylim(limits(np.concatenate(shown), SCORE, top=100))
        left.set_ylabel(f"{name}, %")
        left.set_title(f"{prefix}Test score")
        if others:
            right = axes[1]
            right.axhline(0, color=BASELINE, linewidth=1.2)
            paired = [row for row in rows if row["difference"] is not None]
            shown = [_band(right, paired, arm, "difference", "difference_half", colors[arm]) for arm in others]
            right.set_ylim(limits([0, *np.concatenate(shown)], GAIN))
            right.set_ylabel(textwrap.fill(f"{name}: points above {plain(baseline)}", 44))
            right.set_title(f"{prefix}Paired difference, {'same' if shared else 'as many'} labels")
        for ax in axes:
            ax.set_xscale("log")
            ax.set_xticks(counts, [f"{n:,}" for n in counts])
            ax.minorticks_off()
            ax.set_xlabel("labelled images")
        legend_below(figure, axes)
        save(figure, path)


def gain_by_class(
    gains: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    baseline: str,
    metric: str,
    share: Mapping[str, float],
    prefix: str = "",
) -> None:
    """Each class's gain over the baseline, one panel per label count, with 95 % intervals.

    gains: of `tables.class_gains`; without any, no file is written. share: of each class among the training images.
    prefix: of the title. Up to MAX_ROWS classes have a row each; more become dots over their share.
    """
    if not gains:
        return
    arms = list(dict.fromkeys(gain["arm"] for gain in gains))
    colors = _colors([baseline, *arms], baseline)
    of = f" of {arms[0]}" if len(arms) == 1 else ""
    title = f"{prefix}Gain{of} in {SCORES[metric].title} over {baseline}, by class"
    plot = _gain_rows if len({gain["class"] for gain in gains}) <= MAX_ROWS else _gain_dots
    plot(gains, path, arms, colors, share, title)


def _gain_rows(gains, path, arms, colors, share, title) -> None:
    """A row per class. If some classes are much rarer, the most frequent is on top and a first panel shows the shares;
    otherwise the class that gains most with the fewest labels is on top."""
    classes, counts = list(dict.fromkeys(gain["class"] for gain in gains)), _label_counts(gains)
    shares = [share[name] for name in classes]
    uneven = max(shares) > 1.5 * min(shares)
    rank = share if uneven else _mean_gain(gains, counts[0])
    classes.sort(key=lambda name: rank[name])  # matplotlib's y grows upwards
    columns = len(counts) + uneven
    height = 1.5 + 0.3 * len(classes)
    with panels(columns, width=max(4.6, 2.4 * columns), height=height, share_y="row") as (figure, axes):
        if uneven:
            percent = [100 * share[name] for name in classes]
            axes[0].barh(range(len(classes)), percent, color=BASELINE, alpha=0.55, height=0.6)
            axes[0].set_title("training images, %")
        axes[0].set_yticks(range(len(classes)), [plain(name) for name in classes])
        gain_axes = axes[uneven:]
        for ax, count in zip(gain_axes, counts, strict=True):
            if ax is not gain_axes[0]:
                ax.sharex(gain_axes[0])
            ax.axvline(0, color=BASELINE, linewidth=1.2)
            ax.set_title(f"{count:,} labels")
            for arm, offset in zip(arms, _offsets(len(arms)), strict=True):
                names, values, halves = _points(gains, arm, count, classes)
                rows = [classes.index(name) - offset for name in names]
                ax.errorbar(values, rows, xerr=halves, label=arm, **_dots(colors[arm]))
            ax.set_xlabel("points")
        gain_axes[0].set_xlim(_gain_limits(gains))
        _finish(figure, gain_axes[0], arms, title, path)


def _gain_dots(gains, path, arms, colors, share, title) -> None:
    """A dot per class, over its share of the training images."""
    classes, counts = sorted({gain["class"] for gain in gains}, key=lambda name: share[name]), _label_counts(gains)
    with panels(len(counts), width=max(4.6, 3.0 * len(counts)), height=3.8, share_y="row") as (figure, axes):
        for ax, count in zip(axes, counts, strict=True):
            if ax is not axes[0]:
                ax.sharex(axes[0])
            ax.axhline(0, color=BASELINE, linewidth=1.2)
            ax.set_title(f"{count:,} labels")
            for arm, offset in zip(arms, _offsets(len(arms)), strict=True):
                names, values, halves = _points(gains, arm, count, classes)
                shares = [100 * share[name] * 1.1**offset for name in names]
                ax.errorbar(shares, values, yerr=halves, label=arm, **_dots(colors[arm]))
            ax.set_xscale("log")
            ax.set_xlabel("training images, %")
        axes[0].set_ylim(_gain_limits(gains))
        axes[0].set_ylabel("points")
        _finish(figure, axes[0], arms, title, path)


def _points(gains, arm: str, count: int, classes: Sequence[str]) -> tuple[list[str], list[float], list[float]]:
    """(classes, gains, half widths of their intervals) of an arm at a label count, in points; no interval: 0."""
    by_class = {gain["class"]: gain for gain in gains if (gain["arm"], gain["labels"]) == (arm, count)}
    names = [name for name in classes if name in by_class]
    halves = [by_class[name]["half"] for name in names]
    values = [100 * by_class[name]["gain"] for name in names]
    return names, values, [0 if math.isnan(half) else 100 * half for half in halves]


def _gain_limits(gains) -> tuple[float, float]:
    """Of the axis of all gains and their intervals, in points; with zero."""
    ends = [100 * (g["gain"] + sign * (0 if math.isnan(g["half"]) else g["half"])) for g in gains for sign in (-1, 1)]
    return limits([0, *ends], GAIN)


def _mean_gain(gains, count: int) -> dict[str, float]:
    """The gain of each class at a label count, the mean over arms."""
    names = dict.fromkeys(gain["class"] for gain in gains)
    at_count = [gain for gain in gains if gain["labels"] == count]
    return {name: float(np.mean([gain["gain"] for gain in at_count if gain["class"] == name])) for name in names}


def _offsets(arms: int) -> list[float]:
    """Where the dots of each arm go, side by side so that none hides another."""
    return [(i - (arms - 1) / 2) * 0.6 / arms for i in range(arms)]


def _dots(color: str) -> dict[str, Any]:
    return {"fmt": "o", "color": color, "markersize": 4.5, "elinewidth": 1.4}


def _finish(figure, ax, arms: Sequence[str], title: str, path: Path) -> None:
    figure.suptitle(textwrap.fill(plain(title), int(11 * figure.get_figwidth())), x=0.01, ha="left", fontsize=11)
    if len(arms) > 1:
        legend_below(figure, [ax])
    save(figure, path)


def _label_counts(gains) -> list[int]:
    return sorted({gain["labels"] for gain in gains})


def _band(ax, rows, arm: str, mean: str, half: str, color: str) -> np.ndarray:
    """Draws the line of an arm and the band around it; returns the ends of the band, in percent."""
    rows = [row for row in rows if row["arm"] == arm]
    x = [row["labels"] for row in rows]
    y = np.array([100 * row[mean] for row in rows])
    spread = np.array([100 * (row[half] or 0) for row in rows])
    ax.plot(x, y, "o-", color=color, label=arm, linewidth=1.8, markersize=4.5)
    ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.16, linewidth=0)
    return np.concatenate([y - spread, y + spread])


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Label count -> the largest mean, in percent."""
    return {
        n: max(100 * row["mean"] for row in rows if row["labels"] == n) for n in sorted({r["labels"] for r in rows})
    }


def _colors(arms: Sequence[str], baseline: str) -> dict[str, str]:
    others = [arm for arm in arms if arm != baseline]
    return {baseline: BASELINE} | {arm: COLORS[i % len(COLORS)] for i, arm in enumerate(others)}


def scaling(plans: Sequence[Any], path: Path) -> None:
    """Predicted images/s by number of chips, a line per kind of chip, beside perfect scaling (dotted)."""
    kinds = list(dict.fromkeys(one.version for one in plans))
    with panels(1, width=5, height=3.7) as (figure, (ax,)):
        for kind, color in zip(kinds, COLORS):
            mine = sorted((one for one in plans if one.version == kind), key=lambda one: one.chips)
            chips = np.array([one.chips for one in mine])
            ax.loglog(chips, [one.images_per_s for one in mine], "o-", color=color, label=kind, base=2)
            ax.loglog(chips, mine[0].images_per_s * chips / chips[0], ":", color=color, linewidth=1, base=2)
        ax.set(xlabel="chips", ylabel="images/s", title="Prediction, not a run; dotted: perfect scaling")
        legend_below(figure, [ax])
        save(figure, path)


def reliability(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "Reliability") -> None:
    """Share of positives by predicted probability, and how many predictions each point stands for.

    rows: of `evaluate.reliability`; without any, no file is written.
    """
    if not rows:
        return
    with panels(2, width=7.4, height=3.5) as (figure, (left, right)):
        left.plot([0, 1], [0, 1], color=BASELINE, linewidth=1.2, label="perfect")
        left.plot([r["predicted"] for r in rows], [r["observed"] for r in rows], "o-", color=COLORS[0], markersize=4.5)
        left.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="predicted probability", ylabel="share of positives")
        left.set_title(title)
        right.bar(
            [r["low"] for r in rows],
            [r["count"] for r in rows],
            width=[r["high"] - r["low"] for r in rows],
            align="edge",
            color=COLORS[0],
            alpha=0.6,
        )
        right.set(xlim=(0, 1.02), yscale="log", ylim=(0.5, None), xlabel="predicted probability", ylabel="predictions")
        right.set_title("How often each is predicted")
        legend_below(figure, [left])
        save(figure, path)
