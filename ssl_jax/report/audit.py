"""The figures of the audits: what transforms do to lesions, and the profile of an encoder."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.audit import ladder
from ssl_jax.report.figures import BASELINE, COLORS, STYLE, _save

PANEL = (2.7, 2.3)  # inches
MAX_CLASSES = 5  # that have a line of their own: those that suffer most


def lesion_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A panel a transform: share of views without the lesion over its strength, and of pairs that disagree (dashed).

    rows: of `audit.lesions.audit`. All lesions in black, the classes that suffer most in colour, a ring around the
    strengths that the config has.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["transform"] != "config"]
    names = list(dict.fromkeys(row["transform"] for row in rows))
    suffering: dict[str, float] = {}
    for row in rows:
        suffering[row["class"]] = suffering.get(row["class"], 0) + row["lost"]
    del suffering["all"]
    classes = sorted(suffering, key=lambda c: -suffering[c])[:MAX_CLASSES] if len(suffering) > 1 else []
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + 0.9), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, name in zip(panels, names, strict=False):
            for number, kind in enumerate(["all", *classes]):
                mine = [row for row in rows if (row["transform"], row["class"]) == (name, kind)]
                color = "black" if kind == "all" else COLORS[number - 1]
                x = range(len(mine))
                axes.plot(x, [100 * r["lost"] for r in mine], "o-", color=color, label=kind, markersize=3.5)
                if kind == "all":
                    _mark(axes, mine)
                    style = {"color": BASELINE, "label": "pair disagrees (all)"}
                    axes.plot(x, [100 * r["disagree"] for r in mine], "--", **style)
                    axes.set_xticks(x, [f"{r['strength']:g}" for r in mine])
            axes.set_title(f"{name} ({'area' if ladder.TRANSFORMS[name].moves else 'contrast'})")
            axes.set_xlabel(ladder.TRANSFORMS[name].unit or ladder.TRANSFORMS[name].key, fontsize=9)
        panels[0].set_ylim(-4, 1.08 * max(10, *(100 * r[k] for r in rows for k in ("lost", "disagree"))))
        for axes in panels[len(names) :]:
            axes.axis("off")
        figure.supylabel("% of views that keep less than half", fontsize=10)
        figure.suptitle(textwrap.fill(title, 30 * columns), x=0.01, ha="left", fontsize=11)
        entries: dict[str, Any] = {}  # a ring is in some panels only
        for axes in panels[: len(names)]:
            entries |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        legend = {"ncols": min(5, len(entries)), "frameon": False}
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", **legend)
        _save(figure, path)


def _mark(axes, rows: Sequence[Mapping[str, Any]]) -> None:
    at = [i for i, row in enumerate(rows) if row["configured"]]
    style = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "", "marker": "o"}
    axes.plot(at, [100 * rows[i]["lost"] for i in at], label="in the config" if at else None, **style)


def profile(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A line a transform, the least moving on top: how far it moves the embedding, and how well it can be read.

    rows: of `audit.invariance.audit`. Dots go from weak (light) to strong (dark).
    """
    import matplotlib
    from matplotlib.figure import Figure

    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["transform"], []).append(row)
    order = sorted(by_name, key=lambda name: by_name[name][-1]["moved"], reverse=True)  # matplotlib's y grows upwards
    place = np.arange(len(order))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.5 + 0.36 * len(order)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        for y, name in zip(place, order, strict=True):
            mine = by_name[name]
            shades = np.linspace(0.25, 1, len(mine)) if len(mine) > 1 else [1.0]
            moved = [row["moved"] for row in mine]
            left.plot([min(0, *moved), max(moved)], [y, y], color="#d1d5db", linewidth=1.2, zorder=1)
            for row, shade in zip(mine, shades, strict=True):
                left.errorbar(row["moved"], y, xerr=row["half"], fmt="o", color=COLORS[0], alpha=shade, markersize=6)
        left.axvline(1, color=BASELINE, linewidth=1.2)
        left.text(1.02, len(order) - 0.5, "another image", color=BASELINE, fontsize=8, va="center")
        left.set_yticks(place, [_range(name, by_name[name]) for name in order])
        left.set_xlabel("how far the embedding moves (1: to another image)")
        left.set_title("ignored  ←  → felt", pad=14)
        right.barh(place, [by_name[name][0]["readable"] for name in order], color=COLORS[1], height=0.55)
        right.set_xlim(0, 1)
        right.set_xlabel("how well it can be read (1: exactly)")
        right.set_title("still in the embedding", pad=14)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        _save(figure, path)


def _range(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) == 1:
        return name
    return f"{name} {rows[0]['strength']:g} … {rows[-1]['strength']:g}"
