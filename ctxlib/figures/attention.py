"""Where the models look."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ctxlib.figures.strokes import draw_bars, draw_heat, draw_stack, grid_of
from ctxlib.figures.style import (
    DIVERGING,
    INK,
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
def allocation_by_role(
    frame: pd.DataFrame, *, title: str | None = "Where the first response token looks", subtitle: str | None = None
) -> Figure:
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
    return finish(fig, title, subtitle, footnote(None, frame, "prompts"), patches(roles))


@styled
def allocation_shift(
    frame: pd.DataFrame, *, title: str | None = "What the chat template does to attention", subtitle: str | None = None
) -> Figure:
    """The paper's Figure 3: change of attention (layer, role, value, ci_low, ci_high, n[, condition]) as bars."""
    roles = {role: ROLE_COLOURS[role] for role in ROLE_COLOURS if role in set(frame["role"])}
    names = list(frame["condition"].unique()) if "condition" in frame else [None]
    layers = frame["layer"].nunique()
    width = min(11.0, max(3.2, 1.0 + layers * 0.2 * len(roles)))
    fig, axes = new_figure(1, len(names), max(6.4, width * len(names)), 3.5, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        part = frame if name is None else frame[frame["condition"] == name]
        draw_bars(ax, part.sort_values("layer", kind="stable"), "layer", "role", roles, None)
        ax.axhline(0, color=INK, lw=0.9)
        ax.set(title="" if name is None else drawable(str(name)), xlabel="layer (index from 0)")
        ax.set(ylabel="change in attention (fraction)")
        ax.label_outer()
    return finish(fig, title, subtitle, footnote("whiskers", frame, "prompts"), patches(roles))


@styled
def head_map(
    frame: pd.DataFrame,
    *,
    shift: bool = False,
    of: str = "user",
    title: str | None = "Attention to the user's tokens, head by head",
    subtitle: str | None = None,
) -> Figure:
    """Heatmap of (layer, head, value[, n, condition]): a fraction from 0 on, or with `shift` a change centred at 0.

    `of` says what the attention falls on, for the axis.
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
    draw_heat(fig, axes, grids, names, scale, label, "{:+.2f}" if shift else "{:.2f}")
    for ax in axes[0]:
        ax.set(xlabel="head (index from 0)", ylabel="layer (index from 0)")
        ax.label_outer()
        ax.set_ylim(0, rows)
    return finish(fig, title, subtitle, footnote(None, frame, "prompts"))
