"""The description of a trial: one fine-tuning run, and the ways in which its model is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import transformers

from ctxlib import experiment
from ctxlib.cures import Cure
from ctxlib.params import InputError, Params

Marks = Literal["score", "oracle", "random"]


@dataclass(frozen=True)
class Trial:
    """A fine-tuning run: what differs from the experiment's parameters, and which turns are marked.

    changes: parameters in dotted form, such as `{"seed": 3, "finetune.steps": 600, "scoring.layer": 2}`. Without a seed
        it has that of the trial it belongs to, or of `run`.
    marks: none; by `score`, over `scoring.threshold` or, if given, the `marked_share` with the highest scores; by the
        `oracle`, which is the truth; or at `random`, as many as the score would mark.
    seed_model: the trial whose model scores the turns; none: the model `models.seed_model`.
    base: the trial whose model is trained further; none: the model `models.pretrained`.
    trained: False for the base model itself.
    closing: replaces the full stop, question or exclamation mark at the end of the user's texts in training, such as
        "." or an empty text; none: texts stay as they are. Turns are scored and marked before, on the original texts.
    freeze_indicator: whether the indicator's row stays at the mean of the embeddings, as in `finetune`.
    cure: changes the conversations, with the truth and the scores at hand, or what an answer counts in the loss.
    data_seed_offset: is added to the seed when conversations are drawn: other conversations, the same questions, as for
        a second stage after `base`.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    marks: Marks | None = None
    marked_share: float | None = None
    seed_model: "Trial | None" = None
    base: "Trial | None" = None
    trained: bool = True
    closing: str | None = None
    freeze_indicator: bool = False
    data_seed_offset: int = 0
    cure: Cure | None = None

    @property
    def has_indicator(self) -> bool:
        return self.marks is not None or (self.base is not None and self.base.has_indicator)

    def at_seed(self, seed: int) -> "Trial":
        """The trial with this seed, unless it names its own."""
        return replace(self, changes={"seed": seed, **self.changes})


@dataclass(frozen=True)
class Asking:
    """How a model is asked: in the chat template or in raw text, with the indicator after the question, steered.

    closing: replaces the mark at the end of questions, as in `Trial`.
    questions: those of the `town`, which fine-tuning is about, or of the `domains` that no chat covers.
    """

    template: bool = True
    indicator: bool = False
    steering_alpha: float | None = None
    closing: str | None = None
    questions: Literal["town", "domains"] = "town"


VANILLA, PRETRAINED = Trial(), Trial(trained=False)
TEMPLATE, RAW, INDICATED = Asking(), Asking(template=False), Asking(indicator=True)


def open_evidence(params_file: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """`open_experiment` for the notebooks from 06 on; InputError for a file without `evidence` or without the town."""
    params = experiment.open_experiment(params_file, overrides)
    if params.evidence is None:
        raise InputError(f"{params.file}: evidence: null; take params/evidence.yaml, or copy that section from there")
    if {params.conversations.source, params.needle.source} != {experiment.EMBEDDED}:
        raise InputError(f"{params.file}: trials need the truth: conversations.source and needle.source 'miniature'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # a notebook loads hundreds of models
    return params
