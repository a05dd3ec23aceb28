"""What is gained against what is paid: one dot per way, and the ways that no other beats in both."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ctxlib.figures.style import GREY, INK, PALETTE, finish, footnote, new_figure, styled


def on_front(gain: pd.Series, price: pd.Series) -> pd.Series:
    """True where no other has as much gain for as low a price, and more of the one or less of the other."""
    beaten = [((gain >= g) & (price <= p) & ((gain > g) | (price < p))).any() for g, p in zip(gain, price, strict=True)]
    return ~pd.Series(beaten, index=gain.index, dtype=bool)


@styled
def gain_against_price(
    gain: pd.DataFrame, price: pd.DataFrame, *, name: str = "cure", xlabel: str, ylabel: str
) -> Figure:
    """Dots at (price, gain) with whiskers, numbered, their names at the right; the front of best ways as a line.

    gain, price: name, value, ci_low, ci_high and n, one row each. Up and to the left is better. Whiskers are left out
    where there is no interval.
    """
    both = gain.merge(price, on=name, suffixes=("", "_paid"))
    best = on_front(both.value, both.value_paid)
    fig, axes = new_figure(1, 1, 8.6, 4.6)
    ax = axes[0, 0]
    front = both[best].sort_values(["value_paid", "value"])
    ax.plot(front.value_paid, front.value, color=INK, lw=1.2, ls=(0, (4, 2)), zorder=1)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.axvline(0, color=GREY, lw=0.8, zorder=0)
    for number, (row, is_best) in enumerate(zip(both.itertuples(), best, strict=True), start=1):
        colour = PALETTE[0] if is_best else PALETTE[-1]
        ax.plot([row.ci_low_paid, row.ci_high_paid], [row.value] * 2, color=colour, lw=1.2, alpha=0.6, zorder=2)
        ax.plot([row.value_paid] * 2, [row.ci_low, row.ci_high], color=colour, lw=1.2, alpha=0.6, zorder=2)
        ax.plot(row.value_paid, row.value, "o", color=colour, ms=11, mec="white", mew=0.8, zorder=3)
        ax.annotate(str(number), (row.value_paid, row.value), color="white", ha="center", va="center", fontsize=7)
        place = (1.03, 0.98 - (number - 1) * 0.95 / max(14, len(both)))
        words = f"{number}  {getattr(row, name)} ({row.n} seed{'s' * (row.n != 1)})"
        ax.annotate(words, place, xycoords="axes fraction", va="top", fontsize=8, color=colour, annotation_clip=False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid()
    legend = [
        Line2D([], [], color=PALETTE[0], marker="o", ls="", label="no other is better in both"),
        Line2D([], [], color=PALETTE[-1], marker="o", ls="", label="another is"),
        Line2D([], [], color=INK, lw=1.2, ls=(0, (4, 2)), label="front"),
    ]
    return finish(fig, footnote("whiskers", both, "seeds a cure"), legend)
