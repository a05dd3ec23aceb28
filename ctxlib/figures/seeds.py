"""Many runs: curves of means over seeds, with every single run as a dot."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from ctxlib.figures.strokes import draw_lines, log_ticks
from ctxlib.figures.style import GREY, colours_of, finish, footnote, handles, new_figure, spaced, styled


@styled
def curves_over_seeds(
    frame: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    x: str,
    hue: str = "condition",
    panel: str | None = None,
    xlabel: str | None = None,
    ylabel: str = "score (fraction)",
    ylim: tuple[int | float, int | float] | None = (-0.02, 1.02),
    log: str = "",
    colours: Mapping[str, str] | None = None,
    subtitle: str | None = None,
) -> Figure:
    """Lines with bands of (x, hue, value, ci_low, ci_high, n) and the single `runs` (x, hue, value) as dots.

    With `panel` one panel for each of its values. `log` names the axes with a logarithmic scale: "x" or "xy"; y stays
    linear if no value is positive. `ylim` None: as far as the data of all panels go.
    """
    colours = colours_of(frame[hue].unique(), colours)
    names = list(frame[panel].unique()) if panel else [None]
    fig, axes = new_figure(1, len(names), max(6.6, 3.6 * len(names)), 3.4, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        part, dots = (one if name is None else one[one[panel] == name] for one in (frame, runs))
        draw_lines(ax, part, x, hue, colours)
        for label, colour in colours.items():
            mine = dots[dots[hue] == label]
            ax.plot(mine[x], mine["value"], ".", color=colour, ms=4, alpha=0.45, zorder=1)
        if "x" in log:
            log_ticks(ax.xaxis, frame[x].to_numpy())
        if "y" in log and (part["value"] > 0).any():
            ax.set_yscale("log")
        ax.set(xlabel=xlabel or spaced(x), title="" if name is None else str(name))
        if ylim:
            ax.set_ylim(ylim)
        ax.axhline(0, color=GREY, lw=0.8, zorder=0)
        ax.grid(axis="y")
    axes[0, 0].set_ylabel(ylabel)
    note = footnote("bands", frame, "seeds a point") + " · dots: single runs"
    return finish(fig, note, handles(colours, None), subtitle=subtitle)
