"""A trial resolved: its parameters, what it depends on, and the folder of its results."""

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ctxlib import experiment, models
from ctxlib.conversations import Corpus
from ctxlib.cures import key, overrides
from ctxlib.evidence.trials.definition import Trial
from ctxlib.files import digest
from ctxlib.params import Params
from ctxlib.scoring import corpus_hash

VERSION = 1  # raise it with a change of code after which a trial would come out otherwise
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Plan:
    """A trial of an experiment, resolved once: nothing here is trained or scored yet.

    Two plans with the same `description` give the same model, and share a `folder`.
    """

    experiment: Params
    trial: Trial

    @cached_property
    def params(self) -> Params:
        """The experiment's parameters with the trial's changes."""
        return self.experiment.changed(self.trial.changes)

    @cached_property
    def base(self) -> "Plan | None":
        """The trial whose model is trained further."""
        return self.trial.base and Plan(self.experiment, self.trial.base.at_seed(self.params.seed))

    @cached_property
    def scorer(self) -> "Plan":
        """The trial whose model scores the turns."""
        if self.trial.seed_model is None:
            seed_model = {"models.pretrained": self.experiment.models.seed_model}
            return Plan(self.experiment, Trial(seed_model, trained=False))
        return Plan(self.experiment, self.trial.seed_model.at_seed(self.params.seed))

    @cached_property
    def corpus(self) -> Corpus:
        """The conversations, without marks."""
        return self._corpus_and_hash[0]

    @cached_property
    def description(self) -> dict[str, Any]:
        """Everything that can change the trial's model: values, and hashes of models, texts and scores."""
        its, trial = self.params, self.trial
        start = models.model_hash(experiment.model_path(its, "pretrained")) if not self.base else self.base.key
        found = {"version": VERSION, "packages": {name: version(name) for name in PACKAGES}, "threads": its.threads}
        found |= {
            "base": start,
            "template": its.models.chat_template and its.path(its.models.chat_template).read_text(),
        }
        found |= its.models.model_dump(include={"dtype", "quantisation", "attention"})
        if not trial.trained:
            return found
        found |= {"seed": its.seed, "conversations": self._corpus_and_hash[1]}
        found |= {"max_length": its.conversations.max_length}
        found |= {"finetune": its.finetune.model_dump(exclude={"save_every"}), "marks": trial.marks}
        if trial.marks:
            found |= {"indicator": its.models.indicator}
        if trial.closing is not None:
            found |= {"closing": trial.closing}
        if trial.freeze_indicator:
            found |= {"freeze_indicator": True}
        if trial.cure and overrides(trial.cure, "corpus", "turn_loss"):
            found |= {"cure": key(trial.cure, "corpus", "turn_loss"), "scores": digest(self.scoring)}
        if trial.marks in ("score", "random"):
            share = trial.marked_share
            picked = {"threshold": its.scoring.threshold} if share is None else {"share": share}
            found |= {"scores": digest(self.scoring), "layer": its.scoring.layer, **picked}
        return found

    @cached_property
    def scoring(self) -> dict[str, Any]:
        """Everything that can change the scores of the trial's turns."""
        return {
            "seed_model": self.scorer.key,
            "conversations": self._corpus_and_hash[1],
            "max_length": self.params.conversations.max_length,
            **self.params.scoring.model_dump(include={"variant", "head_reduction", "token_budget"}),
        }

    @cached_property
    def key(self) -> str:
        return digest(self.description)

    @property
    def folder(self) -> Path:
        """Where the trial's model and answers are stored."""
        return self.experiment.output_dir / "work" / "trials" / self.key

    @property
    def scores_folder(self) -> Path:
        """Where the scores of its turns are stored; trials that score the same turns alike share them."""
        return self.folder.with_name(digest(self.scoring))

    def cost(self) -> float | None:
        """Processor seconds of the trial's training; None if it was not measured, or interrupted."""
        file = self.folder / "cost.json"
        return json.loads(file.read_text(encoding="utf-8"))["cpu_seconds"] if file.exists() else None

    @cached_property
    def _corpus_and_hash(self) -> tuple[Corpus, str]:
        its = self.params.changed({"seed": self.params.seed + self.trial.data_seed_offset})
        key = digest([its.conversations.model_dump(), its.miniature.model_dump(), its.seed])
        if key not in _corpora:
            corpus = experiment.conversations(its)
            _corpora[key] = corpus, corpus_hash(corpus)
        return _corpora[key]


_corpora: dict[str, tuple[Corpus, str]] = {}  # conversations and the hash of their texts, shared by all plans
