"""Colours, type and the frame around every figure: header, legend, footnote. Nothing global is changed."""

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
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

ROLE_COLOURS = {  # what somebody wrote in Okabe and Ito's colours, scaffolding in greys: told apart by everybody
    "bos": "#4D4D4D",
    "system": "#009E73",
    "user": "#0072B2",
    "assistant": "#E69F00",
    "template": "#B8B8B8",
    "passage": "#0072B2",  # the user's text, split by `roles.question_groups`
    "question": "#56B4E9",
}
GREEN, RED, BLUE, ORANGE = "#2A9D60", "#D1495B", "#2E72B8", "#E69F00"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
CONDITION_COLOURS = {  # a model and how it is asked: the first three as in the paper's Figure 2
    **dict.fromkeys(("pretrained", "pretrained, raw text"), GREEN),
    "instruct, chat template": RED,
    "instruct, raw text": BLUE,
    **dict.fromkeys(("vanilla", "vanilla, template"), "#D55E00"),
    "vanilla, raw text": "#8C6D31",
    **dict.fromkeys(("indicator", "indicator, template"), "#56B4E9"),
    **dict.fromkeys(("indicator + [IND]", "indicator, [IND]", "indicator, template + [IND]"), "#0072B2"),
}
WIDEST, MOST_BARS = 9.0, 12  # inches; with more bars points are drawn
GREY, INK = "#7A7A7A", "#222222"
SEQUENTIAL, DIVERGING = "mako", "vlag"
_NO_ROWS = dict.fromkeys(("roc_and_pr", "layer_auc"), "no truth known: nothing to compare the scores with")
MONO, CENTRED = "DejaVu Sans Mono", {"ha": "center", "va": "center"}
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


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Applies our style to a figure; a frame without rows gives a blank one that says so."""

    @wraps(draw)
    def drawn(frame: pd.DataFrame, *args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(_STYLE):
            if frame.empty:
                return _blank(_NO_ROWS.get(draw.__name__, "no data"))
            return draw(frame, *args, **kwargs)

    return drawn


def new_figure(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    """Figure of `width` inches, at most WIDEST, and axes; `height` is that of the axes, without header and footer."""
    size = (min(width, WIDEST), height)
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)
    plt.close(fig)  # the caller owns it: pyplot keeps no list of figures, and a notebook shows it once
    return fig, axes


def _blank(says: str) -> Figure:
    fig, axes = new_figure(1, 1, 6.0, 1.4)
    axes[0, 0].axis("off")
    axes[0, 0].text(0.5, 0.5, says, size=11, color=GREY, transform=axes[0, 0].transAxes, **CENTRED)
    return finish(fig, None)


def finish(fig: Figure, note: str | None, legend: Sequence[Any] = (), *, subtitle: str | None = None) -> Figure:
    """Adds a header (subtitle, legend) above the axes and a note below; the figure grows by their height."""
    width, height = fig.get_size_inches()
    subtitles = textwrap.wrap(subtitle or "", int(width * 12))
    columns, legend_rows = _legend_shape([handle.get_label() for handle in legend], width)
    header = 0.08 + 0.19 * len(subtitles) + 0.24 * legend_rows + 0.06 * bool(legend)
    footer = 0.24 if note else 0.04
    total = header + height + footer
    fig.set_size_inches(width, total)
    fig.get_layout_engine().set(rect=(0, footer / total, 1, height / total), w_pad=0.1, h_pad=0.06)
    left, top = 0.1 / width, total - 0.08
    fig.text(left, top / total, "\n".join(subtitles), size=9.5, color="#555555", va="top")
    top -= 0.19 * len(subtitles)
    if legend:
        by_row = [legend[i] for column in range(columns) for i in range(column, len(legend), columns)]
        spacing = {
            "borderaxespad": 0,
            "borderpad": 0.1,
            "columnspacing": 1.4,
            "handlelength": 1.5,
            "labelspacing": 0.35,
        }
        at = (left, (top - 0.01) / total)
        drawn = fig.legend(handles=by_row, loc="upper left", bbox_to_anchor=at, ncols=columns, **spacing)
        drawn.set_in_layout(False)
    if note:
        fig.text(left, 0.07 / total, note, size=8, color=GREY, va="bottom")
    _fit_words(fig)
    return fig


def _fit_words(fig: Figure) -> None:
    """Breaks titles and axis labels that are longer than their axes, so that neighbours never overlap."""
    fig.get_layout_engine().execute(fig)
    for ax in fig.axes:
        width, height = ax.get_position().size * fig.get_size_inches()
        ax.set_title(broken(ax.get_title("left"), int(width * 12)), loc="left")  # characters per inch of each font
        ax.set_xlabel(broken(ax.get_xlabel(), int(width * 14)))
        ax.set_ylabel(broken(ax.get_ylabel(), int(height * 14)))


def broken(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters if a word is not longer, broken first before a unit in brackets."""
    if max(map(len, text.split("\n"))) <= width:
        return text
    parts = text.replace(" (", "\n(").split("\n")
    return "\n".join(line for part in parts for line in textwrap.wrap(part, max(width, 8), break_long_words=False))


def _legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    """(columns, rows) of a legend that fits into `width` inches."""
    if not labels:
        return 1, 0
    widths = [0.46 + 0.071 * len(label) for label in labels]
    columns = len(labels) if sum(widths) < width - 0.2 else max(1, int((width - 0.2) / max(widths)))
    return columns, -(-len(labels) // columns)


def footnote(interval: str | None, frame: pd.DataFrame, unit: str, paper: pd.DataFrame | None = None) -> str:
    has_intervals = "ci_low" in frame and frame["ci_low"].notna().any()
    parts = [f"{interval}: 95 % interval"] if interval and has_intervals else []
    if "n" in frame:
        low, high = int(frame["n"].min()), int(frame["n"].max())
        parts.append(f"n = {low:,}{'' if low == high else f'–{high:,}'} {unit}")
    if paper is not None:
        parts.append("dashed grey: the paper's values")
    return " · ".join(parts)


def colours_of(names: Iterable[Any], known: Mapping[Any, str] | None) -> dict[Any, str]:
    """One colour per name: the given one, else that of the role or condition, else the next one that is not in use."""
    names = list(names)
    fixed = ROLE_COLOURS | CONDITION_COLOURS | dict(known or {})
    used = {fixed.get(name) for name in names}
    enough = len(names) <= len(PALETTE) - len(used & set(PALETTE))
    palette = PALETTE if enough else map(to_hex, sns.color_palette("husl", len(names)))
    spare = (colour for colour in palette if colour not in used)
    return {name: fixed.get(name) or next(spare) for name in names}


def patches(colours: Mapping[Any, str], paper: pd.DataFrame | None = None) -> list[Any]:
    return [*(Patch(color=colour, label=str(name)) for name, colour in colours.items()), *_paper_handle(paper)]


def handles(colours: Mapping[Any, str], paper: pd.DataFrame | None) -> list[Any]:
    lines = (Line2D([], [], color=colour, marker="o", ms=4.5, label=str(name)) for name, colour in colours.items())
    return [*lines, *_paper_handle(paper)]


def _paper_handle(paper: pd.DataFrame | None) -> list[Line2D]:
    return [] if paper is None else [Line2D([], [], color=GREY, ls="--", lw=1.4, label="paper")]


def tint(colour: str, strength: float = 0.48) -> str:
    """The colour mixed with white, for dark text to stand on."""
    return to_hex(1 - strength * (1 - np.array(to_rgb(colour))))


def ink_on(colour: str) -> str:
    """Ink that can be read on `colour`."""
    return "white" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.58 else INK


def spaced(name: str) -> str:
    return name.replace("_", " ")


def drawable(text: str) -> str:
    """Characters that the font lacks become a box, so that no script can break a figure; lines stay lines."""
    glyphs = font_manager.get_font(Path(font_manager.findfont(MONO))).get_charmap()
    return "".join(character if character == "\n" or ord(character) in glyphs else "□" for character in text)
