"""The course of a fine-tuning."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ctxlib.figures.strokes import log_ticks
from ctxlib.figures.style import colours_of, finish, handles, new_figure, spaced, styled


@styled
def loss_curves(
    log: pd.DataFrame,
    *,
    x: str = "step",
    y: str = "loss",
    hue: str = "run",
    smooth: int = 1,
    logarithmic: bool = False,
    ylabel: str = "loss (nats per supervised token)",
) -> Figure:
    """Loss over steps of (step, loss, run); with `smooth` > 1 a centred running mean over so many rows in front."""
    colours = colours_of(log[hue].unique(), None)
    fig, axes = new_figure(1, 1, 7.2, 3.6)
    ax = axes[0, 0]
    for name, colour in colours.items():
        part = log[log[hue] == name].dropna(subset=[y]).sort_values(x)
        marker = "o" if len(part) <= 40 else None
        thin = {"lw": 0.8, "alpha": 0.3} if smooth > 1 else {"lw": 1.6, "marker": marker, "ms": 3.5}
        ax.plot(part[x], part[y], color=colour, **thin)
        if smooth > 1:
            ax.plot(part[x], part[y].rolling(smooth, center=True, min_periods=1).mean(), color=colour)
    ax.set(xlabel=f"{spaced(x)} (optimiser steps)" if x == "step" else spaced(x), ylabel=ylabel)
    if logarithmic:
        log_ticks(ax.yaxis)
    else:
        ax.set_ylim(bottom=0)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y")
    note = f"n = {log.groupby(hue)[y].count().max():,} points a run" + (
        f" · line: mean of {smooth}" if smooth > 1 else ""
    )
    return finish(fig, note, handles(colours, None))
