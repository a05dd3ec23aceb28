"""Between the base and the tuned model: one scalar on the adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from peft.tuners.lora import LoraLayer
from torch import nn

from ctxlib.conversations import Question
from ctxlib.cures.cure import Ask, Cure
from ctxlib.models import Subject
from ctxlib.params import InputError


@dataclass(frozen=True)
class WiseFT(Cure):
    r"""Weights between base and tuned model, $\theta = \theta_0 + \lambda (\theta_1 - \theta_0)$.

    Under LoRA that is one scalar on every update: λ · (α / r) B A. Reference: Wortsman et al. 2022 (arXiv 2109.01903),
    whose default is λ = 0.5.
    """

    strength: float = 0.5
    name: str = "WiSE-FT"
    over_adapter: ClassVar[bool] = True

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        with adapter_scaled(subject.model, self.strength):
            return ask(subject, questions)


@contextmanager
def adapter_scaled(model: nn.Module, strength: float) -> Iterator[None]:
    """Every LoRA update times `strength` while the block runs: 0 is the base model, 1 the tuned one.

    Rows of an indicator are left as they are. Raises InputError for a model without LoRA.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise InputError("WiSE-FT needs an adapter over its base model; fine-tune with finetune.method lora or qlora")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({adapter: scale * strength for adapter, scale in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
