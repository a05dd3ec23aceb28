"""Context-dependency scores: their distribution, what they select, and whether they are right."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ctxlib.figures.strokes import draw_heat, draw_lines, grid_of, log_ticks, reach
from ctxlib.figures.style import (
    GREY,
    INK,
    PALETTE,
    RED,
    SEQUENTIAL,
    colours_of,
    drawable,
    finish,
    footnote,
    handles,
    new_figure,
    patches,
    spaced,
    styled,
    tint,
)


@styled
def score_histogram(
    scores: pd.DataFrame,
    *,
    threshold: int | float | None = None,
    truth: str | None = None,
    bins: int = 40,
    colours: Mapping[Any, str] | None = None,
) -> Figure:
    """Histogram of `score` in [0, 1], one outline per value of the column `truth`; the threshold as a dashed line."""
    groups = [("all turns", scores)] if truth is None else list(scores.groupby(truth, sort=True))
    names = {True: "depends on the context", False: "could come from memory"}
    palette = colours_of([names.get(name, str(name)) for name, _ in groups], colours)
    fig, axes = new_figure(1, 1, 7.2, 3.6)
    ax, legend = axes[0, 0], []
    for (_, part), (name, colour) in zip(groups, palette.items(), strict=True):
        weights = np.full(len(part), 100 / len(part))
        ax.hist(
            part["score"], np.linspace(0, 1, bins + 1), weights=weights, color=colour, alpha=0.28, histtype="stepfilled"
        )
        ax.hist(part["score"], np.linspace(0, 1, bins + 1), weights=weights, color=colour, lw=1.6, histtype="step")
        over = "" if threshold is None else f", {np.mean(part['score'] > threshold):.1%} above"
        legend.append(Patch(color=colour, alpha=0.6, label=f"{name} (n = {len(part):,}{over})"))
    if threshold is not None:
        ax.axvline(threshold, color=INK, ls="--", lw=1.2)
        legend.append(Line2D([], [], color=INK, ls="--", lw=1.2, label=f"threshold β = {threshold:g}"))
    ax.set(
        xlabel="context-dependency score (fraction of attention on user tokens)",
        ylabel="turns (% of their group)",
        xlim=(0, 1),
    )
    ax.grid(axis="y")
    return finish(fig, f"n = {len(scores):,} assistant turns", legend)


@styled
def scores_by_kind(
    frame: pd.DataFrame,
    *,
    threshold: int | float | None = None,
    kind: str = "kind",
    truth: str = "truth",
    colours: Mapping[Any, str] | None = None,
) -> Figure:
    """Boxes of `score`, a row a `kind`, in the colour of its `truth`, sorted by median; with the share over threshold.

    Boxes span the quartiles, whiskers the middle 95 % of the turns.
    """
    palette = colours_of(sorted(frame[truth].unique()), colours)
    rows = sorted(frame.groupby([kind, truth], sort=False), key=lambda row: (row[0][1], -row[1]["score"].median()))
    fig, axes = new_figure(1, 1, 8.2, 0.8 + 0.3 * len(rows))
    ax = axes[0, 0]
    for place, ((_, side), part) in enumerate(rows):
        line = {"color": palette[side], "linewidth": 1.2}
        box = ax.boxplot(
            part["score"], positions=[place], widths=0.62, whis=(2.5, 97.5), showfliers=False, orientation="horizontal",
            patch_artist=True, whiskerprops=line, capprops=line, medianprops={"color": INK, "linewidth": 1.6},
        )  # fmt: skip
        box["boxes"][0].set(facecolor=tint(palette[side]), edgecolor=palette[side])
        over = "" if threshold is None else f"{np.mean(part['score'] > threshold):.0%} over β, "
        note = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5, "annotation_clip": False}
        ax.annotate(f"{over}n = {len(part):,}", (1.02, place), **note)
    if threshold is not None:
        ax.axvline(threshold, color=INK, ls="--", lw=1.2, zorder=0)
    ax.set_yticks(range(len(rows)), [spaced(drawable(str(name))) for (name, _), _ in rows])
    ax.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="context-dependency score (fraction of attention)")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    line = [] if threshold is None else [Line2D([], [], color=INK, ls="--", lw=1.2, label=f"β = {threshold:g}")]
    note = f"boxes: quartiles · whiskers: middle 95 % · n = {len(frame):,} turns"
    return finish(fig, note, [*patches(palette), *line])


@styled
def layer_agreement(
    frame: pd.DataFrame,
    *,
    panel: str | None = None,
    label: str = "disagreement (fraction of the turns picked)",
) -> Figure:
    """The paper's Figure 6: heatmap of (layer, other_layer, disagreement[, n, panel]), of `scoring.layer_agreement`."""
    names = [None] if panel is None else list(frame[panel].unique())
    frame = frame.rename(columns={"disagreement": "value"})
    grids = [grid_of(frame, panel, name, "layer", "other_layer") for name in names]
    side = max(3.6, 0.36 * len(grids[0]) + 1.2)
    fig, axes = new_figure(1, len(names), max(5.6, side * len(names) + 1.0), side)
    draw_heat(fig, axes, grids, names, {"cmap": SEQUENTIAL + "_r", "vmin": 0, "vmax": 1}, label, limit=600)
    for ax in axes[0]:
        ax.set(xlabel="layer (index from 0)", ylabel="layer (index from 0)", aspect="equal")
        ax.label_outer()
    return finish(fig, footnote(None, frame, "turns"))


@styled
def length_histograms(
    frame: pd.DataFrame,
    *,
    length: str = "user_tokens",
    panel: str | None = None,
    bins: int = 30,
    xlabel: str = "instruction length (tokens)",
) -> Figure:
    """The paper's Figures 7-9: histogram of `length`, over all turns and over those with `selected`, on a log axis."""
    names = [None] if panel is None else list(frame[panel].unique())
    fig, axes = new_figure(1, len(names), max(6.4, 3.6 * len(names)), 3.4, sharey=True)
    low, high = max(1, frame[length].min()), frame[length].max() + 1
    edges = np.unique(np.round(np.geomspace(low, high, bins + 1))) - 0.5
    for ax, name in zip(axes[0], names, strict=True):
        part = frame if name is None else frame[frame[panel] == name]
        picked = part.loc[part["selected"].astype(bool), length]
        for lengths, colour, alpha in ((part[length], "#9AA1AB", 0.45), (picked, PALETTE[1], 0.15)):
            weights = np.full(len(lengths), 100 / max(1, len(lengths)))
            ax.hist(lengths, edges, weights=weights, color=colour, alpha=alpha, histtype="stepfilled")
            ax.hist(lengths, edges, weights=weights, color=colour, lw=1.5, histtype="step")
        caption = f"n = {len(part):,}, selected {len(picked):,}"
        ax.set_title(caption if name is None else f"{drawable(str(name))}: {caption}", fontsize=9, fontweight="normal")
        log_ticks(ax.xaxis)
        ax.set(xlabel=xlabel, ylabel="turns (% of their group)", xlim=(edges[0], edges[-1]))
        ax.grid(axis="y")
        ax.label_outer()
    legend = [
        Patch(color="#9AA1AB", alpha=0.6, label="all turns"),
        Patch(fc="#F6DFCC", ec=PALETTE[1], label="selected turns (score > β)"),
    ]
    return finish(fig, None, legend)


@styled
def fractions_over_beta(
    frame: pd.DataFrame,
    *,
    hue: str = "dataset",
    paper: pd.DataFrame | None = None,
) -> Figure:
    """The paper's Table 10: (threshold, hue, fraction, low, high, n) of `indicator.fractions_over`, a line a `hue`.

    `paper` (threshold, hue, fraction) as grey dashed lines.
    """
    frame = frame.rename(columns={"fraction": "value", "low": "ci_low", "high": "ci_high"})
    colours = colours_of(frame[hue].unique(), None)
    fig, axes = new_figure(1, 1, 6.6, 3.7)
    ax = axes[0, 0]
    draw_lines(ax, frame, "threshold", hue, colours, marker="o" if frame["threshold"].nunique() < 15 else None)
    for _, part in () if paper is None else paper.groupby(hue, sort=False):
        ax.plot(part["threshold"], part["fraction"], color=GREY, ls="--", lw=1.1, marker=".", zorder=1)
    ax.set(xlabel="threshold β (fraction of attention)", ylabel="turns with score > β (fraction)")
    ax.set_ylim(bottom=0)
    place = -1.0
    for _, last in () if paper is None else paper.groupby(hue).tail(1).sort_values("fraction").iterrows():
        place = max(last["fraction"], place + 0.05 * ax.get_ylim()[1])
        ax.text(last["threshold"], place, f"  {last[hue]}", ha="left", va="center", size=8, color=GREY)
    ax.grid(axis="y")
    return finish(fig, footnote("bands", frame, "turns", paper), handles(colours, paper))


@styled
def roc_and_pr(
    roc: pd.DataFrame,
    pr: pd.DataFrame,
    *,
    prevalence: int | float,
    auc: Mapping[Any, float] | None = None,
    chosen_layer: int | None = None,
    threshold: int | float | None = None,
    n: int | None = None,
) -> Figure:
    """ROC (layer, false_positive_rate, true_positive_rate) and precision over recall (layer, recall, precision).

    With `threshold` both frames have a column threshold, and a dot on the chosen layer shows what is over it.
    """
    layers = sorted(roc["layer"].unique())
    shades = zip(layers, sns.color_palette("viridis_r", len(layers) + 1)[1:], strict=True)
    strokes = {layer: {"color": shade, "lw": 1.3, "zorder": 3} for layer, shade in shades}
    if chosen_layer in strokes:
        strokes[chosen_layer] = {"color": RED, "lw": 2.6, "zorder": 4}
    fig, axes = new_figure(1, 2, 9.2, 4.0)
    panels = ((roc, "false_positive_rate", "true_positive_rate"), (pr, "recall", "precision"))
    for ax, (frame, x, y) in zip(axes[0], panels, strict=True):
        for layer, part in frame.groupby("layer"):
            ax.plot(part[x], part[y], **strokes[layer])
            over = part[part["threshold"] > threshold] if threshold is not None and layer == chosen_layer else part[:0]
            nearest = over.nsmallest(1, "threshold")
            ax.plot(nearest[x], nearest[y], "o", color=RED, ms=8, mec="white", mew=1.2, zorder=5)
        ax.set(
            xlabel=f"{spaced(x)} (fraction)",
            ylabel=f"{spaced(y)} (fraction)",
            xlim=(-0.01, 1.01),
            ylim=(-0.01, 1.02),
        )
        ax.grid()
    axes[0, 0].plot([0, 1], [0, 1], color=GREY, ls="--", lw=1)
    axes[0, 1].axhline(prevalence, color=GREY, ls="--", lw=1)
    legend = [
        Line2D([], [], label=f"layer {layer}" + (f", AUC {auc[layer]:.2f}" if auc else ""), **strokes[layer])
        for layer in layers
    ]
    dot = [Line2D([], [], color=RED, marker="o", mec="white", ms=8, ls="", label=f"score > β = {threshold}")]
    legend += dot if threshold is not None and chosen_layer in strokes else []
    note = f"dashed: chance (prevalence {prevalence:.2f})" + ("" if n is None else f" · n = {n:,} turns")
    return finish(fig, note, legend)


@styled
def layer_auc(
    frame: pd.DataFrame,
    *,
    chosen_layer: int | None = None,
    hue: str | None = None,
) -> Figure:
    """AUC (layer, value, ci_low, ci_high, n[, hue]) with intervals, the chosen layer marked, chance at 0.5."""
    colours = colours_of(frame[hue].unique() if hue else ["AUC"], None)
    frame = frame if hue else frame.assign(AUC="AUC")
    fig, axes = new_figure(1, 1, max(5.6, 1.6 + 0.34 * frame["layer"].nunique()), 3.5)
    ax = axes[0, 0]
    if chosen_layer is not None:
        ax.axvspan(chosen_layer - 0.4, chosen_layer + 0.4, color="#F3E3C3", zorder=0, lw=0)
    for place, (name, colour) in enumerate(colours.items()):
        part = frame[frame[hue or "AUC"] == name].sort_values("layer")
        at = part["layer"] + 0.14 * (place - (len(colours) - 1) / 2)
        ax.errorbar(at, part["value"], reach(part), fmt="o-", color=colour, ms=5, lw=1.3, elinewidth=1.3, capsize=2.5)
    ax.axhline(0.5, color=GREY, ls="--", lw=1)
    ax.set(
        xlabel="layer (index from 0)", ylabel="ROC AUC (fraction)", ylim=(min(0.4, frame["ci_low"].min() - 0.03), 1.01)
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=24, min_n_ticks=1))
    ax.grid(axis="y")
    legend = handles(colours, None) if hue else []
    if chosen_layer is not None:
        legend = [*legend, Patch(color="#F3E3C3", label=f"chosen: layer {chosen_layer}")]
    legend = [*legend, Line2D([], [], color=GREY, ls="--", lw=1, label="chance")]
    return finish(fig, footnote("whiskers", frame, "turns"), legend)
