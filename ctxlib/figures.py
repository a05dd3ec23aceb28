"""One function a figure: tidy frame in, matplotlib Figure out. Nothing is computed here but positions and colours.

Frames are those of `metrics.summarise`: value, ci_low, ci_high and n beside the columns that a figure names. Every
function takes `title` and `subtitle`; whiskers and bands are the frame's intervals. Nothing global is changed.
"""

import html
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

ROLE_COLOURS = {  # what somebody wrote in Okabe and Ito's colours, scaffolding in greys: told apart by everybody
    "bos": "#4D4D4D",
    "system": "#009E73",
    "user": "#0072B2",
    "assistant": "#E69F00",
    "template": "#B8B8B8",
    "passage": "#0072B2",  # what the user wrote, taken apart by `roles.question_apart`
    "question": "#56B4E9",
}
GREEN, RED, BLUE = (
    "#2A9D60",
    "#D1495B",
    "#2E72B8",
)  # pretrained, instruct with template, instruct without: the paper's Figure 2
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
GREY, INK = "#7A7A7A", "#222222"
SEQUENTIAL, DIVERGING = "mako", "vlag"
_NO_ROWS = dict.fromkeys(("roc_and_pr", "layer_auc"), "no truth known: nothing to compare the scores with")
_MONO, _CENTRED = "DejaVu Sans Mono", {"ha": "center", "va": "center"}
_STYLE = {
    **sns.axes_style("ticks"),
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9A9A9A",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#9A9A9A",
    "ytick.color": "#9A9A9A",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Our style around a figure; a frame without rows makes a blank one that says so."""

    @wraps(draw)
    def drawn(frame: pd.DataFrame, *args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(_STYLE):
            if frame.empty:
                return _blank(_NO_ROWS.get(draw.__name__, "no data"), kwargs.get("title"), kwargs.get("subtitle"))
            return draw(frame, *args, **kwargs)

    return drawn


# ---------------------------------------------------------------- tokens


@_styled
def role_strip(
    tokens: pd.DataFrame, *, width: int = 96, title: str | None = "Who wrote which token", subtitle: str | None = None
) -> Figure:
    """Every token (token, role[, turn]) in a box of its role's colour; a line holds `width` characters."""
    present = [role for role in ROLE_COLOURS if role in set(tokens["role"])]
    legend = [Patch(color=_tint(ROLE_COLOURS[role]), label=_count(role, tokens["role"])) for role in present]
    return _strip(tokens, [ROLE_COLOURS[role] for role in tokens["role"]], legend, width, title, subtitle)


@_styled
def label_strip(
    tokens: pd.DataFrame, *, width: int = 96, title: str | None = "Tokens that carry loss", subtitle: str | None = None
) -> Figure:
    """Every token (token, supervised[, turn]) in a box: blue where it carries loss, grey where it does not."""
    kinds = tokens["supervised"].map({True: "supervised", False: "not supervised"})
    colours = {"supervised": PALETTE[0], "not supervised": "#C9C9C9"}
    legend = [Patch(color=_tint(colour), label=_count(kind, kinds)) for kind, colour in colours.items()]
    return _strip(tokens, [colours[kind] for kind in kinds], legend, width, title, subtitle)


def role_strip_html(tokens: pd.DataFrame, *, title: str | None = None) -> str:
    """The same strip as HTML, for copying and long texts; every token, role and title is escaped."""
    spans, present = [], [role for role in ROLE_COLOURS if role in set(tokens["role"])]
    for row in tokens.to_dict("records"):
        shown = _shown(row["token"])
        turn = f", turn {row['turn']}" if "turn" in row else ""
        spans.append(_span(shown, ROLE_COLOURS[row["role"]], f"{row['role']}{turn}") + "<br>" * shown.endswith("↵"))
    legend = " ".join(_span(role, ROLE_COLOURS[role], role) for role in present)
    heading = f"<b>{html.escape(title)}</b> " if title else ""
    return f'<div style="font-family:monospace;line-height:1.9">{heading}{legend}<hr>{"".join(spans)}</div>'


def _span(text: str, colour: str, hint: str) -> str:
    style = f"background:{_tint(colour)};color:#222;padding:1px 3px;margin:1px;border-radius:3px;white-space:pre"
    return f'<span style="{style}" title="{html.escape(hint)}">{html.escape(text)}</span>'


def _strip(
    tokens: pd.DataFrame,
    colours: Sequence[str],
    legend: list[Patch],
    width: int,
    title: str | None,
    subtitle: str | None,
) -> Figure:
    gutter = 8 if "turn" in tokens else 0
    boxes, lines = _wrapped([_drawable(_shown(token)) for token in tokens["token"]], width)
    fig, axes = _panels(1, 1, 0.078 * (width + gutter) + 0.2, 0.27 * lines + 0.2)
    ax = axes[0, 0]
    ax.set(xlim=(-gutter, width), ylim=(lines, 0))
    ax.axis("off")
    for (text, x, y), colour in zip(boxes, colours, strict=True):
        shape = FancyBboxPatch(
            (x + 0.1, y + 0.14), len(text) + 0.7, 0.72, boxstyle="round,pad=0,rounding_size=0.2", mutation_aspect=0.3
        )
        shape.set(facecolor=_tint(colour), edgecolor=colour, linewidth=0.5)
        ax.add_patch(shape)
        ax.text(
            x + 0.45 + len(text) / 2, y + 0.52, text, family=_MONO, size=8.5, color=INK, parse_math=False, **_CENTRED
        )
    if gutter:
        turns = tokens["turn"].to_numpy()
        for place in np.flatnonzero(np.diff(turns, prepend=-1)):
            if turns[place] > 0:
                ax.text(-gutter, boxes[place][2] + 0.52, f"turn {turns[place]}", va="center", fontsize=8, color=GREY)
    return _finish(fig, title, subtitle, f"n = {len(tokens):,} tokens · ↵ line break", legend)


def _wrapped(texts: Sequence[str], width: int) -> tuple[list[tuple[str, float, int]], int]:
    """Each text with its left edge (characters) and line; a line ends at `width` and after a line break."""
    boxes, x, y = [], 0.0, 0
    for text in texts:
        text = text if len(text) < width else text[: width - 2] + "…"
        if x and x + len(text) + 0.9 > width:
            x, y = 0.0, y + 1
        boxes.append((text, x, y))
        x += len(text) + 0.9
        if text.endswith("↵"):
            x, y = 0.0, y + 1
    return boxes, y + (x > 0)


def _shown(token: str) -> str:
    """What a reader should see of a token: no word-start mark, line breaks and lone spaces visible."""
    bare = token.replace("<0x0A>", "\n").replace("Ċ", "\n").replace("▁", " ").replace("Ġ", " ")
    bare = bare[1:] if bare.startswith(" ") and bare.strip() else bare
    return bare.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") if bare.strip() != bare or not bare else bare


def _drawable(text: str) -> str:
    """Characters that the font lacks become a box, so that no script can break a figure."""
    glyphs = font_manager.get_font(Path(font_manager.findfont(_MONO))).get_charmap()
    return "".join(character if ord(character) in glyphs else "□" for character in text)


# ---------------------------------------------------------------- values with intervals


@_styled
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
    colours = _colours(frame[hue].unique(), colours)
    groups = frame[x].nunique()
    fig, axes = _panels(1, 1, max(6.0, 1.6 + groups * max(0.9, 0.42 * len(colours))), 3.6)
    ax = axes[0, 0]
    _bars(ax, frame, x, hue, colours, paper)
    ax.set(xlabel=xlabel or _words(x), ylabel=ylabel, ylim=ylim)
    return _finish(fig, title, subtitle, _note("whiskers", frame, "per bar", paper), _patches(colours, paper))


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


@_styled
def claims_forest(
    claims: pd.DataFrame, *, title: str | None = "What was claimed, and what was found", subtitle: str | None = None
) -> Figure:
    """Claims (claim, value, ci_low, ci_high, threshold, holds, n) as points with intervals beside their thresholds."""
    names = ["\n".join(textwrap.wrap(name, 52)) for name in claims["claim"]]
    height = 0.5 + sum(0.28 + 0.16 * name.count("\n") + 0.08 for name in names)
    fig, axes = _panels(1, 1, 10.5, max(2.2, height))
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
    return _finish(fig, title, subtitle, "lines: 95 % interval", legend)


@_styled
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
    colours = _colours(frame[hue].unique(), colours)
    fig, axes = _panels(1, 1, 7.2, 3.8)
    ax = axes[0, 0]
    _lines(ax, frame, "steering_alpha", hue, colours)
    for row in () if paper is None else paper.itertuples():
        ax.axhline(row.value, color=GREY, ls="--", lw=1, zorder=1)
    alphas = np.sort(frame["steering_alpha"].unique())
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda alpha, _: f"{alpha:g}"))
    ax.set_xticks(_apart(np.log10(alphas), alphas, 0.06))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="steering_alpha (weight on all but the user's tokens; 1 = no steering, less = more on the user →)")
    ax.set(ylabel=ylabel, ylim=(-0.02, 1.02))
    ax.grid(axis="y")
    return _finish(fig, title, subtitle, _note("bands", frame, "per point", paper), _handles(colours, paper))


# ---------------------------------------------------------------- attention


@_styled
def allocation_by_role(
    frame: pd.DataFrame, *, title: str | None = "Where the first response token looks", subtitle: str | None = None
) -> Figure:
    """The paper's Figure 4: shares (condition, role, value[, layer, n]) stacked, a panel a condition if by layer."""
    roles = {role: ROLE_COLOURS[role] for role in ROLE_COLOURS if role in set(frame["role"])}
    conditions = list(frame["condition"].unique())
    by_layer = "layer" in frame and frame["layer"].nunique() > 1
    fig, axes = (
        _panels(1, len(conditions), max(6.0, 3.1 * len(conditions)), 3.5, sharey=True)
        if by_layer
        else _panels(1, 1, 7.4, 1.0 + 0.52 * len(conditions))
    )
    if by_layer:
        for ax, condition in zip(axes[0], conditions, strict=True):
            _stack(
                ax, frame[frame["condition"] == condition].pivot(index="layer", columns="role", values="value"), roles
            )
            ax.set(
                title=_drawable(str(condition)),
                xlabel="layer (index from 0)",
                ylim=(0, 1),
                ylabel="attention (fraction)",
            )
            ax.label_outer()
    else:
        shares = frame.pivot(index="condition", columns="role", values="value").reindex(conditions)
        _stack(axes[0, 0], shares, roles, horizontal=True)
        axes[0, 0].set(xlabel="attention of the last prompt token (fraction)", xlim=(0, 1), ylabel="condition")
    return _finish(fig, title, subtitle, _note(None, frame, "prompts"), _patches(roles))


@_styled
def allocation_shift(
    frame: pd.DataFrame, *, title: str | None = "What the chat template does to attention", subtitle: str | None = None
) -> Figure:
    """The paper's Figure 3: change of attention (layer, role, value, ci_low, ci_high, n[, condition]) as bars."""
    roles = {role: ROLE_COLOURS[role] for role in ROLE_COLOURS if role in set(frame["role"])}
    names = list(frame["condition"].unique()) if "condition" in frame else [None]
    layers = frame["layer"].nunique()
    width = min(11.0, max(3.2, 1.0 + layers * 0.2 * len(roles)))
    fig, axes = _panels(1, len(names), max(6.4, width * len(names)), 3.5, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        part = frame if name is None else frame[frame["condition"] == name]
        _bars(ax, part.sort_values("layer", kind="stable"), "layer", "role", roles, None)
        ax.axhline(0, color=INK, lw=0.9)
        ax.set(title="" if name is None else _drawable(str(name)), xlabel="layer (index from 0)")
        ax.set(ylabel="change in attention (fraction)")
        ax.label_outer()
    return _finish(fig, title, subtitle, _note("whiskers", frame, "prompts"), _patches(roles))


@_styled
def head_map(
    frame: pd.DataFrame,
    *,
    shift: bool = False,
    title: str | None = "Attention to the user's tokens, head by head",
    subtitle: str | None = None,
) -> Figure:
    """Heatmap of (layer, head, value[, n, condition]): a fraction from 0 on, or with `shift` a change centred at 0."""
    names = list(frame["condition"].unique()) if "condition" in frame else [None]
    grids = [_grid(frame, "condition", name, "layer", "head") for name in names]
    rows, columns = grids[0].shape
    extent = np.nanmax([np.abs(grid).max(axis=None) for grid in grids])
    scale = (
        {"cmap": DIVERGING, "vmin": -extent, "vmax": extent}
        if shift
        else {"cmap": SEQUENTIAL, "vmin": 0, "vmax": extent}
    )
    width = max(2.6, 0.42 * columns + 0.5)
    fig, axes = _panels(1, len(names), max(6.0, width * len(names) + 1.2), max(2.6, 0.34 * rows + 0.8), sharey=True)
    label = "change in attention to user (fraction)" if shift else "attention to user (fraction)"
    _heat(fig, axes, grids, names, scale, label, "{:+.2f}" if shift else "{:.2f}")
    for ax in axes[0]:
        ax.set(xlabel="head (index from 0)", ylabel="layer (index from 0)")
        ax.label_outer()
        ax.set_ylim(0, rows)
    return _finish(fig, title, subtitle, _note(None, frame, "prompts"))


# ---------------------------------------------------------------- context dependency


@_styled
def score_histogram(
    scores: pd.DataFrame,
    *,
    threshold: int | float | None = None,
    truth: str | None = None,
    bins: int = 40,
    colours: Mapping[Any, str] | None = None,
    title: str | None = "Context-dependency scores",
    subtitle: str | None = None,
) -> Figure:
    """Histogram of `score` in [0, 1], one outline per value of the column `truth`; the threshold as a dashed line."""
    groups = [("all turns", scores)] if truth is None else list(scores.groupby(truth, sort=True))
    names = {True: "depends on the context", False: "could come from memory"}
    palette = _colours([names.get(name, str(name)) for name, _ in groups], colours)
    fig, axes = _panels(1, 1, 7.2, 3.6)
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
    return _finish(fig, title, subtitle, f"n = {len(scores):,} assistant turns", legend)


@_styled
def scores_by_kind(
    frame: pd.DataFrame,
    *,
    threshold: int | float | None = None,
    kind: str = "kind",
    truth: str = "truth",
    colours: Mapping[Any, str] | None = None,
    title: str | None = "Which kinds of turns are marked",
    subtitle: str | None = None,
) -> Figure:
    """Boxes of `score`, a row a `kind`, in the colour of its `truth`, sorted by median; with the share over threshold.

    Boxes span the quartiles, whiskers the middle 95 % of the turns.
    """
    palette = _colours(sorted(frame[truth].unique()), colours)
    rows = sorted(frame.groupby([kind, truth], sort=False), key=lambda row: (row[0][1], -row[1]["score"].median()))
    fig, axes = _panels(1, 1, 8.2, 0.8 + 0.3 * len(rows))
    ax = axes[0, 0]
    for place, ((_, side), part) in enumerate(rows):
        line = {"color": palette[side], "linewidth": 1.2}
        box = ax.boxplot(
            part["score"], positions=[place], widths=0.62, whis=(2.5, 97.5), showfliers=False, orientation="horizontal",
            patch_artist=True, whiskerprops=line, capprops=line, medianprops={"color": INK, "linewidth": 1.6},
        )  # fmt: skip
        box["boxes"][0].set(facecolor=_tint(palette[side]), edgecolor=palette[side])
        over = "" if threshold is None else f"{np.mean(part['score'] > threshold):.0%} over β, "
        note = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5, "annotation_clip": False}
        ax.annotate(f"{over}n = {len(part):,}", (1.02, place), **note)
    if threshold is not None:
        ax.axvline(threshold, color=INK, ls="--", lw=1.2, zorder=0)
    ax.set_yticks(range(len(rows)), [_words(_drawable(str(name))) for (name, _), _ in rows])
    ax.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="context-dependency score (fraction of attention)")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    line = [] if threshold is None else [Line2D([], [], color=INK, ls="--", lw=1.2, label=f"β = {threshold:g}")]
    note = f"boxes: quartiles · whiskers: middle 95 % · n = {len(frame):,} turns"
    return _finish(fig, title, subtitle, note, [*_patches(palette), *line])


@_styled
def layer_agreement(
    frame: pd.DataFrame,
    *,
    panel: str | None = None,
    label: str = "disagreement (fraction of the turns picked)",
    title: str | None = "Do the layers pick the same turns?",
    subtitle: str | None = None,
) -> Figure:
    """The paper's Figure 6: heatmap of (layer, other_layer, disagreement[, n, panel]), of `scoring.layer_agreement`."""
    names = [None] if panel is None else list(frame[panel].unique())
    frame = frame.rename(columns={"disagreement": "value"})
    grids = [_grid(frame, panel, name, "layer", "other_layer") for name in names]
    side = max(3.6, 0.36 * len(grids[0]) + 1.2)
    fig, axes = _panels(1, len(names), max(5.6, side * len(names) + 1.0), side)
    _heat(fig, axes, grids, names, {"cmap": SEQUENTIAL + "_r", "vmin": 0, "vmax": 1}, label, limit=600)
    for ax in axes[0]:
        ax.set(xlabel="layer (index from 0)", ylabel="layer (index from 0)", aspect="equal")
        ax.label_outer()
    return _finish(fig, title, subtitle, _note(None, frame, "turns"))


@_styled
def length_histograms(
    frame: pd.DataFrame,
    *,
    length: str = "user_tokens",
    panel: str | None = None,
    bins: int = 30,
    xlabel: str = "instruction length (tokens)",
    title: str | None = "Which lengths are selected",
    subtitle: str | None = None,
) -> Figure:
    """The paper's Figures 7-9: histogram of `length`, over all turns and over those with `selected`, on a log axis."""
    names = [None] if panel is None else list(frame[panel].unique())
    fig, axes = _panels(1, len(names), max(6.4, 3.6 * len(names)), 3.4, sharey=True)
    low, high = max(1, frame[length].min()), frame[length].max() + 1
    edges = np.unique(np.round(np.geomspace(low, high, bins + 1))) - 0.5
    ticks = [step * 10**power for power in range(7) for step in (1, 2, 5)]
    for ax, name in zip(axes[0], names, strict=True):
        part = frame if name is None else frame[frame[panel] == name]
        picked = part.loc[part["selected"].astype(bool), length]
        for lengths, colour, alpha in ((part[length], "#9AA1AB", 0.45), (picked, PALETTE[1], 0.15)):
            weights = np.full(len(lengths), 100 / max(1, len(lengths)))
            ax.hist(lengths, edges, weights=weights, color=colour, alpha=alpha, histtype="stepfilled")
            ax.hist(lengths, edges, weights=weights, color=colour, lw=1.5, histtype="step")
        caption = f"n = {len(part):,}, selected {len(picked):,}"
        ax.set_title(caption if name is None else f"{_drawable(str(name))}: {caption}", fontsize=9, fontweight="normal")
        ax.set(xscale="log", xlabel=xlabel, ylabel="turns (% of their group)", xlim=(edges[0], edges[-1]))
        ax.set_xticks([tick for tick in ticks if edges[0] < tick < edges[-1]])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(axis="y")
        ax.label_outer()
    legend = [
        Patch(color="#9AA1AB", alpha=0.6, label="all turns"),
        Patch(fc="#F6DFCC", ec=PALETTE[1], label="selected turns (score > β)"),
    ]
    return _finish(fig, title, subtitle, None, legend)


@_styled
def fractions_over_beta(
    frame: pd.DataFrame,
    *,
    hue: str = "dataset",
    paper: pd.DataFrame | None = None,
    title: str | None = "How many turns pass the threshold",
    subtitle: str | None = None,
) -> Figure:
    """The paper's Table 10: (threshold, hue, fraction, low, high, n) of `indicator.fractions_over`, a line a `hue`.

    `paper` (threshold, hue, fraction) as grey dashed lines.
    """
    frame = frame.rename(columns={"fraction": "value", "low": "ci_low", "high": "ci_high"})
    colours = _colours(frame[hue].unique(), None)
    fig, axes = _panels(1, 1, 6.6, 3.7)
    ax = axes[0, 0]
    _lines(ax, frame, "threshold", hue, colours, marker="o" if frame["threshold"].nunique() < 15 else None)
    for _, part in () if paper is None else paper.groupby(hue, sort=False):
        ax.plot(part["threshold"], part["fraction"], color=GREY, ls="--", lw=1.1, marker=".", zorder=1)
    ax.set(xlabel="threshold β (fraction of attention)", ylabel="turns with score > β (fraction)")
    ax.set_ylim(bottom=0)
    place = -1.0
    for _, last in () if paper is None else paper.groupby(hue).tail(1).sort_values("fraction").iterrows():
        place = max(last["fraction"], place + 0.05 * ax.get_ylim()[1])
        ax.text(last["threshold"], place, f"  {last[hue]}", ha="left", va="center", size=8, color=GREY)
    ax.grid(axis="y")
    return _finish(fig, title, subtitle, _note("bands", frame, "turns", paper), _handles(colours, paper))


@_styled
def roc_and_pr(
    roc: pd.DataFrame,
    pr: pd.DataFrame,
    *,
    prevalence: int | float,
    auc: Mapping[Any, float] | None = None,
    chosen_layer: int | None = None,
    threshold: int | float | None = None,
    n: int | None = None,
    title: str | None = "Does the score find the turns that depend on the context?",
    subtitle: str | None = None,
) -> Figure:
    """ROC (layer, false_positive_rate, true_positive_rate) beside precision over recall (layer, recall, precision).

    With `threshold` both frames have a column threshold, and a dot on the chosen layer shows what is over it.
    """
    layers = sorted(roc["layer"].unique())
    shades = zip(layers, sns.color_palette("viridis_r", len(layers) + 1)[1:], strict=True)
    strokes = {layer: {"color": shade, "lw": 1.3, "zorder": 3} for layer, shade in shades}
    if chosen_layer in strokes:
        strokes[chosen_layer] = {"color": RED, "lw": 2.6, "zorder": 4}
    fig, axes = _panels(1, 2, 9.2, 4.0)
    panels = ((roc, "false_positive_rate", "true_positive_rate"), (pr, "recall", "precision"))
    for ax, (frame, x, y) in zip(axes[0], panels, strict=True):
        for layer, part in frame.groupby("layer"):
            ax.plot(part[x], part[y], **strokes[layer])
            over = part[part["threshold"] > threshold] if threshold is not None and layer == chosen_layer else part[:0]
            nearest = over.nsmallest(1, "threshold")
            ax.plot(nearest[x], nearest[y], "o", color=RED, ms=8, mec="white", mew=1.2, zorder=5)
        ax.set(
            xlabel=f"{_words(x)} (fraction)", ylabel=f"{_words(y)} (fraction)", xlim=(-0.01, 1.01), ylim=(-0.01, 1.02)
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
    return _finish(fig, title, subtitle, note, legend)


@_styled
def layer_auc(
    frame: pd.DataFrame,
    *,
    chosen_layer: int | None = None,
    hue: str | None = None,
    title: str | None = "Which layer's score tells the turns apart",
    subtitle: str | None = None,
) -> Figure:
    """AUC (layer, value, ci_low, ci_high, n[, hue]) with intervals, the chosen layer marked, chance at 0.5."""
    colours = _colours(frame[hue].unique() if hue else ["AUC"], None)
    frame = frame if hue else frame.assign(AUC="AUC")
    fig, axes = _panels(1, 1, max(5.6, 1.6 + 0.34 * frame["layer"].nunique()), 3.5)
    ax = axes[0, 0]
    if chosen_layer is not None:
        ax.axvspan(chosen_layer - 0.4, chosen_layer + 0.4, color="#F3E3C3", zorder=0, lw=0)
    for place, (name, colour) in enumerate(colours.items()):
        part = frame[frame[hue or "AUC"] == name].sort_values("layer")
        at = part["layer"] + 0.14 * (place - (len(colours) - 1) / 2)
        ax.errorbar(at, part["value"], _reach(part), fmt="o-", color=colour, ms=5, lw=1.3, elinewidth=1.3, capsize=2.5)
    ax.axhline(0.5, color=GREY, ls="--", lw=1)
    ax.set(
        xlabel="layer (index from 0)", ylabel="ROC AUC (fraction)", ylim=(min(0.4, frame["ci_low"].min() - 0.03), 1.01)
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=24, min_n_ticks=1))
    ax.grid(axis="y")
    legend = _handles(colours, None) if hue else []
    if chosen_layer is not None:
        legend = [*legend, Patch(color="#F3E3C3", label=f"chosen: layer {chosen_layer}")]
    legend = [*legend, Line2D([], [], color=GREY, ls="--", lw=1, label="chance")]
    return _finish(fig, title, subtitle, _note("whiskers", frame, "turns"), legend)


# ---------------------------------------------------------------- training and needles


@_styled
def loss_curves(
    log: pd.DataFrame,
    *,
    x: str = "step",
    y: str = "loss",
    hue: str = "run",
    smooth: int = 1,
    logarithmic: bool = False,
    ylabel: str = "loss (nats per supervised token)",
    title: str | None = "Training loss",
    subtitle: str | None = None,
) -> Figure:
    """Loss over steps of (step, loss, run); with `smooth` > 1 a centred running mean over so many rows in front."""
    colours = _colours(log[hue].unique(), None)
    fig, axes = _panels(1, 1, 7.2, 3.6)
    ax = axes[0, 0]
    for name, colour in colours.items():
        part = log[log[hue] == name].dropna(subset=[y]).sort_values(x)
        marker = "o" if len(part) <= 40 else None
        thin = {"lw": 0.8, "alpha": 0.3} if smooth > 1 else {"lw": 1.6, "marker": marker, "ms": 3.5}
        ax.plot(part[x], part[y], color=colour, **thin)
        if smooth > 1:
            ax.plot(part[x], part[y].rolling(smooth, center=True, min_periods=1).mean(), color=colour)
    ax.set(xlabel=f"{_words(x)} (optimiser steps)" if x == "step" else _words(x), ylabel=ylabel)
    if logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=0)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y")
    note = f"n = {log.groupby(hue)[y].count().max():,} points a run" + (
        f" · line: mean of {smooth}" if smooth > 1 else ""
    )
    return _finish(fig, title, subtitle, note, _handles(colours, None))


@_styled
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
    grids = [_grid(frame, panel, name, "depth_percent", "context_length_tokens") for name in names]
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    width, height = (min(5.2, max(2.5, 0.36 * grids[0].shape[1] + 0.5)), max(1.7, 0.27 * grids[0].shape[0] + 0.5))
    fig, axes = _panels(rows, columns, max(6.0, width * columns + 1.1), height * rows + 0.35, sharex=True, sharey=True)
    _heat(fig, axes, grids, names, {"cmap": SEQUENTIAL, "vmin": 0, "vmax": 1}, label)
    for place, ax in enumerate(axes.flat):
        ax.set_visible(place < len(names))
        ax.set(xlabel="context length (tokens)", ylabel="depth (% of context)")
        lowest = place + columns >= len(names)
        ax.tick_params(labelbottom=lowest, labelleft=place % columns == 0)
        ax.set_xlabel(ax.get_xlabel() if lowest else "")
        ax.set_ylabel(ax.get_ylabel() if place % columns == 0 else "")
    return _finish(fig, title, subtitle, _note(None, frame, "per cell"))


# ---------------------------------------------------------------- shared strokes


def _panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    """Figure of `width` inches and axes; `height` is that of the axes, to which `_finish` adds header and footer."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **shared)
    plt.close(fig)  # the caller owns it: pyplot keeps no list of figures, and a notebook shows it once
    return fig, axes


def _blank(says: str, title: str | None, subtitle: str | None) -> Figure:
    fig, axes = _panels(1, 1, 6.0, 1.4)
    axes[0, 0].axis("off")
    axes[0, 0].text(0.5, 0.5, says, size=11, color=GREY, transform=axes[0, 0].transAxes, **_CENTRED)
    return _finish(fig, title, subtitle, None)


def _finish(
    fig: Figure, title: str | None, subtitle: str | None, note: str | None, legend: Sequence[Any] = ()
) -> Figure:
    """Adds a header (title, subtitle, legend) above the axes and a note below; the figure grows by their height."""
    width, height = fig.get_size_inches()
    titles = textwrap.wrap(title or "", int(width * 9.2))
    subtitles = textwrap.wrap(subtitle or "", int(width * 12))
    columns, legend_rows = _legend_shape([handle.get_label() for handle in legend], width)
    header = 0.08 + 0.25 * len(titles) + 0.19 * len(subtitles) + 0.24 * legend_rows + 0.06 * bool(legend)
    footer = 0.24 if note else 0.04
    total = header + height + footer
    fig.set_size_inches(width, total)
    fig.get_layout_engine().set(rect=(0, footer / total, 1, height / total), w_pad=0.1, h_pad=0.06)
    left, top = 0.1 / width, total - 0.08
    fig.text(left, top / total, "\n".join(titles), size=12, weight="bold", color=INK, va="top")
    top -= 0.25 * len(titles)
    fig.text(left, top / total, "\n".join(subtitles), size=9.5, color="#555555", va="top")
    top -= 0.19 * len(subtitles)
    if legend:
        by_row = [legend[i] for column in range(columns) for i in range(column, len(legend), columns)]
        spacing = {
            "borderaxespad": 0,
            "borderpad": 0.1,
            "handlelength": 1.5,
            "columnspacing": 1.4,
            "labelspacing": 0.35,
        }
        at = (left, (top - 0.01) / total)
        drawn = fig.legend(handles=by_row, loc="upper left", bbox_to_anchor=at, ncols=columns, **spacing)
        drawn.set_in_layout(False)
    if note:
        fig.text(left, 0.07 / total, note, size=8, color=GREY, va="bottom")
    return fig


def _legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    """(columns, rows) of a legend that fits into `width` inches."""
    if not labels:
        return 1, 0
    widths = [0.46 + 0.071 * len(label) for label in labels]
    columns = len(labels) if sum(widths) < width - 0.2 else max(1, int((width - 0.2) / max(widths)))
    return columns, -(-len(labels) // columns)


def _bars(
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
            _reach(part),
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


def _lines(
    ax: Axes, frame: pd.DataFrame, x: str, hue: str, colours: Mapping[str, str], marker: str | None = "o"
) -> None:
    for name, colour in colours.items():
        part = frame[frame[hue] == name].sort_values(x)
        ax.plot(part[x], part["value"], color=colour, marker=marker, ms=4.5, mec="white", mew=0.7, zorder=3)
        if "ci_low" in part:
            ax.fill_between(part[x], part["ci_low"], part["ci_high"], color=colour, alpha=0.16, lw=0, zorder=2)


def _stack(ax: Axes, shares: pd.DataFrame, colours: Mapping[str, str], *, horizontal: bool = False) -> None:
    """Stacked bars of `shares` (a row a bar, a column a role); horizontal ones carry their numbers."""
    base, places = np.zeros(len(shares)), np.arange(len(shares))
    for role, colour in colours.items():
        values = shares[role].fillna(0).to_numpy() if role in shares else np.zeros(len(shares))
        if horizontal:
            ax.barh(places, values, 0.72, left=base, color=colour, edgecolor="white", lw=0.6)
            for place, value, left in zip(places, values, base, strict=True):
                if value > 0.04:
                    ink = {"size": 8.5, "color": _on(colour), "clip_on": True}
                    ax.text(left + value / 2, place, f"{value:.2f}", **ink, **_CENTRED)
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


def _grid(frame: pd.DataFrame, panel: str | None, name: Any, rows: str, columns: str) -> pd.DataFrame:
    part = frame if name is None else frame[frame[panel] == name]
    return part.pivot(index=rows, columns=columns, values="value")


def _heat(
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
        ax.set(title="" if name is None else _drawable(str(name)), ylim=(len(grid), 0))
        for (row, column), value in np.ndenumerate(cells) if grid.size <= limit else ():
            if np.isfinite(value):
                ink = _on(to_hex(image.cmap(image.norm(value))))
                ax.text(column + 0.5, row + 0.5, number.format(value), size=7, color=ink, **_CENTRED)
        sns.despine(ax=ax, left=True, bottom=True)
    bar = fig.colorbar(image, ax=axes, label=label.replace(" (", "\n("), aspect=28, pad=0.02)
    bar.outline.set_visible(False)


def _reach(part: pd.DataFrame) -> np.ndarray | None:
    """Lengths of the whiskers below and above each value; None where the frame has no intervals."""
    if "ci_low" not in part:
        return None
    return np.clip([part["value"] - part["ci_low"], part["ci_high"] - part["value"]], 0, None)


def _complement(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(value=1 - frame["value"], ci_low=1 - frame["ci_high"], ci_high=1 - frame["ci_low"])


def _note(interval: str | None, frame: pd.DataFrame, unit: str, paper: pd.DataFrame | None = None) -> str:
    parts = [f"{interval}: 95 % interval"] if interval and "ci_low" in frame else []
    if "n" in frame:
        low, high = int(frame["n"].min()), int(frame["n"].max())
        parts.append(f"n = {low:,}{'' if low == high else f'–{high:,}'} {unit}")
    if paper is not None:
        parts.append("dashed grey: the paper's values")
    return " · ".join(parts)


def _colours(names: Iterable[Any], known: Mapping[Any, str] | None) -> dict[Any, str]:
    names = list(names)
    spare = iter(PALETTE if len(names) <= len(PALETTE) else map(to_hex, sns.color_palette("husl", len(names))))
    return {name: (known or {}).get(name) or ROLE_COLOURS.get(name) or next(spare) for name in names}


def _patches(colours: Mapping[Any, str], paper: pd.DataFrame | None = None) -> list[Any]:
    return [*(Patch(color=colour, label=str(name)) for name, colour in colours.items()), *_paper_handle(paper)]


def _handles(colours: Mapping[Any, str], paper: pd.DataFrame | None) -> list[Any]:
    lines = (Line2D([], [], color=colour, marker="o", ms=4.5, label=str(name)) for name, colour in colours.items())
    return [*lines, *_paper_handle(paper)]


def _paper_handle(paper: pd.DataFrame | None) -> list[Line2D]:
    return [] if paper is None else [Line2D([], [], color=GREY, ls="--", lw=1.4, label="paper")]


def _apart(positions: np.ndarray, values: np.ndarray, share: float) -> np.ndarray:
    """Those of the sorted `values` whose `positions` stand at least `share` of the whole range apart."""
    kept, gap = [len(values) - 1], share * max(np.ptp(positions), 1e-9)
    for place in range(len(values) - 2, -1, -1):
        if positions[kept[-1]] - positions[place] >= gap:
            kept.append(place)
    return values[sorted(kept)]


def _count(name: str, column: pd.Series) -> str:
    return f"{name} ({int((column == name).sum())})"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _tint(colour: str, strength: float = 0.48) -> str:
    """The colour mixed with white, for dark text to stand on."""
    return to_hex(1 - strength * (1 - np.array(to_rgb(colour))))


def _on(colour: str) -> str:
    """Ink that can be read on `colour`."""
    return "white" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.58 else INK
