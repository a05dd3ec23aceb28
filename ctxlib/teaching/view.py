"""The attention view: one HTML file without libraries or addresses, in which every head of every token can be seen.

Six prompts in four conditions. The patterns are those of eager attention, rounded to 1/255; they travel deflated, as
base64, with the tokens as JSON, so no text of a prompt is ever markup.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ctxlib.conversations import Question
from ctxlib.figures import ROLE_COLOURS
from ctxlib.files import write
from ctxlib.models import Subject
from ctxlib.questions.needle import needle_groups
from ctxlib.roles import ROLES
from ctxlib.teaching.asking import answers, attention_of, load, needles, prompt

LIKELIEST = 5
TEMPLATE = Path(__file__).with_name("view.html")


@dataclass(frozen=True)
class Condition:
    """A model, and how it is asked."""

    name: str
    model: str
    template: bool
    indicator: str | None = None


CONDITIONS = (
    Condition("pretrained, raw text", "pretrained", False),
    Condition("vanilla, chat template", "vanilla", True),
    Condition("indicator, without [IND]", "indicator", True),
    Condition("indicator, with [IND]", "indicator", True, "[IND]"),
)


def write_view(out: Path, questions: Sequence[Question] | None = None) -> Path:
    """Writes the view of `questions`, by default of six needles of 60 tokens, three of them about newcomers."""
    if questions is None:
        questions = [*needles(3, tokens=60, seed=0), *needles(3, "unknown", tokens=60, seed=0)]
    models = {name: load(name) for name in dict.fromkeys(one.model for one in CONDITIONS)}
    packed, shown = bytearray(), []
    for question in questions:
        views = []
        for condition in CONDITIONS:
            view, patterns = _seen(models[condition.model], question, condition)
            views.append(view | {"name": condition.name, "start": len(packed)})
            packed += patterns
        title = f"{question.messages[-1].content.splitlines()[-1]} ({question.kind.replace('unknown', 'newcomer')})"
        shown.append({"title": title, "views": views})
    content = {"prompts": shown, "roles": ROLES, "colours": {role: ROLE_COLOURS[role] for role in ROLES}}
    parts = {"CONTENT": json.dumps(content, ensure_ascii=True).encode(), "PATTERNS": bytes(packed)}
    return write(out, _filled(TEMPLATE.read_text(encoding="utf-8"), parts))


def _seen(subject: Subject, question: Question, condition: Condition) -> tuple[Mapping, bytes]:
    """What one condition shows of a question, and its patterns: lower triangles of layer, head, query, as bytes."""
    tokens = prompt(subject, question, template=condition.template, indicator=condition.indicator)
    patterns = attention_of(subject, tokens.ids)
    rows, columns = torch.tril_indices(len(tokens), len(tokens))
    triangles = (patterns[..., rows, columns] * 255).round().to(torch.uint8)
    with torch.inference_mode():
        shares, ids = subject.model(tokens.ids[None], use_cache=False).logits[0].softmax(-1).topk(LIKELIEST)
    told = answers(subject, [question], template=condition.template, indicator=condition.indicator).iloc[0]
    groups = needle_groups(tokens, question)
    decode = subject.tokenizer.decode
    view = {
        "tokens": [decode([token]) for token in tokens.ids],
        "roles": tokens.roles.tolist(),
        "needle": (groups.ids == groups.names.index("needle")).nonzero().flatten().tolist(),
        "layers": len(patterns),
        "heads": patterns.shape[1],
        "next": [[[decode([token]), round(share, 3)] for token, share in zip(*row, strict=True)]
                 for row in zip(ids.tolist(), shares.tolist(), strict=True)],
        "answer": told.answer,
        "text": " ".join(question.keywords),
        "memory": question.memory_answer or "",
    }  # fmt: skip
    return view, triangles.numpy().tobytes()


def _filled(page: str, parts: Mapping[str, bytes]) -> str:
    for name, content in parts.items():
        page = page.replace(f"{{{{{name}}}}}", base64.b64encode(zlib.compress(content, 9)).decode())
    return page
