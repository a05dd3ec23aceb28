"""What the exercises load and ask: shipped models, new needles, one head's vectors, and the committed tables."""

import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ctxlib.conversations import Conversation, Corpus, Question
from ctxlib.generate import answer_questions, question_prompt
from ctxlib.indicator import turn_table
from ctxlib.metrics import score_answers
from ctxlib.miniature import PREFIX, model_source, texts
from ctxlib.miniature.town import Town
from ctxlib.models import Subject, load_model, load_tokenizer, model_hash
from ctxlib.params import InputError, Params, load_params
from ctxlib.roles import PLAIN_SEPARATOR, RoleMap

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "outputs" / "miniature" / "tables"


def load(name: str) -> Subject:
    """A shipped model in float32 with its tokenizer: pretrained, instruct, vanilla or indicator."""
    folder = model_source(f"{PREFIX}{name}")
    return Subject(name, load_model(folder), load_tokenizer(folder), model_hash(folder))


def needles(n: int, kind: str = "contradicting", *, tokens: int = 100, seed: int = 0) -> list[Question]:
    """`n` questions, each about one sentence hidden in the middle of a text; `unknown` ones are about newcomers."""
    return texts.needles(Town(), [tokens], [50], n, seed, [kind])


def instructions(n: int, *, seed: int = 0) -> list[Question]:
    """`n` small tasks with one right answer: reverse, repeat or count words, list things, begin with a word."""
    return texts.instruction_questions(Town(), n, seed)


def prompt(subject: Subject, question: Question, *, template: bool, indicator: str | None = None) -> RoleMap:
    """Token ids and roles of a question up to the word before the value: "Mira grows"."""
    return question_prompt(subject.tokenizer, question, template, indicator, use_prefix=True)


def answers(
    subject: Subject, questions: Sequence[Question], *, template: bool, indicator: str | None = None
) -> pd.DataFrame:
    """Greedy answers, one row a question, with its `keywords`, the memorised `memory`, and the answer's metrics."""
    told = answer_questions(
        subject, questions, template=template, indicator=indicator, use_prefix=False, max_new_tokens=32,
        batch_size=64, stop_text=None if template else PLAIN_SEPARATOR, progress=False,
    )  # fmt: skip
    known = {"keywords": [q.keywords for q in questions], "memory": [q.memory_answer for q in questions]}
    return score_answers(told, questions).assign(**known)


def attention_of(subject: Subject, ids: Int[Tensor, " pos"]) -> Float[Tensor, "layer head query_pos key_pos"]:
    """Every head's pattern as the model itself computes it (transformers' eager attention)."""
    model = subject.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            patterns = model(ids[None], output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    return torch.cat([*patterns]).float().clone()


def query_and_key(
    subject: Subject, ids: Int[Tensor, " pos"], layer: int, head: int
) -> tuple[Float[Tensor, "query_pos width"], Float[Tensor, "key_pos width"]]:
    """One head's queries and keys, rotated to their positions as the model does before it compares them."""
    llama = getattr(subject.model, "get_base_model", lambda: subject.model)().model
    attention, seen = llama.layers[layer].self_attn, {}
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
        for name in "qk"
    ]
    try:
        with torch.inference_mode():
            llama(ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    width = attention.head_dim
    q, k = (seen[name].unflatten(-1, (-1, width)).transpose(1, 2) for name in "qk")
    cos, sin = llama.rotary_emb(q, torch.arange(len(ids))[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q[0, head].clone(), k[0, head // (q.shape[1] // k.shape[1])].clone()  # heads share keys in groups


def table(name: str) -> pd.DataFrame:
    """A committed table of the miniature. Raises InputError if there is none of that name."""
    file = TABLES / f"{name}.csv"
    if not file.is_file():
        raise InputError(f"{file}: no such table; see {TABLES} for their names, or run: make reproduce")
    return pd.read_csv(file)


def scored_turns() -> pd.DataFrame:
    """The miniature's training turns: the score that notebook 02 gave each, and whether it depends on its context."""
    params, corpus = _corpus()
    truth = turn_table(corpus).drop(columns="score")
    scores = table("scores")[["conversation", "turn", "layer", "score"]]
    turns = truth.merge(
        scores[scores.layer == params.scoring.layer], on=["conversation", "turn"], validate="one_to_one"
    )
    return turns.astype({"depends_on_context": bool})


def conversation(turn: pd.Series) -> Conversation:
    """The conversation of a row of `scored_turns`. Raises InputError for one that is not the miniature's."""
    for one in _corpus()[1].conversations:
        if one.id == turn.conversation:
            return one
    raise InputError(f"no conversation {turn.conversation!r} in the miniature; take a row of scored_turns()")


@functools.lru_cache(maxsize=1)
def _corpus() -> tuple[Params, Corpus]:
    params = load_params(ROOT / "params" / "miniature.yaml")
    made = texts.chat_dataset(Town(), params.conversations.n, params.miniature.shares, params.seed)
    return params, Corpus(tuple(made), pd.DataFrame(), "miniature")
