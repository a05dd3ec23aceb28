"""Ours beside what the paper printed."""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ctxlib.figures.strokes import draw_bars
from ctxlib.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALETTE,
    RED,
    drawable,
    finish,
    footnote,
    new_figure,
    patches,
    styled,
)

_VERDICTS = {"yes": (GREEN, "o"), "no": (RED, "X"), "open": ("#E69F00", "D"), "no interval": ("#5A5A5A", "s")}


@styled
def recall_errors(
    frame: pd.DataFrame, *, title: str | None = "Recall error of the needle", subtitle: str | None = None
) -> Figure:
    """The paper's Figure 2 beside ours: bars of (side, model, condition, value, ci_low, ci_high, n), a panel a side.

    The first three values of `condition` are green, red and blue: pretrained, instruct with template, instruct without.
    """
    colours = dict(zip(frame["condition"].unique(), (GREEN, RED, BLUE, *PALETTE[3:]), strict=False))
    parts = dict(list(frame.groupby("side", sort=False)))
    models = [max(2.4, part["model"].nunique()) for part in parts.values()]
    ratios = {"width_ratios": models}
    fig, axes = new_figure(1, len(parts), max(6.4, 1.6 + 0.85 * sum(models)), 3.5, gridspec_kw=ratios)
    for ax, (side, part) in zip(axes[0], parts.items(), strict=True):
        draw_bars(ax, part, "model", "condition", colours, None)
        top = np.nanmax([part["value"].max(), part["ci_high"].max(), 0.02])
        ax.set(title=str(side), ylabel="needle recall error (fraction)", ylim=(0, min(1.0, 1.08 * top)))
        ax.set_xlabel("model (of Table 7)" if side == "paper" else "experiment (kind of needle)")
    note = "whiskers: paper ± 1 sd over four prompts (none: one prompt), ours 95 % interval · scales differ"
    note = f"{note} · {footnote(None, frame, 'needles')}"
    return finish(fig, title, subtitle, note, patches(colours))


@styled
def pairs_beside(
    frame: pd.DataFrame,
    *,
    title: str | None = "Before and after, the paper's and ours",
    subtitle: str | None = None,
) -> Figure:
    """Table 3 as dumbbells: (panel, row, side, condition, value, ci_low, ci_high, n), the two conditions joined.

    Rows with `side` "paper" are grey, others coloured with their intervals; hollow is the first condition, filled the
    second. Panels share the rows, not the scale.
    """
    panels, rows = list(frame["panel"].unique()), list(frame["row"].unique())
    before = frame["condition"].unique()[0]
    fig, axes = new_figure(1, len(panels), 3.0 + 2.1 * len(panels), 0.9 + 0.24 * len(rows), sharey=True)
    for ax, panel in zip(axes[0], panels, strict=True):
        for row, in_row in frame[frame["panel"] == panel].groupby("row", sort=False):
            for step, (side, pair) in enumerate(in_row.groupby("side", sort=False)):
                colour, place = (GREY if side == "paper" else BLUE), rows.index(row) + 0.22 * step
                ax.plot(pair["value"], [place] * len(pair), color=colour, lw=1.6, zorder=2)
                for point in pair.itertuples():
                    ax.plot([point.ci_low, point.ci_high], [place] * 2, color=colour, lw=4, alpha=0.3, zorder=1)
                    face = "white" if point.condition == before else colour
                    ax.plot(point.value, place, "o", color=colour, mfc=face, mec=colour, ms=5.5, zorder=3)
        rated = frame.loc[frame["panel"] == panel, "value"].max() > 1
        ax.set(title=drawable(str(panel)), ylim=(len(rows) - 0.4, -0.6))
        ax.set_xlabel("mean rating (1 to 10)" if rated else "right answers (fraction)")
        ax.margins(x=0.08)
        ax.set_yticks(range(len(rows)), rows)
        ax.tick_params(axis="y", length=0)
        ax.grid()
        ax.label_outer()
    legend = [
        Line2D([], [], ls="", marker="o", mfc=INK if name != before else "white", mec=INK, ms=5.5, label=str(name))
        for name in frame["condition"].unique()
    ]
    sides = {"paper": GREY, "ours, with its 95 % interval": BLUE}
    legend += [Line2D([], [], color=colour, lw=1.6, label=side) for side, colour in sides.items()]
    note = (
        f"scales differ · ours: {footnote(None, frame.dropna(subset='n'), 'questions')}" if frame["n"].any() else None
    )
    return finish(fig, title, subtitle, note, legend)


@styled
def directions_forest(
    frame: pd.DataFrame,
    *,
    paper: pd.DataFrame | None = None,
    title: str | None = "Do our changes have the paper's direction?",
    subtitle: str | None = None,
) -> Figure:
    """The frame of `comparison.directions` as points with intervals, coloured by what they say about the claim.

    Claims that were not measured have an empty row; `paper` (key, value) as grey ticks: the paper's own changes.
    """
    names = [_claim(row) for row in frame.itertuples()]
    height = 0.5 + sum(0.3 + 0.15 * name.count("\n") for name in names)
    fig, axes = new_figure(1, 1, 10.5, max(2.2, height))
    ax = axes[0, 0]
    for place, row in enumerate(frame.itertuples()):
        theirs = [] if paper is None else paper.loc[paper["key"] == row.key, "value"]
        ax.plot(theirs, [place + 0.24] * len(theirs), "|", color=GREY, ms=7, mew=1.2, zorder=2)
        words = "not measured"
        if row.agrees in _VERDICTS:
            colour, marker = _VERDICTS[row.agrees]
            ax.plot([row.ci_low, row.ci_high], [place, place], color=colour, lw=2.4, solid_capstyle="round", zorder=3)
            ax.plot(row.value, place, marker, color=colour, ms=7.5, mec="white", mew=0.9, zorder=4)
            reach = "" if pd.isna(row.ci_low) else f" [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
            words = f"{row.value:+.3f}{reach}  n = {row.n:,.0f}"
        ax.annotate(
            words, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, annotation_clip=False
        )
    ax.axvline(0, color=INK, lw=0.9, zorder=1)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6), xlabel="change (fraction)")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    says = {
        "yes": "as the paper says",
        "no": "opposite",
        "open": "open: interval holds zero",
        "no interval": "no interval",
    }
    legend = [
        Line2D([], [], color=_VERDICTS[name][0], marker=_VERDICTS[name][1], mec="white", ms=7.5, label=text)
        for name, text in says.items()
        if name in set(frame["agrees"])
    ]
    if paper is not None:
        legend.append(Line2D([], [], color=GREY, marker="|", ls="", ms=7, mew=1.2, label="the paper's own changes"))
    return finish(fig, title, subtitle, "lines: 95 % interval", legend)


def _claim(row: Any) -> str:
    whose = "" if row.agrees not in _VERDICTS else f" · {row.experiment}, {row.measured}"
    return "\n".join(textwrap.wrap(f"{row.claim} ({row.paper_says}; paper: {row.paper}){whose}", 66))
