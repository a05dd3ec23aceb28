"""Needles in a haystack, one `generate` a cell against prompts that share what they begin with, side by side.

    .venv/bin/python benchmarks/needle.py [--new-tokens 8 100] [--shape tinyllama] [--device cuda]

The paper's 20 depths at three of its lengths, on a random Llama. `one_by_one` is `model.generate` on each prompt,
`batched` the answering engine, `reused` the engine with `reuse_prefixes`; same_answers is 0 unless all three write the
same. Goal: >= 4 with the paper's 100 new tokens. What precedes the needle is half of a grid of even depths, so that
reading gets at most twice as fast; the rest is gained in writing, which the cells of a length do together.
"""

import random

import pandas as pd
import torch
from side_by_side import arguments, measured, random_llama, report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctxlib.generate import answer_questions, question_prompt
from ctxlib.models import Subject
from ctxlib.questions.needle import PAPER_NEEDLE, text_needles

VOCABULARY = 32000
SETTINGS = {"template": False, "indicator": None, "use_prefix": False, "progress": False}


def main() -> None:
    parser = arguments(__doc__, dtype="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=(200, 600, 1000))
    parser.add_argument("--depths", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=(100,))
    options = parser.parse_args()

    model = random_llama(options.shape, options.dtype, options.device)
    tokenizer = words()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    depths = torch.linspace(0, 100, options.depths).round().tolist()
    questions = text_needles(
        haystack(), tokenizer, **PAPER_NEEDLE, lengths=options.lengths, depths=depths, per_cell=1, seed=0
    )
    prompts = [question_prompt(tokenizer, question, False, None, False) for question in questions]
    rows = [compare(model, tokenizer, questions, prompts, n, options) for n in options.new_tokens]
    table = pd.DataFrame(rows)
    report(table, speedup=table.speedup.iloc[-1], same_answers=table.same_answers.min())


def compare(model, tokenizer, questions, prompts, new_tokens: int, options) -> dict[str, object]:
    answers = {}

    def one_by_one():
        settings = {"max_new_tokens": new_tokens, "do_sample": False}
        written = []
        for prompt in prompts:
            ids = prompt.ids[None].to(options.device)
            written.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :])
        answers["one_by_one"] = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]

    def engine(reuse: bool):
        asked = {"max_new_tokens": new_tokens, "batch_size": options.depths, "reuse_prefixes": reuse}
        frame = answer_questions(Subject("random", model, tokenizer, ""), questions, **SETTINGS, **asked)
        answers["reused" if reuse else "batched"] = frame["answer"].tolist()

    ways = {"one_by_one": one_by_one, "batched": lambda: engine(False), "reused": lambda: engine(True)}
    model.generate(prompts[0].ids[None].to(options.device), max_new_tokens=2)  # warms up
    times = {f"{name}_s": measured(way, options.device)[1] for name, way in ways.items()}
    same = all(written == answers["one_by_one"] for written in answers.values())
    speedup = times["one_by_one_s"] / times["reused_s"]
    return {"new_tokens": new_tokens, "cells": len(prompts), **times, "speedup": speedup, "same_answers": int(same)}


def haystack() -> list[str]:
    rng = random.Random(0)
    return [
        " ".join(f"w{rng.randrange(VOCABULARY - 100)}" for _ in range(rng.randint(8, 24))) + " ." for _ in range(200)
    ]


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words, those of the needle, the prompt and the haystack among them."""
    spelt = (
        " ".join(str(value) for value in PAPER_NEEDLE.values()) + " You are helpful AI that answers using only provided"
    )
    known = dict.fromkeys(["<unk>", "</s>", ".", *spelt.split(), *(f"w{n}" for n in range(VOCABULARY))])
    backend = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(list(known)[:VOCABULARY])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


if __name__ == "__main__":
    main()
