"""Drawn on the axes of several figures: bars, lines, stacks, heatmaps, logarithmic ticks."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ctxlib.figures.style import CENTRED, GREY, INK, MOST_BARS, drawable, ink_on


def draw_bars(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    hue: str,
    colours: Mapping[str, str],
    paper: pd.DataFrame | None = None,
    runs: pd.DataFrame | None = None,
) -> None:
    """Bars with whiskers, grouped by `x`; points instead if there are more than MOST_BARS; `runs` as dots."""
    order = list(frame[x].unique())
    width, few = 0.8 / len(colours), len(order) * len(colours) <= MOST_BARS
    for place, (name, colour) in enumerate(colours.items()):
        part = frame[frame[hue] == name].set_index(x).reindex(order)
        centre = np.arange(len(order)) + (place - (len(colours) - 1) / 2) * width
        if few:
            ax.bar(centre, part["value"], 0.9 * width, color=colour, zorder=2)
        else:
            ax.plot(centre, part["value"], "o", color=colour, ms=5, mec="white", mew=0.6, zorder=4)
        whiskers = {"ecolor": INK if few else colour, "elinewidth": 1, "capsize": min(3, 18 * width)}
        ax.errorbar(centre, part["value"], reach(part), fmt="none", zorder=3, **whiskers)
        if runs is not None:
            dots = runs[(runs[hue] == name) & runs[x].isin(order)]
            ax.plot(centre[dots[x].map(order.index)], dots["value"], ".", color=INK, ms=4, alpha=0.6, zorder=4)
        if paper is not None:
            theirs, half = paper[paper[hue] == name].set_index(x)["value"].reindex(order), 0.48 * width
            ax.hlines(theirs, centre - half, centre + half, color=GREY, ls=(0, (2.2, 1.2)), lw=1.6, zorder=4)
    turned = {} if few else {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(order)), ["\n".join(textwrap.wrap(str(name), 16)) for name in order], **turned)
    ax.set_xlim(min(-0.5, -1.2 + 0.35 * len(order)), len(order) - 1 + max(0.5, 1.2 - 0.35 * len(order)))
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y", zorder=0)
    ax.set_axisbelow(True)


def draw_lines(
    ax: Axes, frame: pd.DataFrame, x: str, hue: str, colours: Mapping[str, str], marker: str | None = "o"
) -> None:
    for name, colour in colours.items():
        part = frame[frame[hue] == name].sort_values(x)
        ax.plot(part[x], part["value"], color=colour, marker=marker, ms=4.5, mec="white", mew=0.7, zorder=3)
        if "ci_low" in part:
            ax.fill_between(part[x], part["ci_low"], part["ci_high"], color=colour, alpha=0.16, lw=0, zorder=2)


def draw_stack(ax: Axes, shares: pd.DataFrame, colours: Mapping[str, str], *, horizontal: bool = False) -> None:
    """Stacked bars of `shares` (a row a bar, a column a role); horizontal ones carry their numbers."""
    base, places = np.zeros(len(shares)), np.arange(len(shares))
    for role, colour in colours.items():
        values = shares[role].fillna(0).to_numpy() if role in shares else np.zeros(len(shares))
        if horizontal:
            ax.barh(places, values, 0.72, left=base, color=colour, edgecolor="white", lw=0.6)
            for place, value, left in zip(places, values, base, strict=True):
                if value > 0.04:
                    ink = {"size": 8.5, "color": ink_on(colour), "clip_on": True}
                    ax.text(left + value / 2, place, f"{value:.2f}", **ink, **CENTRED)
        else:
            ax.bar(places, values, 0.86, bottom=base, color=colour, edgecolor="white", lw=0.4)
        base = base + values
    names = ["\n".join(textwrap.wrap(str(name), 26)) for name in shares.index]
    if horizontal:
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
    else:
        step = -(-len(places) // 12)
        ax.set_xticks(places[::step], names[::step])


def grid_of(frame: pd.DataFrame, panel: str | None, name: Any, rows: str, columns: str) -> pd.DataFrame:
    part = frame if name is None else frame[frame[panel] == name]
    return part.pivot(index=rows, columns=columns, values="value")


def draw_heat(
    fig: Figure,
    axes: np.ndarray,
    grids: Sequence[pd.DataFrame],
    names: Sequence[Any],
    scale: Mapping[str, Any],
    label: str,
    number: str = ".2f",
    limit: int = 80,
) -> None:
    """One heatmap per grid with a shared colour bar; cells carry their number if there are at most `limit`."""
    for ax, grid, name in zip(axes.flat, grids, names, strict=False):
        steps = (-(-len(labels) // 12) if len(labels) > 24 else 1 for labels in (grid.columns, grid.index))
        ticks = dict(zip(("xticklabels", "yticklabels"), steps, strict=True))
        numbers = {"annot": grid.size <= limit, "fmt": number, "annot_kws": {"size": 7}}
        words = grid.rename(index="{:g}".format, columns="{:g}".format)
        sns.heatmap(words, ax=ax, cbar=False, linewidths=0.6, linecolor="white", **scale, **numbers, **ticks)
        crowded = len(grid.columns) > 6 and max(grid.columns) > 999
        ax.tick_params(axis="x", length=0, rotation=90 if crowded else 0)
        ax.tick_params(axis="y", length=0, rotation=0)
        ax.set(title="" if name is None else drawable(str(name)), xlabel="", ylabel="")
    shown = axes.flat[0].collections[0]
    bar = fig.colorbar(shown, ax=axes, label=label, aspect=28, pad=0.02)
    bar.outline.set_visible(False)


def reach(part: pd.DataFrame) -> np.ndarray | None:
    """Lengths of the whiskers below and above each value; None if the frame has no intervals."""
    if "ci_low" not in part:
        return None
    return np.clip([part["value"] - part["ci_low"], part["ci_high"] - part["value"]], 0, None)


def log_ticks(axis: Axis, places: np.ndarray | None = None) -> None:
    """A logarithmic axis with plain numbers: at those `places` with room for them, else at 1, 2 and 5 times 10ⁿ."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    if places is None:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_ticks(_apart(np.unique(places), 0.06))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_in_short))


def _in_short(value: float, _: int) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value / 1e3:.3g} k" if value >= 1e4 else f"{value:g}"


def _apart(values: np.ndarray, share: float) -> np.ndarray:
    """Those of the sorted `values`, from the highest down, whose logarithms are at least `share` of the range apart."""
    positions = np.log10(values)
    kept, gap = [len(values) - 1], share * max(np.ptp(positions), 1e-9)
    for place in range(len(values) - 2, -1, -1):
        if positions[kept[-1]] - positions[place] >= gap:
            kept.append(place)
    return values[sorted(kept)]
