"""One question under four contexts: a passage with the true answer, one that contradicts it, an irrelevant one, none.

What a model does with a passage depends on what it knows without one. So each question is first asked without a passage
(its closed-book twin): `known` then says of every other answer whether the model knew it, measured, not assumed.
Reference: Longpre et al. 2021 (arXiv 2109.05052), knowledge conflicts by substituted entities.
"""

import ast
import csv
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ctxlib.conversations import Message, Question
from ctxlib.files import read_text
from ctxlib.metrics import normalise_answer
from ctxlib.params import InputError, expanded
from ctxlib.questions.qa import PASSAGE_PROMPT, Asked, read_questions

FAMILY = "contexts"
KINDS = ("gold", "contradicting", "irrelevant", "no_passage")


def without_context(question: Question) -> Question:
    """The same question without its passage: the first message holds the bare question, all else stays.

    Raises InputError for a question that has no passage.
    """
    if question.context is None or question.question is None:
        raise InputError(f"question {question.id!r}: has no passage that could be left out")
    first, *later = question.messages
    messages = (replace(first, content=question.question), *later)
    return replace(question, messages=messages, context=None, context_length_tokens=None, depth_percent=None)


def of_kinds(
    name: str,
    passages: Mapping[str, str],
    question: str,
    *,
    truth: str | Sequence[str],
    swapped: Sequence[str],
    prompt: str = PASSAGE_PROMPT,
    response_prefix: str = "",
    cluster: str | None = None,
) -> list[Question]:
    """`question` with each of the `passages` (by kind: gold, contradicting, irrelevant), and without any.

    `truth` is what the model may know (the first of several is the memory answer), `swapped` what the contradicting
    passage says instead. The gold answers are what a reader says: the passage's answer where there is one, else the
    truth. Ids are `<kind>-<name>`; the one without a passage is named by the cluster, as it is one question for all
    passages of the cluster.
    """
    truths = (truth,) if isinstance(truth, str) else tuple(truth)
    made = []
    for kind in KINDS:
        if kind in passages:
            text = prompt.format(context=passages[kind], question=question)
        elif kind == "no_passage":
            text = question
        else:
            continue
        answers = tuple(swapped) if kind == "contradicting" else truths
        made.append(
            Question(
                id=f"{kind}-{(cluster or name) if kind == 'no_passage' else name}",
                family=FAMILY,
                kind=kind,
                messages=(Message("user", text),),
                response_prefix=response_prefix,
                answers=answers,
                keywords=tuple(answers[0].split()),
                memory_answer=truths[0],
                context=passages.get(kind),
                question=question,
                cluster=cluster or name,
            )
        )
    return made


def load_contexts(
    source: str | Path, n: int | None = None, seed: int = 0, *, prompt: str = PASSAGE_PROMPT, split: str = "validation"
) -> list[Question]:
    """`n` rows of NQ-Swap (a file or a hub id; None: all), drawn by the seed, under each of `KINDS`.

    The original passage is `gold`, the one with another entity `contradicting`; `irrelevant` is the original passage
    of another drawn question that says neither answer. Rows about the same question are one cluster, and share one
    question without a passage. Raises InputError as `qa.load_questions` does, for rows without `org_context`, and if no
    other passage is irrelevant.
    """
    rows = [one for unit in read_questions(source, split=split) for one in unit]
    if any(row.original is None for row in rows):
        raise InputError(
            f"{source}: expected NQ-Swap's columns question, org_context, org_answer, sub_context, sub_answer; "
            "name its file or hub id"
        )
    drawn = rows if n is None or n >= len(rows) else random.Random(seed).sample(rows, n)
    truths: dict[str, list[str]] = {}
    for row in drawn:
        truths.setdefault(row.question, []).append(row.memory_answer)
    made = {}
    for number, row in enumerate(drawn):
        passages = {"gold": row.original, "contradicting": row.context}
        passages["irrelevant"] = _irrelevant(row, drawn[number + 1 :] + drawn[:number], source)
        swapped = [", ".join(spans) for spans in row.annotations]
        for question in of_kinds(
            row.id, passages, row.question, truth=row.memory_answer, swapped=swapped, prompt=prompt,
            cluster=row.question,
        ):  # fmt: skip
            if question.kind == "no_passage":
                question = replace(question, answers=tuple(dict.fromkeys(truths[row.question])))
            made.setdefault(question.id, question)
    return list(made.values())


def _irrelevant(row: Asked, others: Sequence[Asked], source: str | Path) -> str:
    said = [text.casefold() for text in (row.memory_answer, *(span for spans in row.annotations for span in spans))]
    for other in others:
        passage = other.original.casefold()
        if other.question != row.question and not any(text in passage for text in said):
            return other.original
    raise InputError(f"{source}: no other drawn passage is irrelevant to '{row.question}'; draw more rows")


def load_memo_trap(file: str | Path, n: int | None = None, seed: int = 0) -> list[Question]:
    """`n` rows of a MemoTrap file (None: all), drawn by the seed: an instruction against a memorised text.

    The file is one of its CSVs, with the columns prompt, classes (two endings) and answer_index. The gold answer is the
    ending that was asked for, the memory answer the other, and the kind `contradicting`; the ending is to be generated.
    Reference: github.com/liujch1998/memo-trap. Raises InputError, naming line and column, for any other file.
    """
    table = csv.DictReader(io.StringIO(read_text(expanded(file))))
    if missing := [name for name in ("prompt", "classes", "answer_index") if name not in (table.fieldnames or ())]:
        found = ", ".join(table.fieldnames or ()) or "none"
        raise InputError(f"{file}: no column {missing[0]} (found {found}); give a CSV file of MemoTrap")
    rows = [_trap(row, f"{file}, line {table.line_num}", number) for number, row in enumerate(table, start=1)]
    return rows if n is None or n >= len(rows) else random.Random(seed).sample(rows, n)


def _trap(row: Mapping[str, str], where: str, number: int) -> Question:
    try:
        endings = [ending.strip() for ending in ast.literal_eval(row["classes"])]
        asked = int(row["answer_index"])
        answer, memory = endings[asked], endings[1 - asked]
    except (ValueError, SyntaxError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{where}: classes, answer_index: expected two endings and 0 or 1; correct the row") from error
    if not all(map(normalise_answer, endings)):
        raise InputError(f"{where}: classes {endings}: letters to choose, not endings to generate; take another file")
    name = f"memo-trap-{number}"
    return Question(
        name, FAMILY, "contradicting", (Message("user", row["prompt"]),), answers=(answer,), memory_answer=memory,
        keywords=tuple(answer.split()), cluster=name,
    )  # fmt: skip


def known(scored: pd.DataFrame, questions: Sequence[Question]) -> pd.Series:
    """For every answer, whether the same model gave the true one without a passage: True, False, in the frame's order.

    scored: answers of `score_answers` with id and containment, of one model and condition. Raises InputError if a
    question was not asked without a passage.
    """
    of_id = {question.id: question for question in questions}
    twins = {
        of_id[key].cluster: bool(said)
        for key, said in zip(scored["id"], scored["containment"], strict=True)
        if of_id[key].kind == "no_passage"
    }
    clusters = [of_id[key].cluster for key in scored["id"]]
    if missing := [cluster for cluster in clusters if cluster not in twins]:
        raise InputError(f"known: {missing[0]!r} was not asked without a passage; ask all kinds")
    return pd.Series([twins[cluster] for cluster in clusters], index=scored.index, dtype=bool)
