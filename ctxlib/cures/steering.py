"""Cures that weight the user's tokens up in attention, without any training."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from ctxlib.attention import steer_to_share
from ctxlib.conversations import Question
from ctxlib.cures.cure import Ask, Cure
from ctxlib.generate import Batch
from ctxlib.models import Subject
from ctxlib.roles import Role


@dataclass(frozen=True)
class Steering(Cure):
    """All keys but the user's weighted down by `steering_alpha` in [0, 1]. Reference: the paper, section 2.3."""

    steering_alpha: float = 0.03
    name: str = "steering, fixed α"

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        return ask(subject, questions, steering_alpha=self.steering_alpha)


@dataclass(frozen=True)
class TargetShare(Cure):
    """Every query that pays the user's tokens less than `share` of its attention pays them that much.

    The bias is solved for each row (`attention.steer_to_share`). Reference: Venkateswaran and Contractor 2025 (arXiv
    2505.12025, Spotlight), whose bias log(share / current share) falls short of the share after renormalising.
    """

    share: float = 0.9
    name: str = "steering, target share"

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        def around(model: torch.nn.Module, batch: Batch):
            return steer_to_share(model, (batch.roles.roles == Role.USER).to(model.device), self.share)

        return ask(subject, questions, around=around)
