"""What the notebooks read, write and train on, in rows and tokens, told from the parameters."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ctxlib import experiment
from ctxlib.commands.plan.questions import MT_BENCH, SAMPLED, Texts, how, length, needle_kinds
from ctxlib.finetune import BATCHES_GROUPED, training_order
from ctxlib.paper import DATASETS, table_2
from ctxlib.params import TRAINED_MODELS, Finetune, InputError, Params

SCORE_PASSES = 1 + 5 / 3  # 02 scores all conversations once, and every third in five readings


@dataclass(frozen=True)
class Step:
    """Rows that one model reads (and writes at most `new_tokens` for each). nan: not known."""

    notebook: str
    what: str
    model: str
    kind: str  # answer, read, score, train
    rows: int | float
    length: int | float  # mean, in tokens
    new_tokens: int = 0
    padding: int | float = 1  # tokens computed for one that is read
    attended: int | float | None = None  # positions of a row that causal attention is computed over; None: `length`

    @property
    def tokens(self) -> int | float:
        return self.rows * self.length


def steps(params: Params, conversations: Texts, questions: dict[str, Texts]) -> list[Step]:
    """All steps in the order of the notebooks. A question that was answered before comes from the cache: no row."""
    return _Plan(params, conversations, questions).steps()


class _Plan:
    def __init__(self, params: Params, conversations: Texts, questions: dict[str, Texts]):
        self.params, self.conversations, self.questions = params, conversations, questions
        self.asked: set[tuple] = set()
        self.needles = min(params.allocation.prompts, questions["needle"].n)

    def steps(self) -> list[Step]:
        raw, chat = {"template": False}, {"template": True}
        allocations = len({0.95, *self.params.steering.alphas} - {1.0})
        everything = tuple(self.questions)
        found = [
            self._ask("00", "pretrained", ("facts", "needle"), **raw),
            *(self._ask("01", "pretrained", ("needle",), prefix=p, **raw) for p in (False, True)),
            *(self._ask("01", "instruct", ("needle",), prefix=p, **t) for t in (chat, raw) for p in (False, True)),
            self._read("01", "instruct", 6),
            *(
                self._ask("01", "instruct", ("needle", "facts", "instructions"), alpha=alpha, **chat)
                for alpha in self.params.steering.alphas
            ),
            Step("02", "scores", "seed_model", "score", SCORE_PASSES * self.conversations.n, self.conversations.length),
            *(self._train(name) for name in TRAINED_MODELS),
            *(
                self._ask("04", name, everything, indicator=indicator, **template)
                for template in (chat, raw)
                for name, indicator in (("vanilla", False), ("indicator", False), ("indicator", True))
            ),
            self._ask("04", "pretrained", everything, **raw),
            *(self._read("04", *each) for each in (("vanilla", 4 + allocations), ("indicator", 6), ("pretrained", 2))),
        ]
        return _merged([step for step in found if step.rows])

    def _ask(
        self, notebook: str, model: str, families: tuple[str, ...], alpha: int | float | None = None, **how
    ) -> Step:
        """Answers to the questions of some families that this model was not asked in this way before."""
        how = {"prefix": False, "indicator": False} | how
        rows, tokens, new_tokens = 0.0, 0.0, 0.0
        for family in families:
            texts = self.questions[family]
            key = (model, family, alpha, *sorted(how.items()))
            if key in self.asked or not texts.n:
                continue
            self.asked.add(key)
            per_task = self.params.steering.per_task * (needle_kinds(self.params) if family == "needle" else 1)
            n = texts.n if alpha is None else min(texts.n, per_task)
            rows, tokens, new_tokens = rows + n, tokens + n * texts.length, new_tokens + n * texts.max_new_tokens
        steered = "" if alpha is None else ", steered"
        return Step(
            notebook,
            f"answers{steered}",
            model,
            "answer",
            rows,
            tokens / rows if rows else 0,
            math.ceil(new_tokens / rows) if rows else 0,
        )

    def _read(self, notebook: str, model: str, times: int) -> Step:
        return Step(notebook, "attention", model, "read", times * self.needles, self.questions["needle"].length)

    def _train(self, name: str) -> Step:
        """Packed, all conversations of a batch attend to all of them, behind a mask: twice what is causal."""
        section, texts = self.params.finetune, self.conversations
        rows = section.steps and section.steps * section.batch_size * section.gradient_accumulation
        packed = 2 * section.batch_size * texts.length if section.packing and section.batch_size > 1 else None
        return Step(
            "03",
            "training",
            name,
            "train",
            rows or texts.n * section.epochs,
            texts.length,
            padding=padding(section, texts.lengths),
            attended=packed,
        )


def padding(section: Finetune, lengths: Sequence[int]) -> float:
    """Tokens computed for one that is read, at least 1: padded, a batch is as long as its longest conversation.

    Of the order in which `finetune` takes conversations, drawn from a sample of `lengths`; 1 where none is known.
    """
    if section.packing or section.batch_size == 1 or not lengths:
        return 1.0
    effective = section.batch_size * section.gradient_accumulation
    n = 4 * BATCHES_GROUPED * effective
    drawn = random.Random(0).choices(lengths, k=n)
    order = training_order(drawn, effective, n, seed=0, group_by_length=section.group_by_length)
    batches = [[drawn[row] for row in order[i : i + section.batch_size]] for i in range(0, n, section.batch_size)]
    return sum(len(batch) * max(batch) for batch in batches) / sum(drawn)


def afterwards(params: Params, positions: int) -> list[Step]:
    """MT-Bench of the paper's Table 3, which no notebook runs: both turns, vanilla and with the indicator.

    None for the miniature, whose models know few words, nor where its longest question leaves no room in the window.
    """
    new_tokens = MT_BENCH.room(positions)
    if params.needle.source == experiment.EMBEDDED or new_tokens < 1:
        return []
    length = MT_BENCH.length(new_tokens)
    return [Step("after", "MT-Bench", name, "answer", 2 * MT_BENCH.n, length, new_tokens) for name in TRAINED_MODELS]


def _merged(found: list[Step]) -> list[Step]:
    """Steps that differ only in their rows, put together."""
    groups: dict[tuple, list[Step]] = {}
    for step in found:
        groups.setdefault((step.notebook, step.what, step.model), []).append(step)
    merged = []
    for group in groups.values():
        if len(group) == 1:
            merged += group
            continue
        rows = sum(step.rows for step in group)
        mean = {
            name: sum(step.rows * getattr(step, name) for step in group) / rows for name in ("length", "new_tokens")
        }
        merged.append(replace(group[0], rows=rows, length=mean["length"], new_tokens=math.ceil(mean["new_tokens"])))
    return merged


def conversation_texts(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    """Number and length of the conversations, cut at `conversations.max_length`.

    Counted on the data where they are here, their tokens on 200 conversations evenly spread; else the paper's Table 2.
    Raises InputError for bad data.
    """
    section = params.conversations
    limit = section.max_length
    if section.source == experiment.EMBEDDED or params.path(section.source).exists():
        corpus = experiment.conversations(params)
        if not corpus.conversations:
            raise InputError(f"{section.source}: every row was dropped; there is nothing to plan")
        sampled = experiment.spread(corpus.conversations, SAMPLED)
        lengths = tuple(min(limit, length(conversation.messages, tokenizer)) for conversation in sampled)
        source = f"counted here, {how(tokenizer)} of {len(sampled)}"
        source += "".join(f"; {n:,} × {reason}" for reason, n in corpus.dropped.itertuples(index=False))
        return Texts(len(corpus.conversations), sum(lengths) / len(lengths), limit, source, lengths=lengths)
    if section.source in DATASETS:
        row = table_2().set_index("dataset").loc[DATASETS[section.source]]
        n = int(min(row.conversations, section.n or row.conversations))
        source = (
            "the paper's Table 2, in TinyLlama's tokens; less where they are cut; padding as if spread exponentially"
        )
        mean = min(limit, float(row.tokens_per_conversation))
        return Texts(n, mean, limit, source, lengths=_spread_lengths(mean, limit))
    n = section.n or math.nan
    return Texts(n, limit, limit, "not here and not in the paper: at most max_length tokens each")


def _spread_lengths(mean: float, limit: int) -> tuple[int, ...]:
    """Quantiles of an exponential distribution of that mean, cut at the limit: an assumption, to tell padding by."""
    return tuple(min(limit, math.ceil(-mean * math.log(1 - (i + 0.5) / SAMPLED))) for i in range(SAMPLED))
