"""The figures of the audits: what transforms do to lesions, and what an encoder ignores."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.audit import ladder
from ssl_jax.plotting import BASELINE, COLORS, GAIN, legend_below, limits, panels, plain, save

PANEL = (2.7, 2.3)  # inches
MAX_CLASSES = 5  # classes with a line of their own: those that lose most


def lesion_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A panel per transform: by strength, the share of views that lose the lesion and of pairs that disagree (dashed).

    rows: of `audit.lesions.audit`. All lesions together are black, and the classes that lose most are in colour. A ring
    marks the strengths of the config.
    """
    rows = [row for row in rows if row["transform"] != "config"]
    names = list(dict.fromkeys(row["transform"] for row in rows))
    lost: dict[str, float] = {}
    for row in rows:
        lost[row["class"]] = lost.get(row["class"], 0) + row["lost"]
    del lost["all"]
    classes = sorted(lost, key=lambda name: -lost[name])[:MAX_CLASSES] if len(lost) > 1 else []
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    width, height = PANEL[0] * columns, PANEL[1] * lines + 0.9
    with panels(columns, lines, width=width, height=height, share_y=True) as (figure, all_axes):
        for axes, name in zip(all_axes, names, strict=False):
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
        all_axes[0].set_ylim(limits([0, *(100 * r[k] for r in rows for k in ("lost", "disagree"))], GAIN, top=100))
        for axes in all_axes[len(names) :]:
            axes.axis("off")
        figure.supylabel("% of views that keep less than half", fontsize=10)
        figure.suptitle(textwrap.fill(plain(title), 30 * columns), x=0.01, ha="left", fontsize=11)
        legend_below(figure, all_axes)
        save(figure, path)


def _mark(axes, rows: Sequence[Mapping[str, Any]]) -> None:
    at = [i for i, row in enumerate(rows) if row["configured"]]
    style = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "", "marker": "o"}
    axes.plot(at, [100 * rows[i]["lost"] for i in at], label="in the config" if at else None, **style)


def profile(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A line per transform: how far it moves the embedding (the least on top), and how well it can be read from it.

    rows: of `audit.invariance.audit`. Dots go from weak (light) to strong (dark).
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["transform"], []).append(row)
    order = sorted(by_name, key=lambda name: by_name[name][-1]["moved"], reverse=True)  # matplotlib's y grows upwards
    place = np.arange(len(order))
    height = 1.5 + 0.36 * len(order)
    with panels(2, width=8.6, height=height, share_y=True, width_ratios=(2, 1)) as (figure, (left, right)):
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
        left.set_xlabel("how far the embedding moves (1: as far as to another image)")
        left.set_title("ignored  ←  → felt", pad=14)
        right.barh(place, [by_name[name][0]["readable"] for name in order], color=COLORS[1], height=0.55)
        right.set_xlim(0, 1)
        right.set_xlabel("how well it can be predicted (1: exactly)")
        right.set_title("still in the embedding", pad=14)
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)
        save(figure, path)


def _range(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) == 1:
        return name
    return f"{name} {rows[0]['strength']:g} … {rows[-1]['strength']:g}"
