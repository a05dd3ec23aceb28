"""A loss in which turns count differently, and in which the model may be held to its base."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn

from ctxlib.finetune.labels import IGNORED


def weighted_loss(
    logits: Float[Tensor, "batch pos vocab"],
    reference: Float[Tensor, "batch pos vocab"] | None,
    labels: Int[Tensor, "batch pos"],
    turn_loss: Float[Tensor, "batch pos 2"],
) -> Float[Tensor, ""]:
    r"""Weighted mean over the supervised tokens of cross-entropy and divergence from the reference, in nats.

    $$L = \frac{\sum_t \left[ -w_t \log p_\theta(y_t \mid x_{<t})
      + \lambda_t \, \mathrm{KL}\left(p_\text{ref}(\cdot \mid x_{<t}) \,\|\, p_\theta(\cdot \mid x_{<t})\right) \right]}
      {\sum_t w_t}$$

    With all $w_t = 1$ and $\lambda_t = 0$ that is the usual loss. The last axis of `turn_loss` is (w, λ); no reference:
    all λ are taken as 0. A batch whose weights are all 0 has a loss of 0.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    weight, divergence = turn_loss[:, 1:][supervised].float().unbind(-1)
    predicted = logits[:, :-1][supervised].float().log_softmax(-1)
    total = -(weight * predicted.gather(1, targets[supervised][:, None])[:, 0]).sum()
    if reference is not None:
        expected = reference[:, :-1][supervised].float().log_softmax(-1)
        total = total + (divergence * F.kl_div(predicted, expected, reduction="none", log_target=True).sum(-1)).sum()
    return total / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def batch_loss(model: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, ""]:
    """`weighted_loss` of a batch of `labels.collate`; the reference is the model with its adapter off."""
    inputs = dict(inputs)
    labels, turn_loss = inputs.pop("labels"), inputs.pop("turn_loss")
    reference = None
    if (turn_loss[..., 1] > 0).any():
        adapted: PeftModel = getattr(model, "module", model)
        with torch.no_grad(), adapted.disable_adapter():
            reference = model(**inputs).logits
    return weighted_loss(model(**inputs).logits, reference, labels, turn_loss)
