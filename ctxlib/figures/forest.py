"""Claims and changes as points with their intervals, one line each."""

import textwrap

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ctxlib import metrics
from ctxlib.figures.style import GREEN, GREY, INK, ORANGE, RED, drawable, finish, footnote, new_figure, styled

_VERDICTS = {  # colour and marker
    "holds": (GREEN, "o"),
    "does not hold": (RED, "X"),
    "not decided": (ORANGE, "D"),
    "no interval": ("#5A5A5A", "s"),
}


@styled
def forest(
    frame: pd.DataFrame,
    *,
    row: str = "claim",
    runs: pd.DataFrame | None = None,
    paper: pd.DataFrame | None = None,
    xlabel: str = "value (fraction)",
) -> Figure:
    """Lines of (row, value, ci_low, ci_high, n), with a dashed tick at their `threshold` if they have one.

    The colour is that of the column `verdict` ("holds", "does not hold", "not decided", "no interval", or anything
    else, which is printed instead of a point). Without it, it follows from the column `holds`, or from the threshold:
    "holds" if the whole interval lies above it, "does not hold" if below, else "not decided".

    `runs` (row, value): single runs as dark ticks. `paper` (row, value): the paper's own values as grey ticks.
    """
    verdicts = list(frame["verdict"]) if "verdict" in frame else [_verdict(mean) for mean in frame.itertuples()]
    names = ["\n".join(textwrap.wrap(drawable(str(name)), 50)) for name in frame[row]]
    height = 0.5 + sum(0.32 + 0.15 * name.count("\n") for name in names)
    fig, axes = new_figure(1, 1, 9.0, max(2.2, height))
    ax, at_right = axes[0, 0], {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5}
    ticks = [(others, colour, shift) for others, colour, shift in ((runs, INK, 0), (paper, GREY, 0.24))]
    for place, (verdict, (_, mean)) in enumerate(zip(verdicts, frame.iterrows(), strict=True)):
        for others, colour, shift in ticks:
            dots = [] if others is None else others.loc[others[row] == mean[row], "value"]
            ax.plot(dots, [place + shift] * len(dots), "|", color=colour, ms=8, mew=1.1, alpha=0.7, zorder=2)
        if not pd.isna(mean.get("threshold")):
            ax.plot([mean["threshold"]] * 2, [place - 0.33, place + 0.33], color=INK, lw=1.4, ls=(0, (3, 1.5)))
        if verdict in _VERDICTS:
            colour, marker = _VERDICTS[verdict]
            ax.plot([mean.ci_low, mean.ci_high], [place] * 2, color=colour, lw=2.4, solid_capstyle="round", zorder=3)
            ax.plot(mean.value, place, marker, color=colour, ms=7.5, mec="white", mew=0.9, zorder=4)
        words = metrics.in_words(mean, ".3f", of="n") if verdict in _VERDICTS else str(verdict)
        ax.annotate(words, (1.02, place), annotation_clip=False, **at_right)
    ax.axvline(0, color="#BDBDBD", lw=0.8, zorder=0)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=xlabel)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    return finish(fig, footnote("lines", frame, "per line"), _legend(frame, verdicts, runs, paper))


def _verdict(mean: tuple) -> str:
    if hasattr(mean, "holds") and not pd.isna(mean.ci_low):
        return "holds" if mean.holds else "does not hold"
    return metrics.verdict(mean.ci_low, mean.ci_high, mean.threshold)


def _legend(
    frame: pd.DataFrame, verdicts: list[str], runs: pd.DataFrame | None, paper: pd.DataFrame | None
) -> list[Line2D]:
    legend = [
        Line2D([], [], color=colour, marker=marker, mec="white", ms=7.5, label=verdict)
        for verdict, (colour, marker) in _VERDICTS.items()
        if verdict in verdicts
    ]
    if "threshold" in frame:
        legend.append(Line2D([], [], color=INK, ls=(0, (3, 1.5)), lw=1.4, label="threshold"))
    for others, colour, label in ((runs, INK, "one run"), (paper, GREY, "the paper's own")):
        if others is not None:
            legend.append(Line2D([], [], color=colour, marker="|", ls="", ms=8, mew=1.1, label=label))
    return legend
