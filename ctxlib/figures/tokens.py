"""Strips of tokens: who wrote which, and which carry loss."""

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from ctxlib.figures.style import (
    CENTRED,
    GREY,
    INK,
    MONO,
    PALETTE,
    ROLE_COLOURS,
    drawable,
    finish,
    new_figure,
    styled,
    tint,
)


@styled
def role_strip(tokens: pd.DataFrame, *, width: int = 96) -> Figure:
    """Every token (token, role[, turn]) in a box of its role's colour; a line holds `width` characters."""
    present = [role for role in ROLE_COLOURS if role in set(tokens["role"])]
    legend = [Patch(color=tint(ROLE_COLOURS[role]), label=_count(role, tokens["role"])) for role in present]
    return _strip(tokens, [ROLE_COLOURS[role] for role in tokens["role"]], legend, width)


@styled
def label_strip(tokens: pd.DataFrame, *, width: int = 96) -> Figure:
    """Every token (token, supervised[, turn]) in a box: blue where it carries loss, grey where it does not."""
    kinds = tokens["supervised"].map({True: "supervised", False: "not supervised"})
    colours = {"supervised": PALETTE[0], "not supervised": "#C9C9C9"}
    legend = [Patch(color=tint(colour), label=_count(kind, kinds)) for kind, colour in colours.items()]
    return _strip(tokens, [colours[kind] for kind in kinds], legend, width)


def role_strip_html(tokens: pd.DataFrame) -> str:
    """The same strip as HTML, for copying and long texts; every token and role is escaped."""
    spans, present = [], [role for role in ROLE_COLOURS if role in set(tokens["role"])]
    for row in tokens.to_dict("records"):
        shown = _shown(row["token"])
        turn = f", turn {row['turn']}" if "turn" in row else ""
        spans.append(_span(shown, ROLE_COLOURS[row["role"]], f"{row['role']}{turn}") + "<br>" * shown.endswith("↵"))
    legend = " ".join(_span(role, ROLE_COLOURS[role], role) for role in present)
    return f'<div style="font-family:monospace;line-height:1.9">{legend}<hr>{"".join(spans)}</div>'


def _span(text: str, colour: str, hint: str) -> str:
    style = f"background:{tint(colour)};color:#222;padding:1px 3px;margin:1px;border-radius:3px;white-space:pre"
    return f'<span style="{style}" title="{html.escape(hint)}">{html.escape(text)}</span>'


def _strip(
    tokens: pd.DataFrame,
    colours: Sequence[str],
    legend: list[Patch],
    width: int,
) -> Figure:
    gutter = 8 if "turn" in tokens else 0
    boxes, lines = _wrapped([drawable(_shown(token)) for token in tokens["token"]], width)
    fig, axes = new_figure(1, 1, 0.078 * (width + gutter) + 0.2, 0.27 * lines + 0.2)
    ax = axes[0, 0]
    ax.set(xlim=(-gutter, width), ylim=(lines, 0))
    ax.axis("off")
    for (text, x, y), colour in zip(boxes, colours, strict=True):
        shape = FancyBboxPatch(
            (x + 0.1, y + 0.14), len(text) + 0.7, 0.72, boxstyle="round,pad=0,rounding_size=0.2", mutation_aspect=0.3
        )
        shape.set(facecolor=tint(colour), edgecolor=colour, linewidth=0.5)
        ax.add_patch(shape)
        ax.text(x + 0.45 + len(text) / 2, y + 0.52, text, family=MONO, size=8.5, color=INK, parse_math=False, **CENTRED)
    if gutter:
        turns = tokens["turn"].to_numpy()
        for place in np.flatnonzero(np.diff(turns, prepend=-1)):
            if turns[place] > 0:
                ax.text(-gutter, boxes[place][2] + 0.52, f"turn {turns[place]}", va="center", fontsize=8, color=GREY)
    return finish(fig, f"n = {len(tokens):,} tokens · ↵ line break", legend)


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


def _count(name: str, column: pd.Series) -> str:
    return f"{name} ({int((column == name).sum())})"
