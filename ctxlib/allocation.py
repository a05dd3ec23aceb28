"""The last token's attention by role, and its shift when the chat template is applied."""

from collections.abc import Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from ctxlib.attention import record_allocation, steer_attention
from ctxlib.models import memory_advice
from ctxlib.params import InputError, Variant
from ctxlib.roles import ROLES, Groups, Role, RoleMap, pad_batch, pad_groups

HEAD_AXES = ["example", "layer", "head"]


def attention_allocation(
    model: nn.Module,
    maps: Sequence[RoleMap],
    *,
    batch_size: int,
    pad_token_id: int,
    layers: Sequence[int] | None = None,
    steering_alpha: float | None = None,
    variant: Variant = "standard",
    groups: Sequence[Groups] | None = None,
) -> pd.DataFrame:
    """Attention of the last token, which yields the first token of the answer, summed by role.

    A tidy frame `example, layer, head, role, attention_allocation`: examples numbered as in `maps`, fractions in
    [0, 1] that sum to one over the roles. With `groups`, one grouping per map, attention is summed by group instead,
    and the column `role` has the groups' names. With a `steering_alpha` it is steered to the user's tokens. Only the
    layers asked for and those below them are run.

    Raises InputError for no examples, groupings that do not match the maps, and if memory runs out.
    Reference: Wang et al. 2024, section 2.2.
    """
    if not maps:
        raise InputError("there is nothing to measure: give at least one example")
    groups = [Groups(ROLES, one.roles) for one in maps] if groups is None else groups
    names = groups[0].names
    if [len(one.ids) for one in groups] != [len(one) for one in maps] or any(one.names != names for one in groups):
        raise InputError("attention_allocation: give one grouping per example, all with the same names")
    device = next(model.parameters()).device
    by_length = sorted(range(len(maps)), key=lambda i: len(maps[i]))
    frames = []
    for start in range(0, len(maps), batch_size):
        examples = by_length[start : start + batch_size]
        batch = pad_batch([maps[i] for i in examples], pad_token_id, side="right")
        roles = batch.roles.to(device)
        steering = nullcontext()
        if steering_alpha is not None:
            steering = steer_attention(model, roles == Role.USER, steering_alpha, variant)
        chosen = range(model.config.get_text_config().num_hidden_layers) if layers is None else layers
        grouped = pad_groups([groups[i] for i in examples]).to(device)
        recorder = record_allocation(model, grouped, layers=chosen, stop_after=max(chosen), names=names)
        # Padding is on the right, where no causal query sees it: without a mask the fast causal kernels stay in use.
        less_memory = memory_advice("models.batch_size down")
        with less_memory, torch.inference_mode(), steering, recorder as recording:
            model(input_ids=batch.input_ids.to(device), use_cache=False)
        frames.append(_tidy(recording.allocation[:, :, :, -1].cpu(), recording.layers, examples, names))
    return pd.concat(frames).sort_values(HEAD_AXES, kind="stable", ignore_index=True)


def renormalise(frame: pd.DataFrame) -> pd.DataFrame:
    """The same frame without the template's tokens, the other roles scaled to sum to one.

    Reference: Wang et al. 2024, section 2.2, which has no system text: if there is one it keeps its share.
    """
    kept = frame[frame.role != "template"].reset_index(drop=True)
    total = kept.groupby(HEAD_AXES).attention_allocation.transform("sum")
    return kept.assign(attention_allocation=kept.attention_allocation / total)


def attention_shift(with_template: pd.DataFrame, without_template: pd.DataFrame) -> pd.DataFrame:
    """Change of each role's share when the template is put on, paired by example, layer and head.

    A tidy frame `example, layer, head, role, with_template, without_template, attention_shift`; shares are
    renormalised, the shift is in [-1, 1] and sums to zero over the roles. Reference: Wang et al. 2024, figure 3.
    Raises InputError if an example, layer or head is in one frame only.
    """
    keys = [*HEAD_AXES, "role"]
    sides = [renormalise(side).set_index(keys).attention_allocation for side in (with_template, without_template)]
    paired = pd.concat(sides, axis=1, keys=["with_template", "without_template"])
    if not len(paired) == len(sides[0]) == len(sides[1]):
        raise InputError("the runs with and without template differ in examples, layers or heads; measure both alike")
    return paired.assign(attention_shift=paired.with_template - paired.without_template).reset_index()


def retrieval_head(without_template: pd.DataFrame) -> pd.DataFrame:
    """The head that attends most to the user's tokens: one row `example, layer, head` for each example and layer.

    Chosen on the run without the template, as in the paper: at_heads(frame, retrieval_head(plain)) then selects the
    same heads of any frame. Reference: Wang et al. 2024, appendix B.3.
    """
    user = without_template[without_template.role == "user"]
    best = user.groupby(["example", "layer"]).attention_allocation.idxmax()
    return user.loc[best, HEAD_AXES].reset_index(drop=True)


def retrieval_head_of_others(without_template: pd.DataFrame) -> pd.DataFrame:
    """The head that attends most to the user's tokens in the mean over other examples: rows as `retrieval_head`.

    The examples are halved by turns; each half takes, layer by layer, the head that was best on the other half. A head
    chosen on the values that are then compared is biased to fall; this one is not. Raises InputError for one example.
    """
    user = without_template[without_template.role == "user"]
    half = user.example.map({example: place % 2 for place, example in enumerate(sorted(user.example.unique()))})
    if half.nunique() < 2:
        raise InputError("one example: a head cannot be chosen on others; measure at least two")
    means = user.groupby([half.rename("half"), "layer", "head"]).attention_allocation.mean().unstack("head")
    best = means.idxmax(axis=1).rename("head").reset_index()
    chosen = user[["example", "layer"]].assign(half=1 - half).drop_duplicates()
    return chosen.merge(best, on=["half", "layer"])[HEAD_AXES].sort_values(HEAD_AXES, ignore_index=True)


def at_heads(frame: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """The rows of a frame that belong to the given heads, as `retrieval_head` returns them."""
    return frame.merge(heads, on=HEAD_AXES, validate="many_to_one")


def mean_over_heads(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over heads of every number of an allocation or shift frame, per example, layer and role."""
    keys = ["example", "layer", "role"]
    return frame.drop(columns="head").groupby(keys, sort=False, as_index=False).mean()


def role_shift(shift: pd.DataFrame, role: str, layers: Sequence[int]) -> dict[str, pd.Series]:
    """Every example's shift of one role: at each of the layers ("layer 3"), and as the "mean over layers" of all.

    shift: rows example, layer, role, attention_shift, one for each example, layer and role, as `mean_over_heads` gives
        them. The values are in [-1, 1], indexed by example. Raises InputError for a layer that was not measured.
    """
    by_layer = shift[shift.role == role].pivot(index="example", columns="layer", values="attention_shift")
    if missing := set(layers) - set(by_layer.columns):
        raise InputError(f"layer {min(missing)} was not measured; choose of {by_layer.columns.tolist()}")
    return {f"layer {layer}": by_layer[layer] for layer in layers} | {"mean over layers": by_layer.mean(axis=1)}


def _tidy(
    allocation: Float32[Tensor, "layer example head role"],
    layers: Sequence[int],
    examples: Sequence[int],
    names: Sequence[str],
) -> pd.DataFrame:
    axes = {"layer": layers, "example": examples, "head": range(allocation.shape[2]), "role": names}
    cells = pd.MultiIndex.from_product(axes.values(), names=axes)
    frame = pd.Series(allocation.double().flatten().numpy(), index=cells, name="attention_allocation").reset_index()
    return frame[[*HEAD_AXES, "role", "attention_allocation"]]
