"""Which heads attend less to the needle, and how recall changes when they are knocked out, steered or patched.

Every question is asked with its right answer appended, so that one pass gives both the model's prediction at each
token of the answer and its attention there. A `Change` is an intervention on the model during that pass:

    recalled(reader, without_passage([(4, 0)]))               # knocked out: the answer's tokens do not see the passage
    recalled(reader, steered([(4, 0)], 0.1))                  # steered to the user's tokens
    recalled(reader, with_outputs([(4, 0)], outputs(other)))  # patched: its output is that of another condition

A change ends with the pass, and nothing is cached.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ctxlib.allocation import attention_allocation
from ctxlib.attention import Head, patch_outputs, record_outputs, steer_attention
from ctxlib.conversations import Question
from ctxlib.evidence import trials
from ctxlib.evidence.trials import Asking, Trial
from ctxlib.generate import question_prompt
from ctxlib.params import InputError, Params
from ctxlib.questions.needle import needle_groups
from ctxlib.roles import QUESTION_GROUPS, RoleMap, pad_batch, pad_groups, question_groups

PASSAGE, QUESTION = QUESTION_GROUPS.index("passage"), QUESTION_GROUPS.index("question")


@dataclass(frozen=True)
class Forced:
    """A question as the model reads it, followed by the right answer up to the last token but one of its value."""

    question: Question
    prompt: RoleMap
    value: Int[Tensor, " token"]

    @property
    def answer_tokens(self) -> int:
        """Number of positions that yield a token of the answer: the prompt's last token, and all after it."""
        asked = sum(len(message.content) for message in self.question.messages)
        return 1 + int((self.prompt.chars[:, 0] >= asked).sum())


@dataclass(frozen=True)
class Batch:
    """Some of a reader's questions: their tokens, grouped as QUESTION_GROUPS (-1: padding).

    rows: the positions that yield the answer's tokens, -1 for none.
    """

    input_ids: Int[Tensor, "batch pos"]
    groups: Int[Tensor, "batch pos"]
    rows: Int[Tensor, "batch row"]
    examples: slice


Change = Callable[[nn.Module, Batch], AbstractContextManager]


@dataclass(frozen=True)
class Reader:
    """A model and the questions as it reads them."""

    model: nn.Module
    forced: Sequence[Forced]
    pad_token_id: int
    batch_size: int

    @property
    def heads(self) -> list[Head]:
        config = self.model.config
        return [(i, j) for i in range(config.num_hidden_layers) for j in range(config.num_attention_heads)]

    def batches(self) -> Iterator[Batch]:
        """In the order of the questions, padded on the right."""
        most = max(one.answer_tokens for one in self.forced)
        for start in range(0, len(self.forced), self.batch_size):
            some = self.forced[start : start + self.batch_size]
            ends = torch.tensor([[len(one.prompt), one.answer_tokens] for one in some])
            back = torch.arange(most, 0, -1)
            rows = torch.where(back <= ends[:, 1:], ends[:, :1] - back, -1)
            ids = pad_batch([one.prompt for one in some], self.pad_token_id, "right").input_ids
            groups = pad_groups([question_groups(one.prompt, one.question.messages) for one in some])
            yield Batch(ids, groups, rows, slice(start, start + len(some)))

    def run(self, batch: Batch, change: AbstractContextManager) -> Float[Tensor, "batch pos token"]:
        """Logits. Padding is on the right, where no causal query sees it."""
        with torch.inference_mode(), change:
            return self.model(input_ids=batch.input_ids.to(self.model.device), use_cache=False).logits.cpu()


def reader(params: Params, trial: Trial, asking: Asking, questions: Sequence[Question]) -> Reader:
    """The trial's model, trained first if need be, and the questions as it is to be asked.

    The answer is the response prefix and the shortest gold answer, the value. Raises InputError for a question without
    a prefix, and for a tokenizer that joins prefix and value in one token.
    """
    subject = trials.tuned(trials.Plan(params, trial))
    indicator = params.models.indicator if asking.indicator else None
    forced = []
    for question in questions:
        if not question.response_prefix:
            raise InputError(f"question {question.id!r} has no response_prefix: its answer cannot be appended")
        said = replace(question, response_prefix=f"{question.response_prefix} {min(question.answers, key=len)}")
        given, whole = (
            question_prompt(subject.tokenizer, one, asking.template, indicator, True) for one in (question, said)
        )
        if whole.ids[: len(given)].tolist() != given.ids.tolist():
            raise InputError(f"question {question.id!r}: the tokenizer joins response_prefix and value; use another")
        forced.append(Forced(question, whole.truncate(len(whole) - 1), whole.ids[len(given) :]))
    return Reader(subject.model.eval(), forced, subject.tokenizer.pad_token_id, params.models.batch_size)


def halves(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Two halves with the same kinds, lengths and depths, taken in turn: one to choose on, one to test on."""
    by_kind = sorted(questions, key=lambda question: question.kind)
    return by_kind[::2], by_kind[1::2]


def needle_attention_by_head(of: Reader) -> pd.DataFrame:
    """Attention of the token that yields the value's first token to the needle: id, layer, head, value.

    Fractions of all attention, in [0, 1]. Raises InputError as `needle_groups` does.
    """
    maps = [one.prompt.truncate(len(one.prompt) - len(one.value) + 1) for one in of.forced]
    groups = [needle_groups(prompt, one.question) for prompt, one in zip(maps, of.forced, strict=True)]
    frame = attention_allocation(of.model, maps, groups=groups, batch_size=of.batch_size, pad_token_id=of.pad_token_id)
    frame = frame[frame.role == "needle"].rename(columns={"attention_allocation": "value"})
    return frame.assign(id=frame.example.map(lambda i: of.forced[i].question.id))[["id", "layer", "head", "value"]]


def head_shift(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Change of each head's mean attention, in [-1, 1]: layer, head, value, n (questions). Frames of the same ones."""
    sides = [side.set_index(["id", "layer", "head"])["value"] for side in (before, after)]
    change = (sides[1] - sides[0]).groupby(["layer", "head"])
    return pd.DataFrame({"value": change.mean(), "n": change.size()}).reset_index()


def lowest(frame: pd.DataFrame, n: int) -> list[Head]:
    """The n heads with the lowest value of a frame `layer, head, value`: of a shift, those that lost most."""
    picked = frame.nsmallest(n, "value")
    return [(int(layer), int(head)) for layer, head in zip(picked["layer"], picked["head"], strict=True)]


def choices(looks: pd.DataFrame, shift: pd.DataFrame, n: int, *, draws: int, seed: int) -> list[tuple[str, list[Head]]]:
    """Choices of n heads, by name: those that `shifted` most, those that `look most`, and as many `random` others.

    `looks` is `needle_attention_by_head` in the condition in which the model reads, `shift` the `head_shift` from
    there. The random ones, `draws` choices, exclude those that shifted. Raises InputError if there are too few others.
    """
    most = looks.groupby(["layer", "head"], as_index=False)["value"].mean()
    shifted, fetching = lowest(shift, n), lowest(most.assign(value=-most["value"]), n)
    others = sorted(set(lowest(shift, len(shift))) - set(shifted))
    if n > len(others):
        raise InputError(f"evidence.head_counts: {n} heads are to be drawn from {len(others)} others; lower it")
    rng = random.Random(f"heads-{n}-{seed}")
    drawn = [("random", rng.sample(others, n)) for _ in range(draws)]
    return [("shifted", shifted), ("look most", fetching), *drawn]


def recalled(of: Reader, change: Change | None = None) -> pd.DataFrame:
    """Whether every token of the value is the likeliest one after the prefix: id, value (1 or 0).

    This equals recall by greedy decoding after the forced prefix, in one pass.
    """
    rows = []
    for batch in of.batches():
        logits = of.run(batch, nullcontext() if change is None else change(of.model, batch))
        for one, its, positions in zip(of.forced[batch.examples], logits, batch.rows, strict=True):
            said = its[positions[-len(one.value) :]].argmax(dim=-1)
            rows.append((one.question.id, float(torch.equal(said, one.value))))
    return pd.DataFrame(rows, columns=["id", "value"])


def outputs(of: Reader) -> Float[Tensor, "layer example row head width"]:
    """Every head's output at the positions of the answer; the last row is the token that yields the value's last."""
    found = []
    for batch in of.batches():
        with record_outputs(of.model, batch.rows) as recording:
            of.run(batch, nullcontext())
        found.append(recording.outputs)
    return torch.cat(found, dim=1)


def without_passage(heads: Collection[Head]) -> Change:
    """Knock-out: the heads' attention from the answer's tokens to the passage is forbidden, the rest scaled up."""
    return lambda model, batch: steer_attention(
        model, batch.groups != PASSAGE, 0, heads=heads, queries=_answering(batch)
    )


def steered(heads: Collection[Head], steering_alpha: int | float) -> Change:
    """The heads' attention steered to the user's tokens at every position, as `steer_attention` does."""
    return lambda model, batch: steer_attention(
        model, torch.isin(batch.groups, torch.tensor([PASSAGE, QUESTION])), steering_alpha, heads=heads
    )


def with_outputs(heads: Collection[Head], source: Float[Tensor, "layer example row head width"]) -> Change:
    """Patch: at the positions of the answer the heads' outputs are those of another reader of the same questions."""
    return lambda model, batch: patch_outputs(model, source[:, batch.examples], batch.rows, heads)


def _answering(batch: Batch) -> Bool[Tensor, "batch pos"]:
    positions = torch.arange(batch.groups.shape[1])
    return (batch.rows[:, :, None] == positions).any(dim=1)
