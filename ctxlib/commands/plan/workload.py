"""How many rows each step reads: from the parameters, and from a rehearsal how often the notebooks read them."""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ctxlib import experiment
from ctxlib.commands.plan.texts import Texts
from ctxlib.finetune import BATCHES_GROUPED, training_order
from ctxlib.params import TRAINED_MODELS, Finetune, Params, load_params


@dataclass(frozen=True)
class Step:
    """Rows that a model reads, each with at most `new_tokens` of answer. nan: not known."""

    what: str  # scoring, training, answering
    subject: str  # what is read, or the model that is trained
    rows: int | float
    length: int | float  # mean, in tokens
    new_tokens: int = 0
    padding: int | float = 1  # tokens computed for each one read
    attended: int | float | None = None  # positions of a row over which causal attention is computed; None: `length`

    @property
    def tokens(self) -> int | float:
        return self.rows * self.length


def steps(params: Params, texts: Mapping[str, Texts], times: Mapping[str, float]) -> list[Step]:
    """Scoring, training and answering. `times`: how often each family is read, by `rehearsed_times`; default once.

    A packed batch attends to its whole row behind a mask, twice what causal attention computes.
    """
    section, chats = params.finetune, texts["conversations"]
    trained = (section if params.raw_text else section.model_copy(update={"raw_text_share": 0.0})).examples(chats.n)
    packs = section.packs(cuda=True) and section.batch_size > 1
    packed = 2 * section.batch_size * chats.length if packs else None
    padded = padding(section, chats.lengths)
    found = [Step("scoring", "conversations", times.get("conversations", 1) * chats.n, chats.length)]
    found += [Step("training", name, trained, chats.length, padding=padded, attended=packed) for name in TRAINED_MODELS]
    for name, asked in texts.items():
        if asked.family != "conversations":
            rows = times.get(asked.family, 1) * asked.n
            found.append(Step("answering", name, rows, asked.length, asked.max_new_tokens))
    return found


def rehearsed_times(params: Params) -> dict[str, float]:
    """How often the notebooks score a conversation ("conversations") and answer a question, by family.

    Counted in the cached scores and answers of `ctxlib rehearse`; empty if there was no rehearsal. Steered questions
    are a larger part of a rehearsal, so these are upper bounds.
    """
    file = params.output_dir.with_name(f"rehearsal-{params.experiment}") / "params.yaml"
    if not file.is_file():
        return {}
    small = load_params(file)
    work = small.output_dir / "work"
    scored = [set(pd.read_parquet(part).conversation) for part in work.glob("scores/*/*.parquet")]
    answered: Counter[str] = Counter()
    for path in work.glob("answers/*.jsonl"):
        answered.update({json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()})
    if not scored or not answered:
        return {}
    asked = experiment.needles(small, experiment.tokenizer(small)) + experiment.passage_questions(small)
    asked += experiment.fact_questions(small) + experiment.instruction_questions(small)
    n = Counter(question.family for question in asked)
    read = Counter({"conversations": sum(map(len, scored))})
    for question in asked:
        read[question.family] += answered[question.id]
    n["conversations"] = len(experiment.conversations(small).conversations)
    return {family: read[family] / n[family] for family in n}


def padding(section: Finetune, lengths: Sequence[int]) -> float:
    """Tokens computed for each one read, at least 1: a padded batch is as long as its longest conversation.

    Uses the order in which `finetune` takes conversations, drawn from a sample of `lengths`; 1 if none is known.
    """
    if section.packs(cuda=True) or section.batch_size == 1 or not lengths:
        return 1.0
    effective = section.batch_size * section.gradient_accumulation
    n = 4 * BATCHES_GROUPED * effective
    drawn = random.Random(0).choices(lengths, k=n)
    order = training_order(drawn, effective, n, seed=0, group_by_length=section.group_by_length)
    batches = [[drawn[row] for row in order[i : i + section.batch_size]] for i in range(0, n, section.batch_size)]
    return sum(len(batch) * max(batch) for batch in batches) / sum(drawn)
