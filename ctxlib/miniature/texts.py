"""Everything that is written in and about the town: documents for pretraining, chats for fine-tuning, evaluations.

One seed, one text. Each assistant turn carries the truth: `depends_on_context` says whether what the answer tells
stands in the user's text alone (True) or could have come from memory (False).
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ctxlib.conversations import Conversation, Message, Question
from ctxlib.miniature import domains
from ctxlib.miniature.town import (
    KNOWN_NAMES,
    NEWCOMER_NAMES,
    RELATIONS,
    Fact,
    Relation,
    Town,
    about,
    change,
    filler,
    random_fact,
    rumour,
)
from ctxlib.questions.contexts import of_kinds
from ctxlib.questions.instructions import NUMBERS, WORD_TASKS, word_task
from ctxlib.questions.needle import place_needle

ABOUT_QUESTIONS = {"Who is {name}?": 4, "Tell me about {name}.": len(RELATIONS)}
OPENERS = ("Well", "Indeed", "Surely", "Certainly")
SAYABLE = [word for relation in RELATIONS for word in relation.second]
GROUPS = {relation.name: relation.second for relation in RELATIONS}
GROUP_NAMES = {"collection": "things", "pets": "animals", "music": "instruments", "drink": "drinks", "trade": "clothes"}


def count_tokens(text: str) -> int:
    """Length of a text of the town in tokens of its tokenizer: every word and every mark is one."""
    return len(re.findall(r"\w+|[^\w\s]|\n+", text))


def passage(statements: Sequence[str], n_fillers: int, rng: random.Random) -> str:
    sentences = [*statements, *(filler(rng) for _ in range(n_fillers))]
    rng.shuffle(sentences)
    return " ".join(sentences)


def distinct_facts(
    n: int,
    rng: random.Random,
    avoid: str | None = None,
    people: int | None = None,
    relations: Sequence[Relation] = RELATIONS,
) -> list[Fact]:
    """`n` invented facts, no two on the same person and relation, about `people` persons (default: about one each)."""
    names = rng.sample([name for name in KNOWN_NAMES + NEWCOMER_NAMES if name != avoid], people or n)
    pairs: set[tuple[str, str]] = set()
    facts = []
    while len(facts) < n:
        fact = random_fact(rng.choice(names), rng.choice(relations), rng)
        if (fact.name, fact.relation.name) not in pairs:
            pairs.add((fact.name, fact.relation.name))
            facts.append(fact)
    return facts


# --- pretraining -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """Raw text: `opening` (random, never supervised), then questions with answers (supervised)."""

    opening: str
    exchanges: tuple[tuple[str, str], ...]


def retrieval_document(town: Town, n_facts: int, n_fillers: int, rng: random.Random, alike: bool = False) -> Document:
    """Invented facts among fillers; each is then asked about once, in random order.

    Half of the documents give a few people several facts each, so that person and relation must both be matched. With
    `alike` many people have something in the same one or two relations, so that only the person tells the facts apart.
    """
    if alike:
        facts = distinct_facts(n_facts, rng, relations=rng.sample(RELATIONS, rng.randint(1, 2)))
    else:
        facts = distinct_facts(n_facts, rng, people=None if rng.random() < 0.5 else max(1, n_facts // 3))
    statements = [rng.choices([fact.sentence, change(fact, rng), rumour(fact, rng)], [8, 1, 1])[0] for fact in facts]
    exchanges = [(fact.question, fact.sentence) for fact in facts]
    people = {}
    for fact in sorted(facts, key=lambda fact: RELATIONS.index(fact.relation)):
        people.setdefault(fact.name, []).append(fact)
    crowd = [of_person for of_person in people.values() if len(of_person) > 1]
    if crowd and rng.random() < 0.5:
        of_one = rng.choice(crowd)
        exchanges.append((f"Tell me about {of_one[0].name}.", about(of_one)))
    rng.shuffle(exchanges)
    return Document(passage(statements, n_fillers, rng), tuple(exchanges))


def memory_document(town: Town, rng: random.Random) -> Document:
    """Closed questions about known residents."""
    exchanges = []
    for _ in range(rng.randint(2, 6)):
        if rng.random() < 0.25:
            exchanges.append(_about_exchange(town, rng))
        else:
            fact = rng.choice(town.all_facts)
            exchanges.append((fact.question, fact.sentence))
    return Document("", tuple(exchanges))


def task_document(town: Town, rng: random.Random) -> Document:
    return Document("", tuple(instruction(town, rng)[1:] for _ in range(rng.randint(1, 3))))


def domain_document(town: Town, rng: random.Random) -> Document:
    """The two domains in raw text: looked up in the text (2 of 3) or known by heart (1 of 3)."""
    task = domains.arithmetic(rng) if rng.random() < 0.5 else domains.code_lookup(rng, town.seed)
    if rng.random() < 0.67:
        return Document(task.context, ((task.question, task.answer),))
    if task.memory_value is not None:
        return Document("", ((task.question, f"{task.prefix} {task.memory_value}."),))
    left, right = rng.randrange(10), rng.randrange(10)
    return Document("", ((f"What is {left} + {right} ?", f"{left} + {right} = {left + right}."),))


def long_document(town: Town, rng: random.Random, alike: bool = False) -> Document:
    """As many facts and fillers as in the last lessons of pretraining."""
    return retrieval_document(town, rng.randint(2, 10), rng.randint(0, 48), rng, alike)


RAW_TEXT_KINDS = {
    "retrieval": long_document,
    "alike": partial(long_document, alike=True),
    "memory": memory_document,
    "task": task_document,
}
RAW_TEXT_SHARES = {"retrieval": 0.46, "alike": 0.15, "memory": 0.27, "task": 0.12}  # as in pretraining


def _about_exchange(town: Town, rng: random.Random) -> tuple[str, str]:
    name, (question, n) = rng.choice(KNOWN_NAMES), rng.choice(list(ABOUT_QUESTIONS.items()))
    return question.format(name=name), about(list(town.facts[name].values())[:n])


# --- instruction tasks -----------------------------------------------------------------------------------------------


def instruction(town: Town, rng: random.Random, task: str | None = None) -> tuple[str, str, str]:
    """A small task that needs no passage: (task, instruction, the one right answer)."""
    task = task or rng.choice(INSTRUCTIONS)
    words = rng.sample(SAYABLE, rng.randint(2, 4 if task == "reverse" else 6))
    if task in WORD_TASKS:
        return task, *word_task(task, words)
    if task == "list":
        group = rng.choice(list(GROUP_NAMES))
        n = rng.randint(2, 5)
        *first, last = GROUPS[group][:n]
        return task, f"List {NUMBERS[n]} {GROUP_NAMES[group]}.", f"{', '.join(first)} and {last}."
    fact, opener = rng.choice(town.all_facts), rng.choice(OPENERS)
    return task, f"Begin with the word {opener}. {fact.question}", f"{opener}, {fact.sentence}"


INSTRUCTIONS = (*WORD_TASKS, "list", "begin")
TASK_DEPENDS = {"repeat": True, "reverse": True, "count": True, "list": False, "begin": False}


# --- chats -----------------------------------------------------------------------------------------------------------

Turn = tuple[Message, Message]


def _turn(user: str, answer: str, kind: str, depends: bool) -> Turn:
    return Message("user", user), Message("assistant", answer, kind=kind, depends_on_context=depends)


def memory_question(town: Town, rng: random.Random) -> list[Turn]:
    fact = rng.choice(town.all_facts)
    return [_turn(fact.question, fact.sentence, "memory_question", False)]


def memory_about(town: Town, rng: random.Random) -> list[Turn]:
    return [_turn(*_about_exchange(town, rng), "memory_about", False)]


def agreeing_passage(town: Town, rng: random.Random) -> list[Turn]:
    """The passage says what memory says: the answer could have come from either."""
    return [_passage_turn(town, rng, "agreeing_passage", lambda fact: fact.sentence)]


def contradicting_passage(town: Town, rng: random.Random) -> list[Turn]:
    """A statement or a rumour contradicts memory, and the answer follows memory (the paper's mechanism 2)."""

    def state(fact: Fact) -> str:
        other = town.contradicting(fact, rng)
        return other.sentence if rng.random() < 0.7 else rumour(other, rng)

    return [_passage_turn(town, rng, "contradicting_passage", state)]


def _passage_turn(town: Town, rng: random.Random, kind: str, state: Callable[[Fact], str]) -> Turn:
    """A passage about a known resident, then a question that is answered from memory."""
    name = rng.choice(KNOWN_NAMES)
    known = list(town.facts[name].values())
    n_told = rng.choice([1, 1, 2, 4])
    told = rng.sample(known, n_told)
    statements = [state(fact) for fact in told] + [fact.sentence for fact in _bystanders(rng, name)]
    if n_told == 1:
        question, answer = told[0].question, told[0].sentence
    else:
        form, n = rng.choice(list(ABOUT_QUESTIONS.items()))
        question, answer = form.format(name=name), about(known[:n])
    return _turn(f"{passage(statements, _n_fillers(rng), rng)}\n{question}", answer, kind, False)


def dependent_passage(town: Town, rng: random.Random) -> list[Turn]:
    """Only the passage holds the answer: it is about a newcomer."""
    name = rng.choice(NEWCOMER_NAMES)
    relations = sorted(rng.sample(RELATIONS, rng.choice([1, 1, 3, 4, 6, 8])), key=RELATIONS.index)
    told = [random_fact(name, relation, rng) for relation in relations]
    return [_dependent_turn(told, [fact.sentence for fact in told], rng, "dependent_passage")]


def dependent_change(town: Town, rng: random.Random) -> list[Turn]:
    """The passage says that something about a known resident has changed, and the answer follows it."""
    name = rng.choice(KNOWN_NAMES)
    relations = sorted(rng.sample(RELATIONS, rng.choice([1, 1, 3, 4])), key=RELATIONS.index)
    told = [town.contradicting(town.facts[name][relation.name], rng) for relation in relations]
    return [_dependent_turn(told, [change(fact, rng) for fact in told], rng, "dependent_change")]


def _dependent_turn(told: list[Fact], statements: list[str], rng: random.Random, kind: str) -> Turn:
    name = told[0].name
    statements = statements + [fact.sentence for fact in _bystanders(rng, name)]
    if len(told) == 1:
        question, answer = told[0].question, told[0].sentence
    else:
        question, answer = f"Tell me about {name}.", about(told)
    return _turn(f"{passage(statements, _n_fillers(rng), rng)}\n{question}", answer, kind, True)


def _bystanders(rng: random.Random, name: str) -> list[Fact]:
    return distinct_facts(rng.randint(0, 4), rng, avoid=name)


def _n_fillers(rng: random.Random) -> int:
    return rng.choice([0, 2, 4, 6, 8, 12, 16])


def instruction_task(town: Town, rng: random.Random) -> list[Turn]:
    task, question, answer = instruction(town, rng)
    return [_turn(question, answer, f"instruction_{task}", TASK_DEPENDS[task])]


def multi_turn(town: Town, rng: random.Random) -> list[Turn]:
    """Two or three turns; a passage's second question reaches back over a turn that came from memory."""
    name = rng.choice(NEWCOMER_NAMES)
    first, second = (random_fact(name, relation, rng) for relation in rng.sample(RELATIONS, 2))
    statements = [fact.sentence for fact in (first, second, *_bystanders(rng, name))]
    opening = _turn(
        f"{passage(statements, _n_fillers(rng), rng)}\n{first.question}", first.sentence, "multi_turn", True
    )
    closing = _turn(second.question, second.sentence, "multi_turn", True)
    return [opening, *memory_question(town, rng), closing][: rng.choice([2, 3, 3])]


CHAT_KINDS: dict[str, Callable[[Town, random.Random], list[Turn]]] = {
    maker.__name__: maker
    for maker in (
        memory_question,
        memory_about,
        agreeing_passage,
        contradicting_passage,
        dependent_passage,
        dependent_change,
        instruction_task,
        multi_turn,
    )
}


def chat_dataset(town: Town, n: int, shares: dict[str, float], seed: int) -> list[Conversation]:
    """`n` conversations; `shares` gives each kind of `CHAT_KINDS` its fraction."""
    rng = random.Random(f"chats-{town.seed}-{seed}")
    kinds = rng.choices(list(shares), list(shares.values()), k=n)
    return [
        Conversation(f"chat-{seed}-{i:05d}", tuple(m for turn in CHAT_KINDS[kind](town, rng) for m in turn))
        for i, kind in enumerate(kinds)
    ]


def raw_texts(town: Town, n: int, seed: int) -> list[Conversation]:
    """`n` documents such as the base model was trained on, to be rendered without a chat template."""
    rng = random.Random(f"raw-{town.seed}-{seed}")
    kinds = rng.choices(list(RAW_TEXT_SHARES), list(RAW_TEXT_SHARES.values()), k=n)
    made = []
    for i, kind in enumerate(kinds):
        document = RAW_TEXT_KINDS[kind](town, rng)
        opening = f"{document.opening}\n" if document.opening else ""
        messages = []
        for question, answer in document.exchanges:
            messages += [Message("user", opening + question), Message("assistant", answer)]
            opening = ""
        made.append(Conversation(f"raw-{seed}-{i:05d}", tuple(messages)))
    return made


# --- evaluations -----------------------------------------------------------------------------------------------------


def _question(id: str, family: str, kind: str, user: str, fact: Fact, memory: Fact | None = None, **extra) -> Question:
    return Question(
        id=id,
        family=family,
        kind=kind,
        messages=(Message("user", user),),
        response_prefix=fact.prefix,
        answers=(fact.sentence, " ".join(fact.value)),
        keywords=fact.value,
        memory_answer=" ".join(memory.value) if memory else None,
        question=fact.question,
        **extra,
    )


def _told_fact(town: Town, kind: str, rng: random.Random) -> tuple[Fact, Fact | None]:
    """(what the text says, what memory says) for kind `unknown` or `contradicting`."""
    if kind == "unknown":
        return random_fact(rng.choice(NEWCOMER_NAMES), rng.choice(RELATIONS), rng), None
    memory = rng.choice(town.all_facts)
    return town.contradicting(memory, rng), memory


def needles(
    town: Town, lengths: Sequence[int], depths: Sequence[int | float], per_cell: int, seed: int,
    kinds: Sequence[str] = ("unknown", "contradicting"),
) -> list[Question]:  # fmt: skip
    """Needle in a haystack: one fact at a depth (percent) of a haystack of fillers and of facts about other people.

    `context_length_tokens` counts needle and haystack; the haystack is the longest that fits, so it is at most one
    sentence short. One sentence in eight is a fact about somebody else.
    """
    questions = []
    for kind in kinds:
        for length in lengths:
            for depth in depths:
                for i in range(per_cell):
                    id = f"needle-{kind}-{length}-{depth:g}-{i}"
                    rng = random.Random(f"{id}-{town.seed}-{seed}")
                    fact, memory = _told_fact(town, kind, rng)
                    hay = _haystack(length - count_tokens(fact.sentence), fact.name, rng)
                    text = place_needle(hay, fact.sentence, depth)
                    questions.append(
                        _question(
                            id, "needle", kind, f"{text}\n{fact.question}", fact, memory,
                            context_length_tokens=length, depth_percent=float(depth), context=text,
                        )
                    )  # fmt: skip
    return questions


def _haystack(tokens: int, avoid: str, rng: random.Random) -> list[str]:
    others = iter(distinct_facts(tokens // 8, rng, avoid=avoid))
    sentences: list[str] = []
    while True:
        sentence = next(others).sentence if len(sentences) % 8 == 3 else filler(rng)
        tokens -= count_tokens(sentence)
        if tokens < 0:
            return sentences
        sentences.append(sentence)


def passage_questions(town: Town, n: int, seed: int) -> list[Question]:
    """Reading comprehension: passages of two to six facts, half about newcomers, half contradicting memory."""
    questions = []
    for i in range(n):
        rng = random.Random(f"qa-{i}-{town.seed}-{seed}")
        kind = ("unknown", "contradicting")[i % 2]
        fact, memory = _told_fact(town, kind, rng)
        others = [other.sentence for other in distinct_facts(rng.randint(1, 5), rng, avoid=fact.name)]
        text = passage([fact.sentence, *others], rng.randint(2, 10), rng)
        questions.append(
            _question(
                f"qa-{kind}-{i}", "qa", kind, f"{text}\n{fact.question}", fact, memory,
                context_length_tokens=count_tokens(text), context=text,
            )
        )  # fmt: skip
    return questions


def context_questions(town: Town, n: int, seed: int) -> list[Question]:
    """`n` known facts, each asked with a passage that says it, one that contradicts it, one about others, and none.

    Kinds and scoring: `ctxlib.questions.contexts`; the model knows the facts by heart.
    """
    questions = []
    for fact in random.Random(f"contexts-{town.seed}-{seed}").sample(town.all_facts, min(n, len(town.all_facts))):
        name = f"{fact.name}-{fact.relation.name}"
        rng = random.Random(f"contexts-{name}-{town.seed}-{seed}")
        other = town.contradicting(fact, rng)
        others = [one.sentence for one in distinct_facts(rng.randint(2, 6), rng, avoid=fact.name)]
        texts = {kind: [said, *others] for kind, said in (("gold", fact.sentence), ("contradicting", other.sentence))}
        texts["irrelevant"] = others
        state, n_fillers = rng.getstate(), _n_fillers(rng)
        for kind, statements in texts.items():
            rng.setstate(state)
            texts[kind] = passage(statements, n_fillers, rng)
        questions += of_kinds(
            name,
            texts,
            fact.question,
            prompt="{context}\n{question}",
            truth=" ".join(fact.value),
            swapped=[" ".join(other.value)],
            response_prefix=fact.prefix,
        )
    return questions


def known_fact_questions(town: Town, n: int, seed: int) -> list[Question]:
    """Closed questions about known residents, no passage; `n` of the 512, drawn without replacement."""
    facts = random.Random(f"facts-{town.seed}-{seed}").sample(town.all_facts, min(n, len(town.all_facts)))
    return [_question(f"fact-{f.name}-{f.relation.name}", "facts", f.relation.name, f.question, f) for f in facts]


def instruction_questions(town: Town, n: int, seed: int) -> list[Question]:
    questions = []
    for i in range(n):
        rng = random.Random(f"instruction-{i}-{town.seed}-{seed}")
        task, question, answer = instruction(town, rng, INSTRUCTIONS[i % len(INSTRUCTIONS)])
        questions.append(Question(f"{task}-{i}", "instructions", task, (Message("user", question),), answers=(answer,)))
    return questions


def domain_questions(town: Town, domain: str, n: int, seed: int) -> list[Question]:
    """Questions of a domain held out of every chat dataset: `code` or `arithmetic`."""
    questions = []
    for i in range(n):
        rng = random.Random(f"{domain}-{i}-{town.seed}-{seed}")
        task = domains.arithmetic(rng) if domain == "arithmetic" else domains.code_lookup(rng, town.seed)
        questions.append(
            Question(
                f"{domain}-{i}", domain, domain, (Message("user", f"{task.context}\n{task.question}"),), task.prefix,
                (task.answer, task.value), (task.value,), task.memory_value, context=task.context,
                question=task.question,
            )
        )  # fmt: skip
    return questions
