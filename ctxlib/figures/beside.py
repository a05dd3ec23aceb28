"""Our values next to the paper's."""

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


@styled
def recall_errors(frame: pd.DataFrame) -> Figure:
    """The paper's Figure 2 and ours: bars of (side, model, condition, value, ci_low, ci_high, n), one panel per side.

    The first three values of `condition` are green, red and blue: pretrained, instruct with template, instruct without.
    """
    colours = dict(zip(frame["condition"].unique(), (GREEN, RED, BLUE, *PALETTE[3:]), strict=False))
    parts = dict(list(frame.groupby("side", sort=False)))
    models = [max(2.4, part["model"].nunique()) for part in parts.values()]
    ratios = {"width_ratios": models}
    fig, axes = new_figure(1, len(parts), max(6.4, 1.6 + 0.85 * sum(models)), 3.5, gridspec_kw=ratios)
    for ax, (side, part) in zip(axes[0], parts.items(), strict=True):
        draw_bars(ax, part, "model", "condition", colours)
        top = np.nanmax([part["value"].max(), part["ci_high"].max(), 0.02])
        ax.set(title=str(side), ylabel="needle recall error (fraction)", ylim=(0, min(1.0, 1.08 * top)))
        ax.set_xlabel("model (of Table 7)" if side == "paper" else "experiment (kind of needle)")
    note = "whiskers: paper ± 1 sd over four prompts (none: one prompt), ours 95 % interval · scales differ"
    note = f"{note} · {footnote(None, frame, 'needles')}"
    return finish(fig, note, patches(colours))


@styled
def pairs_beside(
    frame: pd.DataFrame,
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
        f"scales differ · ours: {footnote(None, frame.dropna(subset='n'), 'questions or seeds')}"
        if frame["n"].any()
        else None
    )
    return finish(fig, note, legend)
