"""What the notebooks read, write and train on, in rows and tokens, told from the parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ctxlib import experiment
from ctxlib.conversations import Message, Question
from ctxlib.paper import table_2
from ctxlib.params import InputError, Params
from ctxlib.roles import role_map

SAMPLED = 200  # texts whose tokens are counted
CHARACTERS_PER_TOKEN = 4  # where no tokenizer is here
FRAME = 80  # tokens of a needle's prompt beside its text: instruction, question, response prefix, template
PASSAGE_PROMPT = 220  # tokens of a SQuAD question with its passage, where no file is here
TABLE_2 = {
    "ucla-cmllab/vicuna_cleaned": "ShareGPT",
    "ucla-cmllab/ultrachat_200k": "UltraChat-200K",
    "yihanwang617/WizardLM_70k_unfiltered": "WizardLM-70K",
}
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

    @property
    def tokens(self) -> int | float:
        return self.rows * self.length


@dataclass(frozen=True)
class Texts:
    """How many texts there are, their mean and greatest length in tokens, and where that is known from."""

    n: int | float
    length: int | float
    longest: int | float
    source: str
    max_new_tokens: int = 0


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
            *(self._train(name) for name in ("vanilla", "indicator")),
            *(
                self._ask("04", name, everything, indicator=indicator, **template)
                for template in (chat, raw)
                for name, indicator in (("vanilla", False), ("indicator", False), ("indicator", True))
            ),
            self._ask("04", "pretrained", everything, **raw),
            *(self._read("04", *each) for each in (("vanilla", 3 + allocations), ("indicator", 4), ("pretrained", 1))),
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
            per_task = self.params.steering.per_task * (_needle_kinds(self.params) if family == "needle" else 1)
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
        section = self.params.finetune
        rows = section.steps and section.steps * section.batch_size * section.gradient_accumulation
        n = rows or self.conversations.n * section.epochs
        return Step("03", "training", name, "train", n, self.conversations.length)


def _merged(found: list[Step]) -> list[Step]:
    """Steps that differ only in their rows, put together."""
    groups: dict[tuple, list[Step]] = {}
    for step in found:
        groups.setdefault((step.notebook, step.what, step.model), []).append(step)
    merged = []
    for group in groups.values():
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
        lengths = [min(limit, _length(conversation.messages, tokenizer)) for conversation in sampled]
        source = f"counted here, {_how(tokenizer)} of {len(sampled)}"
        source += "".join(f"; {n:,} × {reason}" for reason, n in corpus.dropped.itertuples(index=False))
        return Texts(len(corpus.conversations), sum(lengths) / len(lengths), limit, source)
    if section.source in TABLE_2:
        row = table_2().set_index("dataset").loc[TABLE_2[section.source]]
        n = int(min(row.conversations, section.n or row.conversations))
        source = "the paper's Table 2, in TinyLlama's tokens; less where they are cut"
        return Texts(n, min(limit, float(row.tokens_per_conversation)), limit, source)
    n = section.n or math.nan
    return Texts(n, limit, limit, "not here and not in the paper: at most max_length tokens each")


def question_texts(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Texts]:
    """Number and length of the questions by family; needles by their cells, the others by the questions themselves."""
    section = params.needle
    sources = params.qa.sources
    passages = Texts(len(sources) * params.qa.n, PASSAGE_PROMPT, 4 * PASSAGE_PROMPT, "assumed")
    if all(source == experiment.EMBEDDED or params.path(source).exists() for source in sources):
        passages = _measured(experiment.passage_questions(params), tokenizer)
    families = {
        "needle": Texts(
            len(section.lengths) * len(section.depths) * section.per_cell * _needle_kinds(params),
            sum(section.lengths) / len(section.lengths) + FRAME,
            max(section.lengths) + FRAME,
            f"needle.lengths and {FRAME} tokens around them",
        ),
        "qa": passages,
        "facts": _measured(experiment.fact_questions(params), tokenizer),
        "instructions": _measured(experiment.instruction_questions(params), tokenizer),
    }
    limits = {"needle": section, "instructions": params.instructions}
    return {
        name: replace(texts, max_new_tokens=limits.get(name, params.qa).max_new_tokens)
        for name, texts in families.items()
    }


def _needle_kinds(params: Params) -> int:
    """The town's needles are about a newcomer, or contradict memory; a text's are of one kind."""
    return 2 if params.needle.source == experiment.EMBEDDED else 1


def _measured(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    if not questions:
        return Texts(0, 0, 0, "none")
    lengths = [_length(question.messages, tokenizer) for question in experiment.spread(questions, SAMPLED)]
    return Texts(len(questions), sum(lengths) / len(lengths), max(lengths), f"counted here, {_how(tokenizer)}")


def _length(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return math.ceil(sum(len(message.content) for message in messages) / CHARACTERS_PER_TOKEN)
    return len(role_map(tokenizer, messages))


def _how(tokenizer: PreTrainedTokenizerBase | None) -> str:
    return f"{CHARACTERS_PER_TOKEN} characters a token" if tokenizer is None else "tokens"
