"""The inputs of one experiment: models, conversations and questions, from the miniature or from the user's files.

The code downstream is the same for both.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxlib import models
from ctxlib.allocation import attention_allocation
from ctxlib.conversations import Conversation, Corpus, Message, Question, load_conversations, load_raw_texts
from ctxlib.generate import RESPONSE_COLUMNS, Around, answer_questions, question_prompt
from ctxlib.metrics import ANSWER_METRICS, score_answers
from ctxlib.miniature import model_source, texts
from ctxlib.miniature.domains import DOMAINS
from ctxlib.miniature.town import Town
from ctxlib.models import Subject
from ctxlib.params import MODEL_ROLES, FirstResponseToken, InputError, Params, load_params
from ctxlib.questions import contexts, needle, qa
from ctxlib.questions.instructions import RULE_METRICS, score_rules, verifiable_questions
from ctxlib.roles import PLAIN_SEPARATOR, RoleMap

EMBEDDED = "miniature"
_SCORED = [*RESPONSE_COLUMNS, *ANSWER_METRICS, *RULE_METRICS]


def open_experiment(params_file: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """The parameters, their inputs checked to be there, and torch set to the experiment's threads and seed."""
    params = load_params(params_file, overrides)
    params.check_inputs()
    torch.set_num_threads(params.threads)
    torch.manual_seed(params.seed)
    return params


def town(params: Params) -> Town | None:
    """The invented town if the experiment takes its needles from there, else None: then no truth is known."""
    return Town() if params.needle.source == EMBEDDED else None


def model_path(params: Params, which: str) -> str:
    """Folder or hub id of `pretrained`, `instruct` or `seed_model`; InputError if 03 has not trained it yet."""
    source = model_source(getattr(params.models, which))
    if params.trains(which) and not params.path(source).exists():
        raise InputError(
            f"{params.file}: models.{which}: '{source}' is not there yet; notebook 03 trains it: run it first"
        )
    return str(params.path(source)) if params.path(source).exists() else source


def tokenizer(params: Params, which: str = "pretrained") -> PreTrainedTokenizerBase:
    """The model's tokenizer with the experiment's chat template; InputError if there is none."""
    template = params.path(params.models.chat_template) if params.models.chat_template else None
    revision = params.models.revision_of(which)
    loaded = models.load_tokenizer(model_path(params, which), chat_template=template, revision=revision)
    models.require_chat_template(loaded)
    return loaded


def subject(params: Params, which: str) -> Subject:
    """A model to ask, with its tokenizer and the key of its answers: a hash of its files.

    which: `pretrained`, `instruct` or `seed_model`, or the name of a model that 03 trained, as `vanilla`, from
        `work/models/<name>`. An adapter is loaded over the weights it was trained on (4-bit ones under QLoRA).
    Raises InputError if there is no such model.
    """
    if which in MODEL_ROLES:
        key = models.model_hash(model_path(params, which), revision=params.models.revision_of(which))
        return Subject(which, model(params, which), tokenizer(params, which), key)
    folder = params.output_dir / "work" / "models" / which
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model; first run 03_indicator_sft, or 'make reproduce'")
    loaded = _load(params, folder, params.models.revision)
    return Subject(which, loaded, models.load_tokenizer(folder), models.model_hash(folder))


def model(params: Params, which: str) -> PreTrainedModel | PeftModel:
    """`pretrained`, `instruct` or `seed_model`; an adapter is loaded over the weights it was trained on."""
    return _load(params, model_path(params, which), params.models.revision_of(which))


def _load(params: Params, path: str | Path, revision: str | None) -> PreTrainedModel | PeftModel:
    return models.load_model(
        path,
        dtype=params.models.dtype,
        quantisation=models.trained_over(path) or params.models.quantisation,
        attention=params.models.attention,
        revision=revision,
    )


def conversations(params: Params) -> Corpus:
    """The conversations to score and to train on; in the miniature every answer carries the truth."""
    section = params.conversations
    if section.source == EMBEDDED:
        made = texts.chat_dataset(Town(), section.n or 1000, params.miniature.shares, params.seed)
        return Corpus(tuple(made), pd.DataFrame({"reason": [], "n": []}), EMBEDDED)
    on_hub = params.locate(section.source) == "hub"
    corpus = load_conversations(
        section.source if on_hub else params.path(section.source),
        split=section.split,
        revision=section.revision,
        on_bad_row=section.on_bad_row,
        remove_refusals=section.remove_refusals,
    )
    return replace(corpus, conversations=corpus.conversations[: section.n])


def raw_texts(params: Params) -> list[Conversation]:
    """Plain text to fine-tune on among the conversations, as conversations without a template; empty for none.

    By default the town's, if the conversations are its; else none, so that `finetune.raw_text_share` has no effect.
    """
    if params.raw_text is None:
        return []
    if params.raw_text == EMBEDDED:
        n = (params.conversations.n or 1000) * params.finetune.raw_text_per_conversation
        return texts.raw_texts(Town(), round(n), params.seed)
    on_hub = params.locate(params.raw_text) == "hub"
    return load_raw_texts(params.raw_text if on_hub else params.path(params.raw_text))


def needles(params: Params, loaded_tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    section = params.needle
    cells = {"lengths": section.lengths, "depths": section.depths, "per_cell": section.per_cell, "seed": params.seed}
    if section.source == EMBEDDED:
        return texts.needles(Town(), **cells)
    return needle.text_needles(
        needle.read_haystack(params.path(section.haystack), section.variant),
        loaded_tokenizer,
        needle=section.needle,
        question=section.question,
        keywords=section.keywords,
        response_prefix=section.response_prefix,
        prompt=section.prompt,
        variant=section.variant,
        **cells,
    )


def passage_questions(params: Params) -> list[Question]:
    """At most `qa.n` questions of each of `qa.sources`; InputError if two sources have a question with the same id."""
    section, questions = params.qa, []
    for source in section.sources:
        if source == EMBEDDED:
            questions += texts.passage_questions(Town(), section.n, params.seed)
            continue
        on_hub = params.locate(source) == "hub"
        questions += qa.load_questions(
            source if on_hub else params.path(source),
            section.n,
            params.seed,
            prompt=section.prompt,
            variant=section.variant,
            split=section.split,
        )
    times = Counter(question.id for question in questions)
    if repeated := [key for key, count in times.items() if count > 1]:
        raise InputError(f"{params.file}: qa.sources: two of them hold the question '{repeated[0]}'; name each once")
    return questions


def fact_questions(params: Params) -> list[Question]:
    """Closed questions about facts that the model knows by heart; none if those are not known."""
    home = town(params)
    return texts.known_fact_questions(home, params.facts.n, params.seed) if home else []


def domain_questions(params: Params) -> list[Question]:
    """Questions from domains that no chat covers, `qa.n` of each, with the context that answers them."""
    home = town(params)
    return [q for name in DOMAINS for q in texts.domain_questions(home, name, params.qa.n, params.seed)] if home else []


def instruction_questions(params: Params) -> list[Question]:
    """Word tasks with one right answer in the town, whose models know few words; elsewhere verifiable instructions."""
    home, n = town(params), params.instructions.n
    return texts.instruction_questions(home, n, params.seed) if home else verifiable_questions(n, params.seed)


def ask(
    params: Params,
    asked: Subject,
    questions: Sequence[Question],
    *,
    condition: str,
    template: bool,
    indicator: str | None = None,
    steering_alpha: float | None = None,
    use_prefix: bool = False,
    around: Around | None = None,
    cached: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Answers to questions of any family, scored: columns of `answer_questions` and `score_answers`, and `condition`.

    `recalled` is 1 if the answer has all of the question's keywords (family `contexts`: one of its gold answers, as
    whole words; their column `cluster` is for `metrics.summarise(…, cluster="cluster")`); `followed` is 1 if it is an
    instruction's one right answer or follows all its rules to the letter. If `cached`, answers are stored in the
    experiment's `work` folder. Common beginnings of the haystacks made from texts are read once.
    """
    limits: dict[str, Any] = {
        "needle": params.needle,
        "qa": params.qa,
        "facts": params.qa,
        "instructions": params.instructions,
        contexts.FAMILY: params.qa,
    }
    limits |= dict.fromkeys(DOMAINS, params.qa)
    variants = {"needle": params.needle.variant, "qa": params.qa.variant}
    parts = []
    for family in dict.fromkeys(question.family for question in questions):
        of_family = [question for question in questions if question.family == family]
        answers = answer_questions(
            asked,
            of_family,
            template=template,
            indicator=indicator,
            use_prefix=use_prefix,
            steering_alpha=steering_alpha,
            steering_options={"variant": params.steering.variant},
            max_new_tokens=limits[family].max_new_tokens,
            stop_text=None if template else PLAIN_SEPARATOR,
            batch_size=params.models.batch_size,
            reuse_prefixes=family == "needle" and params.needle.source != EMBEDDED,
            cache_dir=params.output_dir / "work" / "answers" if cached else None,
            around=around,
            progress=progress,
        )
        parts.append(
            score_rules(score_answers(answers, of_family, variant=variants.get(family, "standard")), of_family)
        )
    scored = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_SCORED)
    recalled = (scored.needle_recall == 1).astype(float).where(scored.needle_recall.notna())
    if any(question.cluster for question in questions):
        scored["cluster"] = scored.id.map({question.id: question.cluster for question in questions})
    recalled = recalled.mask(scored.family == contexts.FAMILY, scored.containment)
    followed = scored.prompt_strict.fillna(scored.exact_match).where(scored.family == "instructions")
    return scored.assign(condition=condition, recalled=recalled, followed=followed.astype(float))


def close_up(
    params: Params, asked: Subject, question: Question, *, template: bool, indicator: str | None = None
) -> dict:
    """What a model does with one question that has a needle: what it says, what it could say, and where it looks.

    `answer`: its free answer. `p_text`, `p_memory`: given the answer's first words, the probability that it continues
    with the value in the text, and with the memorised one (NaN if there is none). `on_needle`: the largest share of
    attention that a head pays the needle there, in [0, 1], and `head` ("layer.head"), which head that is.
    """
    told = ask(params, asked, [question], condition="", template=template, indicator=indicator, progress=False)
    prompt = question_prompt(asked.tokenizer, question, template, indicator, use_prefix=True)

    def probability(value: str | None) -> float:
        if value is None:
            return math.nan
        said = replace(question, response_prefix=f"{question.response_prefix} {value}")
        ids = question_prompt(asked.tokenizer, said, template, indicator, use_prefix=True).ids.to(asked.model.device)
        with torch.inference_mode():
            logits = asked.model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
        of_value = logits.log_softmax(-1).gather(1, ids[1:, None])[len(prompt) - 1 :]
        return of_value.sum().exp().item()

    shares = attention_allocation(
        asked.model,
        [prompt],
        batch_size=1,
        pad_token_id=asked.tokenizer.pad_token_id,
        groups=[needle.needle_groups(prompt, question)],
    )
    of_needle = shares[shares.role == "needle"]
    best = of_needle.loc[of_needle.attention_allocation.idxmax()]
    return {
        "answer": told.answer.iloc[0],
        "p_text": probability(_value_in_text(question)),
        "p_memory": probability(question.memory_answer),
        "on_needle": best.attention_allocation,
        "head": f"{best.layer}.{best['head']}",
    }


def _value_in_text(question: Question) -> str:
    """What the text says after the response prefix: the keywords if they follow it, else the rest of the sentence."""
    value, sentence = " ".join(question.keywords), question.answers[0]
    follows = f"{question.response_prefix} {value}" in sentence
    return value if follows else sentence.removeprefix(question.response_prefix).strip()


def prompts(
    loaded_tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    template: bool,
    first_response_token: FirstResponseToken,
    indicator: str | None = None,
) -> list[RoleMap]:
    """The questions as the model reads them, up to the token where attention is measured; every token has its role.

    The first response token is defined in two ways. `last_input`: the prompt's last token, from which the model begins
    its answer (paper, section 2.2). `forced_prefix`: the last word of the question's response prefix, the beginning of
    the answer that is given to the model, so that the next word is the one in the text (authors' code). They are the
    same if a question has no response prefix.
    """
    use_prefix = first_response_token == "forced_prefix"
    return [question_prompt(loaded_tokenizer, question, template, indicator, use_prefix) for question in questions]


def spread(questions: Sequence[Any], n: int) -> list[Any]:
    """About `n` of the questions (or of anything), evenly spread: every kind, length and depth keeps its proportion."""
    stride = max(1, len(questions) / n)
    return [questions[int(i * stride)] for i in range(min(n, len(questions)))]


def fact_sample(params: Params, n: int) -> pd.DataFrame:
    """Facts that the model knows by heart about the first `n` residents, one row each; empty if none are known."""
    home = town(params)
    people = list(home.facts.items())[:n] if home else []
    return pd.DataFrame([{"resident": name} | {r: f.predicate for r, f in facts.items()} for name, facts in people])


def as_conversation(question: Question) -> Conversation:
    """A question with its first gold answer, as a conversation to look at."""
    return Conversation(question.id, (*question.messages, Message("assistant", question.answers[0])))
