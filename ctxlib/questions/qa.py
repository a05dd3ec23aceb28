"""Reading comprehension: SQuAD 1.1 and 2.0, QuAC, DROP and NQ-Swap, from official files, rows of them, or the hub."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctxlib.conversations import BadRow, Message, Question, file_rows, hub_rows
from ctxlib.files import read_json
from ctxlib.metrics import CANNOTANSWER, quac_references
from ctxlib.params import InputError, Variant, expanded, locate, nowhere

PASSAGE_PROMPT = "{context}\nAnswer the question according to the above passage: {question}"
PIECES_PROMPT = "{context}\nAnswer the question with pieces from the above passage: {question}"  # QuAC
AUTHORS_PIECES_PROMPT = "{context} \nAnswer the question with pieces from the the above passage: {question}"
PLAIN_PROMPT = "{context} {question}"
_REMEDY = "give qa.sources an official JSON file of SQuAD, QuAC or DROP"
_ROWS = "context, question, answers (SQuAD); passage, question, answer (DROP); turn_ids (QuAC); sub_context (NQ-Swap)"
_TABLES = (".jsonl", ".ndjson", ".parquet", ".jsonl.gz", ".json.gz", ".ndjson.gz")


@dataclass(frozen=True)
class Asked:
    """One question of any of the datasets; `earlier` are the questions and answers before it in its dialogue.

    Of NQ-Swap, `original` is the passage before its entity was swapped, and `memory_answer` what that passage says.
    """

    dataset: Literal["squad", "squad_v2", "quac", "drop", "nq_swap"]
    id: str
    context: str
    question: str
    annotations: tuple[tuple[str, ...], ...]
    dialogue: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    memory_answer: str | None = None
    original: str | None = None


def load_questions(
    source: str | Path,
    n: int | None = None,
    seed: int = 0,
    *,
    prompt: Literal["instruction", "plain"] = "instruction",
    variant: Variant = "standard",
    split: str = "validation",
) -> list[Question]:
    """Questions about passages, ready to be answered and scored: all of them, or `n` drawn by the seed.

    `source` is an official JSON file (SQuAD v1.1, v2.0, QuAC, DROP; recognised by its content), a file of rows (.json,
    .jsonl or .parquet) with the hub's columns, or a hub id, of which the `split` is read: squad, rajpurkar/squad_v2,
    allenai/quac, EleutherAI/drop and others with their columns, also NQ-Swap's (of its passages the one with the
    swapped entity, whose original is the memory answer). The family is `qa`, the kind `squad`, `squad_v2`, `quac`,
    `drop` or `nq_swap`, with `_no_answer` added if the passage holds no answer (of QuAC: if most annotators found
    none). A QuAC file is recognised by any of its own keys; a question without `orig_answer` takes the first answer.

    `prompt` is `instruction`, as for the paper's ShareGPT and WizardLM models, or `plain`, context and question only,
    as for its UltraChat models (paper, Tables 5 and 6). The `variant` matters only for QuAC, whose passage follows
    title and background. `authors_code`: the first question of each dialogue, the final CANNOTANSWER taken from
    the passage, the prompt with its doubled "the" and a space before its line break. `standard`: every question, after
    the earlier ones with their answers as turns, and CANNOTANSWER kept as the piece to answer with if there is no
    answer; dialogues stay whole: as many are drawn as fit into `n` questions.

    Raises InputError, naming file, row or question and key, for a source in another format, answers of the wrong type,
    invalid Unicode, an id given twice, a hub dataset with too little information to score, and an `n` too small for one
    dialogue.
    """
    units = read_questions(source, variant=variant, split=split)
    asked = [one for unit in units for one in unit]
    impossible = any(one.dataset == "squad_v2" for one in asked)
    chosen = asked if n is None or n >= len(asked) else _drawn(source, units, n, seed)
    return [_question(one, "squad_v2" if impossible else one.dataset, prompt, variant) for one in chosen]


def read_questions(
    source: str | Path, *, variant: Variant = "standard", split: str = "validation"
) -> list[list[Asked]]:
    """The questions of a source as `load_questions` reads them: alone, or of one dialogue together.

    Raises InputError as `load_questions` does.
    """
    place = locate(source)
    if place == "nowhere":
        raise InputError(nowhere(source, f"{_REMEDY}, or a hub id"))
    if place == "hub":
        units = list(_hub_units(str(source), split, variant))
    else:
        units = list(_file_units(expanded(source), variant))
    asked = [one for unit in units for one in unit]
    if not asked:
        raise InputError(f"{source}: holds no question; {_REMEDY}")
    for one in asked:
        _check_unicode(one, source)
    times = Counter(one.id for one in asked)
    if repeated := [key for key, count in times.items() if count > 1]:
        raise InputError(f"{source}: the id '{repeated[0]}' names more than one question; give each its own")
    return units


def _check_unicode(asked: Asked, source: str | Path) -> None:
    texts = {"id": asked.id, "context": asked.context, "question": asked.question}
    texts["answers"] = "".join(text for spans in asked.annotations for text in spans)
    for key, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{source}, question {asked.id!r}, {key}: invalid Unicode (a lone surrogate); repair it"
            ) from None


def _drawn(source: str | Path, units: Sequence[Sequence[Asked]], n: int, seed: int) -> list[Asked]:
    rng = random.Random(seed)
    if all(len(unit) == 1 for unit in units):
        return [one for (one,) in rng.sample(units, n)]
    chosen: list[Asked] = []
    for unit in rng.sample(units, len(units)):
        if len(chosen) + len(unit) > n:
            break
        chosen += unit
    if not chosen:
        longest = max(len(unit) for unit in units)
        raise InputError(f"{source}: {n} questions may be less than one whole dialogue; ask for n = {longest} or more")
    return chosen


def _question(asked: Asked, dataset: str, prompt: str, variant: str) -> Question:
    annotations = asked.annotations
    if dataset == "quac":
        answers = quac_references([text for (text,) in annotations])
        instruction = AUTHORS_PIECES_PROMPT if variant == "authors_code" else PIECES_PROMPT
    else:
        answers, instruction = [", ".join(spans) for spans in annotations] or [""], PASSAGE_PROMPT
    wording = instruction if prompt == "instruction" else PLAIN_PROMPT
    said = [text for turn in asked.earlier for text in turn] + [asked.question]
    said[0] = wording.format(context=asked.context, question=said[0])
    unanswered = not annotations or answers == [CANNOTANSWER]
    return Question(
        id=asked.id,
        family="qa",
        kind=f"{dataset}_no_answer" if unanswered else dataset,
        messages=tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)),
        answers=tuple(dict.fromkeys(answers)),
        annotations=annotations,
        dialogue=asked.dialogue,
        memory_answer=asked.memory_answer,
        context=asked.context,
        question=asked.earlier[0][0] if asked.earlier else asked.question,
        cluster=asked.question if dataset == "nq_swap" else None,
    )


def _file_units(path: Path, variant: str) -> Iterator[list[Asked]]:
    if path.name.lower().endswith(_TABLES):
        yield from _table_units(path, file_rows(path), variant)
        return
    content = read_json(path, _REMEDY)
    if isinstance(content, list):
        yield from _table_units(path, file_rows(path), variant)
    elif isinstance(content, dict) and "data" in content:
        for a, article in enumerate(_get(content, "data", list, f"{path}, ")):
            where = f"{path}, data[{a}]."
            for p, paragraph in enumerate(_get(article, "paragraphs", list, where)):
                yield from _paragraph_units(article, paragraph, f"{where}paragraphs[{p}].", variant)
    elif isinstance(content, dict) and any(isinstance(p, dict) and "qa_pairs" in p for p in content.values()):
        for name, passage in content.items():
            where = f"{path}, {name}."
            for q, qa in enumerate(_get(passage, "qa_pairs", list, where)):
                context = _get(passage, "passage", str, where)
                yield [_drop(qa, context, f"{where}qa_pairs[{q}].")]
    else:
        raise InputError(
            f"{path}: in none of the formats (no key 'data', no passages with 'qa_pairs', no list of rows); {_REMEDY}"
        )


def _table_units(path: Path, rows: Iterator[tuple[str, Any]], variant: str) -> Iterator[list[Asked]]:
    for number, (place, row) in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            raise InputError(f"{path}, {row.at(place)}: {row.remedy}")
        yield _row_unit(row, f"{path}, {place}, ", number, variant)


def _paragraph_units(article: dict, paragraph: Any, where: str, variant: str) -> Iterator[list[Asked]]:
    """A QuAC dialogue, or SQuAD's questions one by one."""
    context = _get(paragraph, "context", str, where)
    qas = [(qa, f"{where}qas[{q}].") for q, qa in enumerate(_get(paragraph, "qas", list, where))]
    of_quac = {"orig_answer", "yesno", "followup"}
    is_quac = any(isinstance(qa, dict) and of_quac & qa.keys() for qa, _ in qas) or context.endswith(CANNOTANSWER)
    if not is_quac and "background" not in article:
        yield from ([_squad(qa, context, place)] for qa, place in qas)
        return
    turns = [
        (
            _get(qa, "id", str, place),
            _get(qa, "question", str, place),
            [_get(answer, "text", str, f"{place}answers.") for answer in _get(qa, "answers", list, place)],
            _original(qa, place),
        )
        for qa, place in qas
    ]
    heads = [article.get(key) or "" for key in ("title", "background")]
    yield _dialogue(_get(paragraph, "id", str, where), *heads, context, turns, variant, where)


def _original(qa: dict, place: str) -> str:
    """The answer that a dialogue of QuAC went on with: `orig_answer`, or the first where it was left out."""
    if "orig_answer" in qa:
        return _get(_get(qa, "orig_answer", dict, place), "text", str, f"{place}orig_answer.")
    answers = _get(qa, "answers", list, place)
    if not answers:
        raise InputError(f"{place}answers: none; {_REMEDY}")
    return _get(answers[0], "text", str, f"{place}answers.")


def _hub_units(name: str, split: str, variant: str) -> Iterator[list[Asked]]:
    for number, (place, row) in enumerate(hub_rows(name, split, f"or {_REMEDY}"), start=1):
        yield _row_unit(row, f"{name}, {place}, ", number, variant)


def _row_unit(row: Any, where: str, number: int, variant: str) -> list[Asked]:
    """The question or the dialogue of a row with the hub's columns."""
    if not isinstance(row, dict):
        raise InputError(f"{where}row: expected an object with columns, got {type(row).__name__}; {_REMEDY}")
    if "answers_spans" in row:
        raise InputError(
            f"{where}answers_spans: merges the spans of all annotators, so that DROP's scores cannot be computed; "
            "use EleutherAI/drop, or the official JSON file"
        )
    if "passage" in row:
        return [_drop(row, _get(row, "passage", str, where), where)]
    if "turn_ids" in row:
        ids, questions = (_get(row, key, list, where) for key in ("turn_ids", "questions"))
        answers, originals = (
            [_get(item, "texts", kind, f"{where}{key}.") for item in _items(row, key, "texts", where)]
            for key, kind in (("answers", list), ("orig_answers", str))
        )
        if len({len(column) for column in (ids, questions, answers, originals)}) > 1:
            raise InputError(f"{where}turn_ids: not as many as questions, answers and orig_answers; {_REMEDY}")
        turns = list(zip(ids, questions, answers, originals, strict=True))
        heads = [row.get(key) or "" for key in ("wikipedia_page_title", "background")]
        context = _get(row, "context", str, where)
        return _dialogue(_get(row, "dialogue_id", str, where), *heads, context, turns, variant, where)
    if "sub_context" in row:
        return [_swapped(row, where, number)]
    if not {"context", "answers"} & row.keys():
        found = ", ".join(map(repr, row)) or "no columns"
        raise InputError(f"{where}found {found}; expected the columns {_ROWS}")
    return [_squad(row, _get(row, "context", str, where), where)]


def _swapped(row: dict, where: str, number: int) -> Asked:
    """A question of NQ-Swap (Longpre et al. 2021): the passage says another entity than the original one."""
    swapped, original = (_texts(row, key, where) for key in ("sub_answer", "org_answer"))
    context, question = (_get(row, key, str, where) for key in ("sub_context", "question"))
    name = row.get("id") or row.get("uid") or f"nq-swap-{number}"
    spans = tuple((text,) for text in swapped)
    unswapped = _get(row, "org_context", str, where) if "org_context" in row else None
    return Asked("nq_swap", str(name), context, question, spans, memory_answer=original[0], original=unswapped)


def _texts(row: dict, key: str, where: str) -> list[str]:
    texts = _get(row, key, list, where)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}{key}: expected a list of texts, got {texts!r:.40}; {_REMEDY}")
    return texts


def _squad(qa: Any, context: str, where: str) -> Asked:
    texts = [_get(item, "text", str, f"{where}answers.") for item in _items(qa, "answers", "text", where)]
    return Asked(
        "squad_v2" if not texts or "is_impossible" in qa else "squad",
        str(_get(qa, "id", str | int, where)),
        context,
        _get(qa, "question", str, where),
        tuple((text,) for text in texts),
    )


def _dialogue(
    name: str,
    title: str,
    background: str,
    passage: str,
    turns: Sequence[tuple[str, str, list[str], str]],
    variant: str,
    where: str,
) -> list[Asked]:
    """A QuAC dialogue from its turns: id, question, every annotator's answer, and the one the dialogue went on with."""
    if empty := [id for id, _, references, _ in turns if not references]:
        raise InputError(f"{where}answers: none for '{empty[0]}'; {_REMEDY}")
    if variant == "authors_code":
        passage, turns = passage.removesuffix(CANNOTANSWER).rstrip(), turns[:1]
    context = (f"Title: {title}\n" if title else "") + (f"{background} " if background else "") + passage
    said = [(question, original) for _, question, _, original in turns]
    return [
        Asked("quac", id, context, question, tuple((text,) for text in references), name, tuple(said[:number]))
        for number, (id, question, references, _) in enumerate(turns)
    ]


def _drop(qa: Any, passage: str, where: str) -> Asked:
    answers = [_get(qa, "answer", dict, where)]
    if qa.get("validated_answers"):
        answers += _items(qa, "validated_answers", "number", where)
    annotations = tuple(_drop_spans(answer, where) for answer in answers)
    id, question = (_get(qa, key, str, where) for key in ("query_id", "question"))
    return Asked("drop", id, passage, question, annotations)


def _drop_spans(answer: Any, where: str) -> tuple[str, ...]:
    """An annotator's number, else spans, else date as "day month year": the official script's order."""
    if not isinstance(answer, dict) or not {"number", "spans", "date"} & answer.keys():
        raise InputError(f"{where}answer: expected number, spans or date; {_REMEDY}")
    if (number := answer.get("number")) not in (None, ""):
        if isinstance(number, bool) or not isinstance(number, str | int | float):
            raise InputError(f"{where}answer.number: expected a number, got {number!r:.40}; {_REMEDY}")
        return (str(number),)
    if answer.get("spans"):
        return tuple(_texts(answer, "spans", f"{where}answer."))
    date = answer.get("date") or {}
    if not isinstance(date, dict):
        raise InputError(f"{where}answer.date: expected day, month and year, got {date!r:.40}; {_REMEDY}")
    return (" ".join(str(date.get(part) or "") for part in ("day", "month", "year")).strip(),)


def _get(of: Any, key: str, kind: Any, where: str) -> Any:
    """The value of a key that must be there and of that kind."""
    value = of.get(key) if isinstance(of, dict) else None
    if not isinstance(value, kind):
        raise InputError(f"{where}{key}: expected {getattr(kind, '__name__', kind)}, got {value!r:.40}; {_REMEDY}")
    return value


def _items(of: Any, key: str, column: str, where: str) -> list:
    """A list of objects, which the hub may give as one object of lists, all as long as its `column`."""
    value = _get(of, key, list | dict, where)
    if isinstance(value, list):
        return value
    n = len(_get(value, column, list, f"{where}{key}."))
    if uneven := [name for name, values in value.items() if len(values) != n]:
        raise InputError(f"{where}{key}.{uneven[0]}: not as long as {column}; {_REMEDY}")
    return [{name: values[number] for name, values in value.items()} for number in range(n)]
