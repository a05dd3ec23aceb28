"""Where the models look."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ctxlib.figures.strokes import draw_bars, draw_heat, draw_lines, draw_stack, grid_of
from ctxlib.figures.style import (
    DIVERGING,
    INK,
    MOST_BARS,
    ROLE_COLOURS,
    SEQUENTIAL,
    drawable,
    finish,
    footnote,
    new_figure,
    patches,
    styled,
)


@styled
def allocation_by_role(frame: pd.DataFrame) -> Figure:
    """The paper's Figure 4: shares (condition, role, value[, layer, n]) stacked, a panel a condition if by layer."""
    roles = {role: ROLE_COLOURS[role] for role in ROLE_COLOURS if role in set(frame["role"])}
    conditions = list(frame["condition"].unique())
    by_layer = "layer" in frame and frame["layer"].nunique() > 1
    fig, axes = (
        new_figure(1, len(conditions), max(6.0, 3.1 * len(conditions)), 3.5, sharey=True)
        if by_layer
        else new_figure(1, 1, 7.4, 1.0 + 0.52 * len(conditions))
    )
    if by_layer:
        for ax, condition in zip(axes[0], conditions, strict=True):
            draw_stack(
                ax, frame[frame["condition"] == condition].pivot(index="layer", columns="role", values="value"), roles
            )
            ax.set(
                title=drawable(str(condition)),
                xlabel="layer (index from 0)",
                ylim=(0, 1),
                ylabel="attention (fraction)",
            )
            ax.label_outer()
    else:
        shares = frame.pivot(index="condition", columns="role", values="value").reindex(conditions)
        draw_stack(axes[0, 0], shares, roles, horizontal=True)
        axes[0, 0].set(xlabel="attention of the last prompt token (fraction)", xlim=(0, 1), ylabel="condition")
    return finish(fig, footnote(None, frame, "prompts"), patches(roles))


@styled
def allocation_shift(frame: pd.DataFrame) -> Figure:
    """The paper's Figure 3: change of attention (layer, role, value, ci_low, ci_high, n[, condition]).

    Bars, or lines over the layers if there are more than MOST_BARS of them.
    """
    roles = {role: ROLE_COLOURS[role] for role in ROLE_COLOURS if role in set(frame["role"])}
    names = list(frame["condition"].unique()) if "condition" in frame else [None]
    few = frame["layer"].nunique() * len(roles) <= MOST_BARS
    fig, axes = new_figure(1, len(names), max(6.4, 4.2 * len(names)), 3.5, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        part = (frame if name is None else frame[frame["condition"] == name]).sort_values("layer", kind="stable")
        if few:
            draw_bars(ax, part, "layer", "role", roles)
        else:
            draw_lines(ax, part, "layer", "role", roles)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(axis="y")
        ax.axhline(0, color=INK, lw=0.9)
        ax.set(title="" if name is None else drawable(str(name)), xlabel="layer (index from 0)")
        ax.set(ylabel="change in attention (fraction)")
        ax.label_outer()
    return finish(fig, footnote("whiskers" if few else "bands", frame, "prompts"), patches(roles))


@styled
def head_map(
    frame: pd.DataFrame,
    *,
    shift: bool = False,
    of: str = "user",
) -> Figure:
    """Heatmap of (layer, head, value[, n, condition]): a fraction from 0, or with `shift` a change centred at 0.

    `of`: the tokens that the attention falls on, for the axis.
    """
    names = list(frame["condition"].unique()) if "condition" in frame else [None]
    grids = [grid_of(frame, "condition", name, "layer", "head") for name in names]
    rows, columns = grids[0].shape
    extent = np.nanmax([np.abs(grid).max(axis=None) for grid in grids])
    scale = (
        {"cmap": DIVERGING, "vmin": -extent, "vmax": extent}
        if shift
        else {"cmap": SEQUENTIAL, "vmin": 0, "vmax": extent}
    )
    width = max(2.6, 0.42 * columns + 0.5)
    fig, axes = new_figure(1, len(names), max(6.0, width * len(names) + 1.2), max(2.6, 0.34 * rows + 0.8), sharey=True)
    label = f"change in attention to {of} (fraction)" if shift else f"attention to {of} (fraction)"
    draw_heat(fig, axes, grids, names, scale, label, "+.2f" if shift else ".2f")
    for ax in axes[0]:
        ax.set(xlabel="head (index from 0)", ylabel="layer (index from 0)")
        ax.label_outer()
        ax.set_ylim(0, rows)
    return finish(fig, footnote(None, frame, "prompts"))
