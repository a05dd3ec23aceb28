"""Instruction following without a judge: word tasks with one right answer, and verifiable instructions.

A verifiable instruction ("use at least 80 words", "no commas") is one that a program can check, in the manner of
IFEval (Zhou et al. 2023, arXiv 2311.07911), whose definitions of strict and loose accuracy are used here. The rules and
the prompts are our own, so the numbers can be compared with each other, but not with IFEval's.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from ctxlib.conversations import Message, Question, Rule
from ctxlib.metrics import bootstrap_interval, wilson_interval
from ctxlib.params import InputError

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
WORD_TASKS = ("repeat", "reverse", "count")
RULE_METRICS = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
_ABBREVIATIONS = ("mr", "mrs", "ms", "dr", "prof", "st", "vs", "e.g", "i.e")


def word_task(task: str, words: Sequence[str]) -> tuple[str, str]:
    """(instruction, right answer) of `repeat`, `reverse` or `count` for at most seven words."""
    listed = " ".join(words)
    if task == "repeat":
        return f"Repeat these words: {listed}.", f"{listed}."
    if task == "reverse":
        return f"Reverse these words: {listed}.", f"{' '.join(reversed(words))}."
    if task == "count":
        return f"Count these words: {listed}.", f"There are {NUMBERS[len(words)]} words."
    raise ValueError(f"unknown task {task!r}")


def word_questions(words: Sequence[str], n: int, seed: int) -> list[Question]:
    """`n` questions, the tasks in turn, two to six of the given words each."""
    questions = []
    for i in range(n):
        rng = random.Random(f"instruction-{i}-{seed}")
        task = WORD_TASKS[i % len(WORD_TASKS)]
        instruction, answer = word_task(task, rng.sample(list(words), rng.randint(2, 6)))
        questions.append(
            Question(f"{task}-{i}", "instructions", task, (Message("user", instruction),), answers=(answer,))
        )
    return questions


def count_words(text: str) -> int:
    """Runs without white space that hold a letter or a digit, as a word processor counts them: "don't" is one."""
    return sum(any(map(str.isalnum, run)) for run in text.split())


def count_sentences(text: str) -> int:
    """Parts with a letter that end in `.`, `!`, `?` or `…` before white space, or at the end of the text.

    Closing quotes and brackets belong to the sentence; a few abbreviations (`_ABBREVIATIONS`) end none.
    """
    parts = re.split(r"""(?<=[.!?…])["'”’)\]*_]*(?=\s|$)""", text)
    joined = 0
    for part in parts[:-1]:
        last = part.rstrip(".").split()[-1:]
        joined += bool(last) and part.endswith(".") and last[0].lstrip("\"'“‘(").lower() in _ABBREVIATIONS
    return sum(any(map(str.isalpha, part)) for part in parts) - joined


def count_word(text: str, word: str) -> int:
    """How often `word` occurs in `text` as a whole word, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def count_bullets(text: str) -> int:
    """Lines that begin with `* ` or `- `, indented or not."""
    return len(re.findall(r"^[ \t]*[*-][ \t]+\S", text, re.MULTILINE))


def count_paragraphs(text: str) -> int:
    """Parts between empty lines."""
    return len(re.split(r"\n\s*\n", text.strip())) if text.strip() else 0


def is_json_object(text: str) -> bool:
    """True for one JSON object and nothing else; it may be inside a code fence."""
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        return isinstance(json.loads(fenced[1] if fenced else text), dict)
    except (ValueError, RecursionError):
        return False


def _words_of(text: str) -> str:
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class RuleKind:
    """How a rule is said, which sides of an answer it settles, and when an answer (stripped) follows it."""

    sentence: str
    sides: str
    follows: Callable[[str, Rule], bool]
    numbers: Sequence[int] = (0,)
    texts: Sequence[str] = ("",)

    def clashes(self, other: "RuleKind") -> bool:
        return bool(set(self.sides.split()) & set(other.sides.split()))


_OPENINGS = ("Here is what I know:", "My answer is this:", "To put it simply:")
_CLOSINGS = ("That is all I can say.", "I hope this helps you.", "And there it ends.")
RULES = {  # two that do not clash can always be followed together
    "words_at_least": RuleKind(
        "Use at least {number} words.", "length", lambda a, r: count_words(a) >= r.number, range(60, 160, 10)
    ),
    "words_at_most": RuleKind(
        "Use at most {number} words.", "length", lambda a, r: count_words(a) <= r.number, range(20, 70, 10)
    ),
    "words_exactly": RuleKind(
        "Use exactly {number} words.", "length", lambda a, r: count_words(a) == r.number, range(12, 26)
    ),
    "sentences": RuleKind(
        "Write exactly {number} sentences.",
        "length layout",
        lambda a, r: count_sentences(a) == r.number,
        range(2, 7),
    ),
    "paragraphs": RuleKind(
        "Write exactly {number} paragraphs, with an empty line between them.",
        "layout",
        lambda a, r: count_paragraphs(a) == r.number,
        range(2, 5),
    ),
    "bullets": RuleKind(
        'Give exactly {number} bullet points, each on a line that begins with "* " or "- ".',
        "layout",
        lambda a, r: count_bullets(a) == r.number,
        range(3, 7),
    ),
    "begins_with": RuleKind(
        'Begin your answer with exactly this: "{text}"',
        "start case",
        lambda a, r: a.startswith(r.text),
        texts=_OPENINGS,
    ),
    "ends_with": RuleKind(
        'End your answer with exactly this: "{text}"', "end case", lambda a, r: a.endswith(r.text), texts=_CLOSINGS
    ),
    "includes": RuleKind('Use the word "{text}".', "words", lambda a, r: count_word(a, r.text) > 0),
    "includes_times": RuleKind(
        'Use the word "{text}" at least {number} times.',
        "words",
        lambda a, r: count_word(a, r.text) >= r.number,
        range(2, 5),
    ),
    "excludes": RuleKind('Do not use the word "{text}".', "words", lambda a, r: count_word(a, r.text) == 0),
    "lower_case": RuleKind("Write in lower case only.", "case", lambda a, r: a.islower()),
    "upper_case": RuleKind("Write in capital letters only.", "case", lambda a, r: a.isupper()),
    "no_commas": RuleKind("Do not use any commas.", "commas", lambda a, r: not set(",，،") & set(a)),
    "repeats_request": RuleKind(
        'Before you answer, repeat this word for word: "{text}"',
        "start case length commas words",
        lambda a, r: _words_of(a).lstrip('"“').startswith(_words_of(r.text)),
    ),
    "json": RuleKind(
        "Answer with one JSON object and nothing else.",
        "start end case length layout commas",
        lambda a, r: is_json_object(a),
    ),
    "quoted": RuleKind(
        "Put your whole answer in double quotation marks.",
        "start end",
        lambda a, r: len(a) > 2 and a[0] + a[-1] in ('""', "“”"),
    ),
}
_TOPICS = (  # a request, a word that may well be asked for, and one that is hard to do without
    ("Explain how bread is baked.", "patience", "oven"),
    ("Describe a walk along a river.", "heron", "water"),
    ("Explain how a bicycle stays upright.", "balance", "wheel"),
    ("Describe what happens in a library.", "silence", "books"),
    ("Explain why leaves turn red in autumn.", "season", "tree"),
    ("Describe how to make a cup of tea.", "kettle", "hot"),
    ("Explain how a lighthouse helps ships.", "coast", "light"),
    ("Describe a quiet morning in a village.", "bell", "house"),
    ("Explain how to learn a new language.", "habit", "words"),
    ("Describe what a gardener does in spring.", "spade", "plants"),
    ("Explain how rain forms.", "cycle", "clouds"),
    ("Describe a journey by train.", "window", "station"),
    ("Explain how bees make honey.", "hive", "flowers"),
    ("Describe the work of a carpenter.", "measure", "wood"),
    ("Explain why people keep diaries.", "memory", "write"),
    ("Describe a market on a Saturday.", "basket", "fruit"),
    ("Explain how a clock keeps time.", "pendulum", "hands"),
    ("Describe what snow does to a city.", "footsteps", "cold"),
)


def verifiable_questions(n: int, seed: int) -> list[Question]:
    """`n` questions in plain English: a neutral request with one rule or with two that can be followed together.

    The first rules come in turn, so that every rule is asked about equally often; the seed draws all else.
    """
    questions = []
    for i in range(n):
        rng = random.Random(f"verifiable-{i}-{seed}")
        topic = rng.choice(_TOPICS)
        names = [list(RULES)[i % len(RULES)]]
        partners = [name for name in RULES if not RULES[name].clashes(RULES[names[0]])]
        if partners and rng.random() < 0.5:
            names.append(rng.choice(partners))
        rules = tuple(_draw(name, topic, rng) for name in names)
        prompt = " ".join([topic[0], *map(instruction, rules)])
        questions.append(
            Question(f"verifiable-{i}", "instructions", " + ".join(names), (Message("user", prompt),), rules=rules)
        )
    return questions


def _draw(name: str, topic: tuple[str, str, str], rng: random.Random) -> Rule:
    request, asked_for, hard_to_avoid = topic
    of_topic = {"includes": asked_for, "includes_times": asked_for, "excludes": hard_to_avoid}
    text = of_topic | {"repeats_request": request}
    return Rule(name, rng.choice(RULES[name].numbers), text.get(name) or rng.choice(RULES[name].texts))


def instruction(rule: Rule) -> str:
    """The rule as the prompt says it."""
    return RULES[rule.name].sentence.format(number=rule.number, text=rule.text)


def follows(answer: str, rule: Rule, *, loose: bool = False) -> bool:
    """Whether the answer follows the rule; an empty answer follows none.

    Loose: whether any of eight variants does, of the answer with and without its asterisks, and without its first
    line, its last line, both or neither. Reference: Zhou et al. 2023. Raises InputError for an unknown rule.
    """
    if rule.name not in RULES:
        raise InputError(f"rule '{rule.name}': expected one of {', '.join(RULES)}")
    variants = _variants(answer) if loose else [answer.strip()]
    return any(RULES[rule.name].follows(variant, rule) for variant in variants if variant)


def _variants(answer: str) -> list[str]:
    lines = answer.strip().split("\n")
    cuts = product((0, 1), (len(lines), len(lines) - 1))
    kept = ["\n".join(lines[start:end]).strip() for start, end in cuts]
    return [*kept, *(text.replace("*", "").strip() for text in kept)]


def check_answers(frame: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """Which answers (`frame`: id, answer, …) follow which rules: one row per question and rule.

    Columns: id, rule, strict, loose. `metrics.summarise(…, "rule", "strict")` gives the accuracy of each rule.
    Raises InputError for an id without a question.
    """
    known = {question.id: question for question in questions}
    if unknown := sorted(set(frame["id"]) - set(known)):
        raise InputError(f"check_answers: no question has the id {unknown[0]!r}; pass the questions that were answered")
    rows = [
        (key, rule.name, follows(answer, rule), follows(answer, rule, loose=True))
        for key, answer in zip(frame["id"], frame["answer"], strict=True)
        for rule in known[key].rules
    ]
    return pd.DataFrame(rows, columns=["id", "rule", "strict", "loose"]).astype({"strict": bool, "loose": bool})


def score_rules(frame: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """`frame` (id, answer, …; one row an id) with RULE_METRICS, in [0, 1]; NaN where a question has no rules.

    `prompt_…` is 1 where all rules of the question are followed, `instruction_…` the share followed.
    """
    by_id = check_answers(frame, questions).groupby("id")[["strict", "loose"]]
    columns = by_id.min().astype(float).add_prefix("prompt_"), by_id.mean().add_prefix("instruction_")
    scores = pd.concat(columns, axis=1).reindex(frame["id"]).set_axis(frame.index)
    return frame.assign(**scores[list(RULE_METRICS)].astype(float))


def instruction_accuracy(checked: pd.DataFrame, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Accuracies of `check_answers` as a tidy frame: level, criterion, value, ci_low, ci_high (95 %), n.

    Level `prompt`: the share of the questions of which all rules are followed, with Wilson's interval; `instruction`:
    the share of all rules that are followed, with a percentile bootstrap over the questions, since rules of one
    question share its answer. Criteria `strict` and `loose`. Reference: Zhou et al. 2023.
    """
    by_id = checked.groupby("id", sort=False)
    rows = []
    for criterion in ("strict", "loose"):
        followed, asked = by_id[criterion].sum().to_numpy(), by_id.size().to_numpy()
        whole, n = int((followed == asked).sum()), len(asked)
        rows.append(("prompt", criterion, whole / n if n else np.nan, *wilson_interval(whole, n), n))
        share = followed.sum() / asked.sum() if n else np.nan
        interval = bootstrap_interval(followed, samples, seed, out_of=asked)
        rows.append(("instruction", criterion, share, *interval, int(asked.sum())))
    return pd.DataFrame(rows, columns=["level", "criterion", "value", "ci_low", "ci_high", "n"])
