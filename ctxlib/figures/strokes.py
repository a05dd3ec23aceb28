"""What several figures draw on their axes: bars, lines, stacks, heatmaps."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ctxlib.figures.style import CENTRED, GREY, INK, drawable, ink_on


def draw_bars(
    ax: Axes, frame: pd.DataFrame, x: str, hue: str, colours: Mapping[str, str], paper: pd.DataFrame | None
) -> None:
    order = list(frame[x].unique())
    width = 0.8 / len(colours)
    for place, (name, colour) in enumerate(colours.items()):
        part = frame[frame[hue] == name].set_index(x).reindex(order)
        centre = np.arange(len(order)) + (place - (len(colours) - 1) / 2) * width
        ax.bar(centre, part["value"], 0.9 * width, color=colour, zorder=2)
        ax.errorbar(
            centre,
            part["value"],
            reach(part),
            fmt="none",
            ecolor=INK,
            elinewidth=1,
            capsize=min(3, 18 * width),
            zorder=3,
        )
        if paper is not None:
            theirs = paper[paper[hue] == name].set_index(x)["value"].reindex(order)
            ax.hlines(
                theirs, centre - 0.48 * width, centre + 0.48 * width, color=GREY, ls=(0, (2.2, 1.2)), lw=1.6, zorder=4
            )
    ax.set_xticks(range(len(order)), ["\n".join(textwrap.wrap(str(name), 16)) for name in order])
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
    number: str = "{:.2f}",
    limit: int = 80,
) -> None:
    """One heatmap a grid with a shared colour bar; cells carry their number while there are at most `limit`."""
    for ax, grid, name in zip(axes.flat, grids, names, strict=False):
        cells = np.ma.masked_invalid(grid.to_numpy(dtype=float))
        image = ax.pcolormesh(cells, edgecolors="white", linewidth=0.6, **scale)
        for labels, set_ticks in ((grid.columns, ax.set_xticks), (grid.index, ax.set_yticks)):
            step = -(-len(labels) // 12) if len(labels) > 24 else 1
            set_ticks(np.arange(len(labels))[::step] + 0.5, [f"{value:g}" for value in labels[::step]])
        crowded = len(grid.columns) > 6 and max(grid.columns) > 999
        ax.tick_params(axis="x", length=0, rotation=90 if crowded else 0)
        ax.tick_params(axis="y", length=0)
        ax.set(title="" if name is None else drawable(str(name)), ylim=(len(grid), 0))
        for (row, column), value in np.ndenumerate(cells) if grid.size <= limit else ():
            if np.isfinite(value):
                ink = ink_on(to_hex(image.cmap(image.norm(value))))
                ax.text(column + 0.5, row + 0.5, number.format(value), size=7, color=ink, **CENTRED)
        sns.despine(ax=ax, left=True, bottom=True)
    bar = fig.colorbar(image, ax=axes, label=label.replace(" (", "\n("), aspect=28, pad=0.02)
    bar.outline.set_visible(False)


def reach(part: pd.DataFrame) -> np.ndarray | None:
    """Lengths of the whiskers below and above each value; None where the frame has no intervals."""
    if "ci_low" not in part:
        return None
    return np.clip([part["value"] - part["ci_low"], part["ci_high"] - part["value"]], 0, None)


def apart(positions: np.ndarray, values: np.ndarray, share: float) -> np.ndarray:
    """Those of the sorted `values` whose `positions` stand at least `share` of the whole range apart."""
    kept, gap = [len(values) - 1], share * max(np.ptp(positions), 1e-9)
    for place in range(len(values) - 2, -1, -1):
        if positions[kept[-1]] - positions[place] >= gap:
            kept.append(place)
    return values[sorted(kept)]
