"""Questions and scoring of the tasks: ctxlib's own questions and rules, in the harness's terms."""

from typing import Any

import pandas as pd
from datasets import Dataset

from ctxlib.conversations import Question
from ctxlib.metrics import ANSWER_METRICS, QUAC_METRICS, score_answers
from ctxlib.params import InputError
from ctxlib.questions.qa import load_questions


def documents(
    dataset: str,
    prompt: str = "instruction",
    indicator: str = "",
    variant: str = "standard",
    split: str = "validation",
    **metadata: Any,
) -> dict[str, Dataset]:
    """All questions of a `dataset` (squad, quac, drop) as the harness's documents: id, kind, messages and annotations.

    They come from the official JSON file or the hub's `owner/name` that `metadata` holds under the dataset's name, of
    the hub's its `split`; `prompt` and `variant` are those of `ctxlib.questions.qa.load_questions`. The `indicator`
    follows the last message directly. The command line gives `--metadata '{"squad": "dev-v1.1.json", "variant":
    "authors_code"}'`.

    Raises InputError for an unknown variant, a source that cannot be read, and one of another dataset.
    """
    if variant not in ("standard", "authors_code"):
        raise InputError(f"metadata variant: expected standard or authors_code, got {variant!r}")
    source = metadata[dataset]
    questions = load_questions(source, prompt=prompt, variant=variant, split=split)
    if not (kind := questions[0].kind).startswith(dataset):
        raise InputError(f"metadata {dataset}: {source} holds questions of {kind}; name a source of {dataset}")
    return {"validation": Dataset.from_list([_document(question, indicator) for question in questions])}


def _document(question: Question, indicator: str) -> dict[str, Any]:
    messages = [{"role": message.role, "content": message.content} for message in question.messages]
    messages[-1]["content"] += indicator
    annotated = {"answers": question.answers, "annotations": question.annotations}
    return {"id": question.id, "kind": question.kind, "messages": messages, **annotated}


def scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The metrics of one answer, each in [0, 1]: the `standard` ones, and `containment_authors_code`.

    A metric that the dataset's official script does not give this question is left out, so that it has no share in the
    mean. Reference: `ctxlib.metrics.score_answers`.
    """
    golds, annotations = tuple(doc["answers"]), tuple(map(tuple, doc["annotations"]))
    question = Question(doc["id"], "qa", doc["kind"], (), answers=golds, annotations=annotations)
    answer = pd.DataFrame({"id": [question.id], "answer": [results[0].strip()]})
    standard, authors_code = (
        score_answers(answer, [question], variant=variant).iloc[0] for variant in ("standard", "authors_code")
    )
    asked = standard.reindex([*ANSWER_METRICS, *QUAC_METRICS]).dropna()
    return {**asked.astype(float).to_dict(), "containment_authors_code": float(authors_code["containment"])}
