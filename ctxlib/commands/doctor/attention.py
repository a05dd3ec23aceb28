"""Checks of recording and steering, against the model's eager attention and a closed form."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctxlib.attention import record_allocation, route, steer_attention, verify_recording
from ctxlib.commands.doctor.check import Check
from ctxlib.commands.doctor.talk import TALK, expressible, renders
from ctxlib.roles import Role, RoleBatch, pad_batch, role_map

STEERING_ALPHA = 0.3
# Allowed between two passes: in shares of attention, or in logits relative to the largest. Half precision rounds a
# score to 8 (bfloat16) or 11 bits: one of 16 is then off by up to 0.03 or 0.004, a share by as much of itself, and
# layers add up. In float32 rounding gives 1e-6 to 1e-5; a fault, such as a missing mask, 0.01 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
EXACT = 1e-4  # allowed where both sides are float32 computations on the same queries and keys, whatever the dtype


def attending_layers(model: Any, tokenizer: Any) -> list[int]:
    """The layers with attention that can be recorded: all of them, but for a hybrid model's."""
    batch = _batch(tokenizer, model, "right")
    with torch.inference_mode(), record_allocation(model, batch.roles) as recording:
        model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return recording.layers_with_attention


def check_recording(model: Any, tokenizer: Any, layers: Sequence[int]) -> list[Check]:
    """Against the model's own eager patterns, every head and role of these layers; padded left and right.

    In one and the same pass, where both see the same queries and keys: no rounding, whatever the dtype. And in passes
    of their own, through the backend in use, where half precision lets the roundings of all layers add up.
    """
    same, apart = [], []
    for side in ("left", "right"):
        batch = _batch(tokenizer, model, side)
        apart.append(verify_recording(model, batch.input_ids, batch.roles, layers))
        same.append(_same_pass(model, batch, layers))
    same, apart = float(np.max(same)), float(np.max(apart))  # NaN where there is one
    plain, _ = _forward(model, batch, layers)
    changed = _relative(_forward(model, batch, layers, rows="last")[0], plain)
    tolerance, half = _tolerance(model), model.dtype != torch.float32
    finding = (
        f"differs from eager by {same:.0e} in the same pass (allowed: {EXACT:.0e}), by {apart:.0e} in passes of their "
        f"own ({tolerance:.0e}); padded left and right; {_logits_said(changed)}; all rows: {route(model)}"
    )
    if not (same <= EXACT and changed <= tolerance) or not (apart <= tolerance or half):
        return [Check("recording", "fail", finding, "do not trust it: report this model and use another one")]
    if not apart <= tolerance:
        remedy = "its layers multiply rounding: compare only what was recorded in the same dtype and backend"
        return [Check("recording", "note", finding, remedy)]
    return [Check("recording", "ok", finding)]


@torch.inference_mode()
def _same_pass(model: Any, batch: RoleBatch, layers: Sequence[int]) -> float:
    """Largest difference to the patterns that the eager attention yields in the pass that is recorded.

    All rows and the last ones are recorded, as these are computed in different ways.
    """
    backend, ids = model.config._attn_implementation, batch.input_ids
    model.set_attn_implementation("eager")
    try:
        recorders = (record_allocation(model, batch.roles, rows, layers, precision="exact") for rows in ("all", "last"))
        with next(recorders) as every, next(recorders) as last:
            options = {"attention_mask": batch.attention_mask, "use_cache": False, "output_attentions": True}
            attentions = model(ids, **options).attentions
            patterns = torch.stack([pattern for pattern in attentions if pattern is not None]).float()
    finally:
        model.set_attn_implementation(backend)
    columns = torch.stack([batch.roles == role for role in Role], dim=-1).float()
    real = batch.roles >= 0
    expected = (patterns @ columns[:, None]).where(real[:, None, :, None], 0)
    places = torch.where(real, torch.arange(ids.shape[1], device=ids.device), -1).amax(dim=1)
    of_last = expected[:, range(len(ids)), :, places].movedim(0, 1)[..., None, :]
    return max((every.allocation - expected).abs().max(), (last.allocation - of_last).abs().max()).item()


def check_steering(model: Any, tokenizer: Any, layers: Sequence[int]) -> list[Check]:
    """The first of the layers with attention, whose input steering does not change, against the unsteered shares
    reweighted by role."""
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        finding = f"attention scores are capped at {cap:g}: they can be recorded, not steered"
        return [Check("steering", "note", finding, "leave steering out, or use another model")]
    batch = _batch(tokenizer, model, "left")
    user, everything = batch.roles == Role.USER, batch.roles >= 0
    plain, _ = _forward(model, batch, layers)
    _, shares = _forward(model, batch, layers, rows="all")
    _, steered = _forward(model, batch, layers, steer_attention(model, user, STEERING_ALPHA), rows="all")
    weights = torch.tensor([1 if role == Role.USER else STEERING_ALPHA for role in Role], device=shares.device)
    weighted = shares[0] * weights
    expected = weighted / weighted.sum(-1, keepdim=True).where(everything[:, None, :, None], 1)
    exact = (steered[0] - expected).abs().max().item()
    changes = [
        _relative(_forward(model, batch, layers, steer_attention(model, keep, steering_alpha))[0], plain)
        for keep, steering_alpha in ((user, 1.0), (everything, STEERING_ALPHA))
    ]
    finding = (
        f"differs from the closed form by {exact:.0e} in layer {layers[0]} (allowed: {EXACT:.0e}); alpha 1, or "
        f"to keep every token: {_logits_said(np.max(changes))}"
    )
    fine = exact <= EXACT and np.max(changes) <= _tolerance(model)
    return [Check("steering", "ok" if fine else "fail", finding, "" if fine else "do not steer this model")]


def check_padding(model: Any, tokenizer: Any, layers: Sequence[int]) -> list[Check]:
    """The same tokens, padded left and right, without position ids: rotary positions do not care, absolute ones do.

    In the first of the layers with attention, where no rounding has added up.
    """
    shares = []
    for side in ("left", "right"):
        batch = _batch(tokenizer, model, side)
        _, recorded = _forward(model, batch, layers, rows="all")
        shares.append(recorded[0].transpose(1, 2)[batch.roles >= 0])
    left, right = shares
    difference = (left - right).abs().max().item()
    finding = f"shares in layer {layers[0]} differ by {difference:.0e} between left and right padding"
    if difference <= _tolerance(model):
        return [Check("padding", "ok", finding)]
    remedy = "pad right, as scoring and allocation do; code of your own that pads left must pass position_ids"
    return [Check("padding", "note", finding, remedy)]


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])


def _relative(ours: Float[Tensor, "token vocab"], theirs: Float[Tensor, "token vocab"]) -> float:
    """Largest difference as a fraction of the largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)).item()


def _logits_said(changed: float) -> str:
    return f"logits change by {changed:.0e} of the largest" if changed else "logits stay bit for bit"


def _batch(tokenizer: Any, model: Any, side: str) -> RoleBatch:
    """A conversation and its beginning, padded, on the model's device."""
    of_template = renders(tokenizer)
    talk = expressible(tokenizer) if of_template else TALK
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    maps = [role_map(tokenizer, part, template=of_template) for part in (talk, talk[:-2])]
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    batch = pad_batch([of.truncate(positions or len(of)) for of in maps], pad_id, side)
    return RoleBatch(**{name: tensor.to(model.device) for name, tensor in vars(batch).items()})


@torch.inference_mode()
def _forward(
    model: Any,
    batch: RoleBatch,
    layers: Sequence[int],
    steering: AbstractContextManager | None = None,
    rows: str | None = None,
) -> tuple[Float[Tensor, "token vocab"], Float[Tensor, "layer batch head row role"] | None]:
    """Logits of all tokens, padding left out, and the shares of attention of the `rows` that are to be recorded."""
    recorder = (
        record_allocation(model, batch.roles, rows=rows, layers=layers, precision="exact") if rows else nullcontext()
    )
    with steering or nullcontext(), recorder as recording:
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits[batch.roles >= 0].float(), recording.allocation if rows else None
