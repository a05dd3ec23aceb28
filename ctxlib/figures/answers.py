"""What the models answered: recall, bars of any measure, steering, needles, claims."""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from ctxlib.figures.strokes import apart, draw_bars, draw_heat, draw_lines, grid_of
from ctxlib.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALETTE,
    RED,
    SEQUENTIAL,
    colours_of,
    finish,
    footnote,
    handles,
    in_words,
    new_figure,
    patches,
    styled,
)


@styled
def bars_with_intervals(
    frame: pd.DataFrame,
    *,
    x: str = "x",
    hue: str = "hue",
    xlabel: str | None = None,
    ylabel: str = "score (fraction)",
    paper: pd.DataFrame | None = None,
    colours: Mapping[str, str] | None = None,
    ylim: tuple[int | float, int | float] | None = (0, 1),
    title: str | None = None,
    subtitle: str | None = None,
) -> Figure:
    """Grouped bars of (x, hue, value, ci_low, ci_high, n); `paper` (x, hue, value) as grey dashed lines."""
    colours = colours_of(frame[hue].unique(), colours)
    groups = frame[x].nunique()
    width = min(max(6.0, 1.6 + groups * max(0.9, 0.42 * len(colours))), 14.0)  # inches
    fig, axes = new_figure(1, 1, width, 3.6)
    ax = axes[0, 0]
    draw_bars(ax, frame, x, hue, colours, paper)
    ax.set(xlabel=xlabel or in_words(x), ylabel=ylabel, ylim=ylim)
    return finish(fig, title, subtitle, footnote("whiskers", frame, "per bar", paper), patches(colours, paper))


def recall_by_condition(
    frame: pd.DataFrame,
    *,
    x: str = "model",
    hue: str = "condition",
    error: bool = False,
    paper: pd.DataFrame | None = None,
    xlabel: str | None = None,
    title: str | None = "Recall of the needle, with and without the chat template",
    subtitle: str | None = None,
) -> Figure:
    """The paper's Figure 2: needle recall, or its error, of (x, hue, value, ci_low, ci_high, n).

    The first three values of `hue` are green, red and blue: pretrained, instruct with template, instruct without.
    """
    names = list(frame[hue].unique())
    colours = dict(zip(names, (GREEN, RED, BLUE, *PALETTE[3:]), strict=False))
    if error:
        frame, paper = _complement(frame), None if paper is None else paper.assign(value=1 - paper["value"])
    top = 1.0 if not error else min(1.0, 1.15 * max(frame["ci_high"].max(), 0.02))
    shared = {
        "x": x,
        "hue": hue,
        "xlabel": xlabel,
        "paper": paper,
        "colours": colours,
        "title": title,
        "subtitle": subtitle,
    }
    ylabel = f"needle recall {'error ' if error else ''}(fraction of keywords)"
    return bars_with_intervals(frame, ylabel=ylabel, ylim=(0, top), **shared)


def _complement(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(value=1 - frame["value"], ci_low=1 - frame["ci_high"], ci_high=1 - frame["ci_low"])


@styled
def needle_heatmap(
    frame: pd.DataFrame,
    *,
    panel: str = "condition",
    columns: int = 4,
    label: str = "needle recall (fraction)",
    title: str | None = "Needle in a haystack",
    subtitle: str | None = None,
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
    return finish(fig, title, subtitle, footnote(None, frame, "per cell"))


@styled
def needle_maps(
    recall: pd.DataFrame,
    attention: pd.DataFrame,
    *,
    panel: str = "condition",
    title: str | None = "What is found, and what is looked at",
    subtitle: str | None = None,
) -> Figure:
    """Recall beside attention to the needle, a row a panel: (depth_percent, context_length_tokens, value, n[, panel]).

    The colours of recall run from 0 to 1, those of attention from 0 to its highest value.
    """
    frames = {"needle recall (fraction)": recall, "attention to the needle (fraction)": attention}
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
    return finish(fig, title, subtitle, footnote(None, pd.concat([recall, attention]), "per cell"))


@styled
def steering_curve(
    frame: pd.DataFrame,
    *,
    hue: str = "task",
    ylabel: str = "score (fraction)",
    paper: pd.DataFrame | None = None,
    colours: Mapping[str, str] | None = None,
    title: str | None = "What steering gives, and what it costs",
    subtitle: str | None = None,
) -> Figure:
    """Lines with bands of (steering_alpha, task, value, ci_low, ci_high, n); `paper` (task, value) as grey dashes."""
    colours = colours_of(frame[hue].unique(), colours)
    fig, axes = new_figure(1, 1, 7.2, 3.8)
    ax = axes[0, 0]
    draw_lines(ax, frame, "steering_alpha", hue, colours)
    for row in () if paper is None else paper.itertuples():
        ax.axhline(row.value, color=GREY, ls="--", lw=1, zorder=1)
    alphas = np.sort(frame["steering_alpha"].unique())
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda alpha, _: f"{alpha:g}"))
    ax.set_xticks(apart(np.log10(alphas), alphas, 0.06))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="steering_alpha (weight on all but the user's tokens; 1 = no steering, less = more on the user →)")
    ax.set(ylabel=ylabel, ylim=(-0.02, 1.02))
    ax.grid(axis="y")
    return finish(fig, title, subtitle, footnote("bands", frame, "per point", paper), handles(colours, paper))


@styled
def claims_forest(
    claims: pd.DataFrame, *, title: str | None = "What was claimed, and what was found", subtitle: str | None = None
) -> Figure:
    """Claims (claim, value, ci_low, ci_high, threshold, holds, n) as points with intervals beside their thresholds."""
    names = ["\n".join(textwrap.wrap(name, 52)) for name in claims["claim"]]
    height = 0.5 + sum(0.28 + 0.16 * name.count("\n") + 0.08 for name in names)
    fig, axes = new_figure(1, 1, 10.5, max(2.2, height))
    ax, rows = axes[0, 0], np.arange(len(claims))
    for row, claim in zip(rows, claims.itertuples(), strict=True):
        colour, marker = (GREEN, "o") if claim.holds else (RED, "X")
        ax.plot([claim.ci_low, claim.ci_high], [row, row], color=colour, lw=2.4, solid_capstyle="round")
        ax.plot(claim.value, row, marker, color=colour, ms=8, mec="white", mew=0.9)
        ax.plot([claim.threshold] * 2, [row - 0.32, row + 0.32], color=INK, lw=1.4, ls=(0, (3, 1.5)))
        words = f"{claim.value:.3f} [{claim.ci_low:.3f}, {claim.ci_high:.3f}]  n = {claim.n:,}"
        ax.annotate(
            words, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, annotation_clip=False
        )
    ax.axvline(0, color="#BDBDBD", lw=0.8, zorder=0)
    ax.set(yticks=rows, yticklabels=names, ylim=(len(claims) - 0.5, -0.5), xlabel="value (fraction)")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    legend = [
        Line2D([], [], color=GREEN, marker="o", mec="white", ms=8, label="holds"),
        Line2D([], [], color=RED, marker="X", mec="white", ms=8, label="does not hold"),
        Line2D([], [], color=INK, ls=(0, (3, 1.5)), lw=1.4, label="threshold"),
    ]
    return finish(fig, title, subtitle, "lines: 95 % interval", legend)
