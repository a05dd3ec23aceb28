"""Answers of the models: recall, bars of any measure, steering, needles."""

import textwrap
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from ctxlib.figures.strokes import draw_bars, draw_heat, draw_lines, grid_of, log_ticks, reach
from ctxlib.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MOST_BARS,
    PALETTE,
    RED,
    SEQUENTIAL,
    WIDEST,
    colours_of,
    drawable,
    finish,
    footnote,
    handles,
    new_figure,
    patches,
    spaced,
    styled,
)

RECALLED = "needles recalled (all keywords said)"


@styled
def bars_with_intervals(
    frame: pd.DataFrame,
    *,
    x: str,
    hue: str,
    xlabel: str | None = None,
    ylabel: str = "score (fraction)",
    paper: pd.DataFrame | None = None,
    runs: pd.DataFrame | None = None,
    colours: Mapping[str, str] | None = None,
    ylim: tuple[int | float, int | float] | None = (0, 1),
) -> Figure:
    """Grouped bars of (x, hue, value, ci_low, ci_high, n), with the single `runs` (x, hue, value) as dots.

    `paper` (x, hue, value) as grey dashed lines. More than MOST_BARS values are points in a panel for each `hue`.
    """
    colours = colours_of(frame[hue].unique(), colours)
    if frame[x].nunique() * len(colours) > MOST_BARS:
        return _point_panels(frame, x, hue, (xlabel or spaced(x), ylabel, ylim), colours, paper, runs)
    width = max(6.0, 1.6 + frame[x].nunique() * max(0.9, 0.42 * len(colours)))  # inches
    fig, axes = new_figure(1, 1, width, 3.6)
    draw_bars(axes[0, 0], frame, x, hue, colours, paper, runs)
    axes[0, 0].set(xlabel=xlabel or spaced(x), ylabel=ylabel, ylim=ylim)
    return finish(fig, _note("whiskers", frame, "per bar", paper, runs), patches(colours, paper))


def _point_panels(
    frame: pd.DataFrame,
    x: str,
    hue: str,
    labels: tuple[str, str, tuple[int | float, int | float] | None],
    colours: Mapping[str, str],
    paper: pd.DataFrame | None,
    runs: pd.DataFrame | None,
) -> Figure:
    """The same values as horizontal points: panels by `hue` and lines by `x`, or the reverse if `x` has no more values.

    So the values to be compared share a panel: many markings by task, or a few conditions by task.
    """
    xlabel, label, limits = labels
    row, panel = (x, hue) if frame[x].nunique() > len(colours) else (hue, x)
    order, panels = list(frame[row].unique()), list(frame[panel].unique())
    names = ["\n".join(textwrap.wrap(drawable(str(name)), 30)) for name in order]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    height = 0.75 + sum(0.2 + 0.13 * name.count("\n") for name in names)
    fig, axes = new_figure(lines, columns, WIDEST, height * lines, sharex=True, sharey=True)
    for place, ax in enumerate(axes.flat):
        ax.set_visible(place < len(panels))
    for ax, name in zip(axes.flat, panels, strict=False):
        part = frame[frame[panel] == name]
        for group, colour in colours.items():
            mine = part[part[hue] == group]
            places = mine[row].map(order.index)
            ax.errorbar(mine["value"], places, xerr=reach(mine), fmt="o", color=colour, ms=5, lw=1.3)
        for others, mark, ink in ((runs, ".", INK), (paper, "|", GREY)):
            if others is not None:
                dots = others[(others[panel] == name) & others[row].isin(order)]
                ax.plot(dots["value"], dots[row].map(order.index), mark, color=ink, ms=4, alpha=0.6, zorder=1)
        ax.set(title=drawable(str(name)), xlabel=label, ylabel=xlabel if row == x else "")
        ax.set_yticks(range(len(order)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid()
        ax.label_outer()
    axes[0, 0].set_ylim(len(order) - 0.5, -0.5)
    if limits:
        axes[0, 0].set_xlim(limits[0] - 0.03, limits[1] + 0.03)
    return finish(fig, _note("lines", frame, "per point", paper, runs))


def _note(interval: str, frame: pd.DataFrame, unit: str, paper: pd.DataFrame | None, runs: pd.DataFrame | None) -> str:
    return footnote(interval, frame, unit, paper) + ("" if runs is None else " · dots: single runs")


def recall_by_condition(frame: pd.DataFrame, *, x: str = "model", xlabel: str | None = None) -> Figure:
    """The paper's Figure 2, needles of which all keywords are said: (x, condition, value, ci_low, ci_high, n).

    The first three conditions are green, red and blue: pretrained, instruct with template, instruct without.
    """
    colours = dict(zip(frame["condition"].unique(), (GREEN, RED, BLUE, *PALETTE[3:]), strict=False))
    return bars_with_intervals(frame, x=x, hue="condition", xlabel=xlabel, ylabel=RECALLED, colours=colours)


@styled
def needle_heatmap(
    frame: pd.DataFrame,
    *,
    panel: str = "condition",
    columns: int = 3,
    label: str = RECALLED,
) -> Figure:
    """Recall over depth and length (depth_percent, context_length_tokens, value, n[, panel]), colours from 0 to 1."""
    names = list(frame[panel].unique()) if panel in frame else [None]
    grids = [grid_of(frame, panel, name, "depth_percent", "context_length_tokens") for name in names]
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    width, height = (min(5.2, max(2.5, 0.36 * grids[0].shape[1] + 0.5)), max(1.7, 0.27 * grids[0].shape[0] + 0.5))
    fig, axes = new_figure(
        rows, columns, max(6.0, width * columns + 1.1), height * rows + 0.35, sharex=True, sharey=True
    )
    draw_heat(fig, axes, grids, names, {"cmap": SEQUENTIAL, "vmin": 0, "vmax": 1}, label)
    for place, ax in enumerate(axes.flat):
        ax.set_visible(place < len(names))
        ax.set(xlabel="context length (tokens)", ylabel="depth (% of context)")
        lowest = place + columns >= len(names)
        ax.tick_params(labelbottom=lowest, labelleft=place % columns == 0)
        ax.set_xlabel(ax.get_xlabel() if lowest else "")
        ax.set_ylabel(ax.get_ylabel() if place % columns == 0 else "")
    return finish(fig, footnote(None, frame, "per cell"))


@styled
def needle_maps(
    recall: pd.DataFrame,
    attention: pd.DataFrame,
    *,
    panel: str = "condition",
) -> Figure:
    """Recall and attention to the needle side by side, one row of axes per `panel`.

    Both frames: depth_percent, context_length_tokens, value, n[, panel]. The colours of recall run from 0 to 1, those
    of attention from 0 to its highest value.
    """
    frames = {RECALLED: recall, "attention to the needle (fraction)": attention}
    names = list(recall[panel].unique()) if panel in recall else [None]
    grids = [
        [grid_of(frame, panel, name, "depth_percent", "context_length_tokens") for name in names]
        for frame in frames.values()
    ]
    rows, columns = grids[0][0].shape
    width, height = min(5.2, max(2.5, 0.36 * columns + 0.5)), max(1.7, 0.27 * rows + 0.5)
    fig, axes = new_figure(len(names), 2, 2 * width + 2.2, height * len(names) + 0.35, sharex=True, sharey=True)
    for column, label, of_label, top in zip(axes.T, frames, grids, (1, attention["value"].max()), strict=True):
        draw_heat(fig, column, of_label, names, {"cmap": SEQUENTIAL, "vmin": 0, "vmax": top}, label)
    for ax in axes[-1]:
        ax.set_xlabel("context length (tokens)")
    for ax in axes[:, 0]:
        ax.set_ylabel("depth (% of context)")
    return finish(fig, footnote(None, pd.concat([recall, attention]), "per cell"))


@styled
def steering_curve(
    frame: pd.DataFrame,
    *,
    hue: str = "task",
    ylabel: str = "score (fraction)",
    paper: pd.DataFrame | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Lines with bands of (steering_alpha, task, value, ci_low, ci_high, n); `paper` (task, value) as grey dashes."""
    colours = colours_of(frame[hue].unique(), colours)
    fig, axes = new_figure(1, 1, 7.2, 3.8)
    ax = axes[0, 0]
    draw_lines(ax, frame, "steering_alpha", hue, colours)
    for row in () if paper is None else paper.itertuples():
        ax.axhline(row.value, color=GREY, ls="--", lw=1, zorder=1)
    log_ticks(ax.xaxis, frame["steering_alpha"].to_numpy())
    ax.invert_xaxis()
    ax.set(xlabel="steering_alpha (weight on all but the user's tokens; 1 = no steering, less = more on the user →)")
    ax.set(ylabel=ylabel, ylim=(-0.02, 1.02))
    ax.grid(axis="y")
    return finish(fig, footnote("bands", frame, "per point", paper), handles(colours, paper))
