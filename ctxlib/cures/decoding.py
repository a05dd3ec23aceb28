"""Context-aware decoding: what the passage adds to the next token's probability, counted more than once."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch

from ctxlib.conversations import Question
from ctxlib.cures.cure import Ask, Cure
from ctxlib.generate import Batch, question_prompt
from ctxlib.models import Subject
from ctxlib.questions.contexts import without_context
from ctxlib.roles import pad_batch


@dataclass(frozen=True)
class ContextAwareDecoding(Cure):
    r"""With the passage c and the question x, each next token is the greatest of

    $$(1 + \alpha) \log p(y_t \mid c, x, y_{<t}) - \alpha \log p(y_t \mid x, y_{<t})$$

    which is transformers' classifier-free guidance at `guidance_scale` 1 + α, with the prompt without its passage as
    the negative prompt. Questions without a passage are asked as ever. The model reads two prompts and decodes twice.
    Models need relative positions, since transformers passes none for the padded negative prompts.
    Reference: Shi et al. 2023 (arXiv 2305.14739), equation 2, whose α is 0.5 or 1.
    """

    alpha: float = 1.0
    name: str = "context-aware decoding"

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        def around(model: torch.nn.Module, batch: Batch):
            bare = [one if one.context is None else without_context(one) for one in batch.questions]
            maps = [question_prompt(subject.tokenizer, one, True, None, False) for one in bare]
            negative = pad_batch(maps, batch.pad_id, side="left")
            return nullcontext(
                {
                    "guidance_scale": 1.0 + self.alpha,
                    "negative_prompt_ids": negative.input_ids.to(model.device),
                    "negative_prompt_attention_mask": negative.attention_mask.to(model.device),
                }
            )

        with_passage = [one for one in questions if one.context is not None]
        if not with_passage:
            return ask(subject, questions)
        others = [one for one in questions if one.context is None]
        parts = [ask(subject, with_passage, around=around), *([ask(subject, others)] if others else [])]
        return pd.concat(parts).set_index("id", drop=False).loc[[one.id for one in questions]].reset_index(drop=True)
