"""Many runs: curves and forests of means over seeds, with every single run beside them."""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from ctxlib.figures.strokes import apart, draw_lines
from ctxlib.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    RED,
    colours_of,
    finish,
    footnote,
    handles,
    in_words,
    new_figure,
    styled,
)


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
    title: str | None = None,
    subtitle: str | None = None,
) -> Figure:
    """Lines with bands of (x, hue, value, ci_low, ci_high, n) and the single `runs` (x, hue, value) as dots.

    With `panel` a column of axes for each of its values. `log` names the axes with a logarithmic scale: "x", "xy"; y
    stays linear where no value is positive. `ylim` None: as far as the data of all panels go.
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
            places = np.sort(frame[x].unique())
            ax.set_xscale("log")
            ax.set_xticks(apart(np.log10(places), places, 0.06))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(_in_short))
        if "y" in log and (part["value"] > 0).any():
            ax.set_yscale("log")
        ax.set(xlabel=xlabel or in_words(x), title="" if name is None else str(name))
        if ylim:
            ax.set_ylim(ylim)
        ax.axhline(0, color=GREY, lw=0.8, zorder=0)
        ax.grid(axis="y")
    axes[0, 0].set_ylabel(ylabel)
    note = footnote("bands", frame, "seeds a point") + " · dots: single runs"
    return finish(fig, title, subtitle, note, handles(colours, None))


def _in_short(value: float, _: int) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value / 1e3:.3g} k" if value >= 1e4 else f"{value:g}"


@styled
def forest_over_seeds(
    frame: pd.DataFrame, runs: pd.DataFrame, *, row: str, title: str | None = None, subtitle: str | None = None
) -> Figure:
    """Means over seeds (row, value, ci_low, ci_high, threshold, n) with their intervals, the single `runs` as dots.

    Green where the whole interval lies on the right side of the threshold, red where it lies on the wrong one, blue
    where it holds the threshold: then the runs do not decide. The right side is above.
    """
    names = ["\n".join(textwrap.wrap(str(name), 58)) for name in frame[row]]
    height = 0.5 + sum(0.28 + 0.16 * name.count("\n") + 0.08 for name in names)
    fig, axes = new_figure(1, 1, 10.5, max(2.2, height))
    ax = axes[0, 0]
    for place, mean in enumerate(frame.itertuples(index=False)):
        colour = GREEN if mean.ci_low > mean.threshold else RED if mean.ci_high < mean.threshold else BLUE
        dots = runs[runs[row] == getattr(mean, row)]["value"]
        ax.plot(dots, np.full(len(dots), place), "|", color=INK, ms=9, mew=1, alpha=0.6, zorder=2)
        ax.plot([mean.ci_low, mean.ci_high], [place] * 2, color=colour, lw=3, alpha=0.75, solid_capstyle="round")
        ax.plot(mean.value, place, "o", color=colour, ms=7.5, mec="white", mew=0.9, zorder=3)
        ax.plot([mean.threshold] * 2, [place - 0.34, place + 0.34], color=INK, lw=1.4, ls=(0, (3, 1.5)))
        words = f"{mean.value:+.3f} [{mean.ci_low:+.3f}, {mean.ci_high:+.3f}]"
        at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5, "annotation_clip": False}
        ax.annotate(words, (1.02, place), **at)
    ax.axvline(0, color="#BDBDBD", lw=0.8, zorder=0)
    ax.set(yticks=range(len(frame)), yticklabels=names, ylim=(len(frame) - 0.5, -0.5), xlabel="value (fraction)")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    shown = {"above its threshold": GREEN, "not decided": BLUE, "below its threshold": RED}
    legend = [
        Line2D([], [], color=colour, marker="o", mec="white", ms=8, label=f"mean {name}")
        for name, colour in shown.items()
    ]
    legend += [
        Line2D([], [], color=INK, lw=1.4, ls=(0, (3, 1.5)), label="threshold"),
        Line2D([], [], color=INK, marker="|", ls="", ms=9, label="one run"),
    ]
    return finish(fig, title, subtitle, footnote("lines", frame, "seeds"), legend)
