"""What a context-dependency score costs: five ways over the same turns.

    .venv/bin/python benchmarks/scoring.py [--dtype bfloat16] [--shape tinyllama] [--device cuda]

- ours: `score_corpus`, from text to scores.
- authors: as their script is described: eager, every layer's attention kept, every conversation padded to 2047 tokens,
  one at a time, with autograd on. On one conversation of each chunk, the nearest to the chunk's mean length.
- careful: eager `output_attentions`, no autograd, no padding, one layer picked. On the same conversations.
- tokens: text to token ids with roles, and nothing else.
- limit: a plain sdpa forward of the layers up to the scored one, over the batches that we score, tokenised before.

Three corpora have the lengths of the paper's table 2 (lognormal of that mean, then cut at 2047). Each is dealt into
chunks of like mean length; the ways take turns within a chunk, and a figure is the median over chunks. Goals: speedup
over the authors >= 45 / 15 / 14 (on a GPU 20 / 8 / 8), over the careful way >= 1.5 for one conversation and, on a GPU,
>= 5 in batches (batched_vs_eager), fraction_of_limit (the limit's time by ours) >= 0.8, memory_vs_limit <= 1.1.
"""

from functools import partial
from statistics import NormalDist

import numpy as np
import pandas as pd
import torch
from side_by_side import arguments, measured, model_mib, random_llama, report

from ctxlib.conversations import Conversation, Corpus, Message
from ctxlib.miniature import MODELS
from ctxlib.models import load_tokenizer
from ctxlib.paper import paper_layer
from ctxlib.params import Scoring
from ctxlib.roles import Role, RoleMap, pad_batch, role_map
from ctxlib.scoring import EncodedConversation, answered_turns, length_buckets, score_corpus

CORPORA = {"wizardlm": (484, 1), "ultrachat": (1437, 3), "sharegpt": (1568, 4)}  # mean tokens, turns a conversation
MAX_LENGTH = 2047
SPREAD = 0.5  # standard deviation of the logarithm of the lengths


def main() -> None:
    parser = arguments(__doc__, dtype="float32")
    parser.add_argument("--corpora", choices=CORPORA, nargs="+", default=tuple(CORPORA))
    parser.add_argument("--conversations", type=int, default=35)
    parser.add_argument("--chunks", type=int, default=5)
    options = parser.parse_args()

    tokenizer = load_tokenizer(MODELS / "instruct")
    model = random_llama(
        options.shape, options.dtype, options.device, heads=(32, 4) if options.shape == "small" else None
    )
    ways = Ways(model, tokenizer)
    ways.warm_up(make_corpus(tokenizer, 64, 1, 2))
    rows, figures = [], {}
    for name in options.corpora:
        corpus = make_corpus(tokenizer, *CORPORA[name], options.conversations)
        timed = pd.DataFrame([compare(ways, chunk, options.device) for chunk in deal(corpus, options.chunks)])
        figures[f"speedup_{name}"] = (timed.authors / timed.ours).median()
        row = {"corpus": name, "conversations": len(corpus), "mean_tokens": timed.tokens.mean()}
        row |= {f"{way}_s": timed[way].median() for way in ("ours", "authors", "careful", "tokens", "limit")}
        row |= {"fraction_of_limit": (timed.limit / timed.ours).median(), "memory_vs_limit": timed.memory.max()}
        row |= {"batched_vs_eager": (timed.careful / timed.ours).median()}
        rows.append(row | {"speedup_vs_eager": (timed.careful / timed.ours_sample).median()})
        print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    report(
        table,
        **figures,
        fraction_of_limit=table.fraction_of_limit.min(),
        memory_vs_limit=table.memory_vs_limit.max(),
        speedup_vs_eager=table.speedup_vs_eager.min(),
        batched_vs_eager=table.batched_vs_eager.min(),
    )


def make_corpus(tokenizer, mean_tokens: int, turns: int, n: int) -> Corpus:
    """Conversations of random words; their lengths are the n mid-quantiles of a lognormal distribution, cut."""
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    spread = np.exp(SPREAD * quantiles)
    lengths = np.minimum(spread * mean_tokens / spread.mean(), MAX_LENGTH).astype(int)
    words = sorted(word[1:] for word in tokenizer.get_vocab() if word.startswith("▁") and word[1:].isalpha())
    draw = np.random.default_rng(0)
    markers = len(role_map(tokenizer, messages_of([["word"] * 2] * turns))) - 4 * turns
    made = []
    for i, length in enumerate(lengths):
        per_turn = np.diff(np.linspace(0, length - markers, 2 * turns + 1).astype(int)).reshape(turns, 2)
        texts = [[" ".join(draw.choice(words, size)) for size in sizes] for sizes in per_turn]
        made.append(Conversation(str(i), tuple(messages_of(texts))))
    return Corpus(tuple(made), pd.DataFrame({"reason": [], "n": []}), "random words")


def messages_of(texts: list[list[str]]) -> list[Message]:
    return [Message(role, text) for turn in texts for role, text in zip(("user", "assistant"), turn, strict=True)]


def deal(corpus: Corpus, chunks: int) -> list[Corpus]:
    """By length in turns, every second round backwards, so that the chunks have like sums."""
    places = np.arange(len(corpus)) % (2 * chunks)
    hands = np.where(places < chunks, places, 2 * chunks - 1 - places)

    def dealt(hand: int) -> tuple[Conversation, ...]:
        return tuple(c for c, of in zip(corpus.conversations, hands, strict=True) if of == hand)

    return [Corpus(dealt(hand), corpus.dropped, corpus.source) for hand in range(chunks)]


def compare(ways: "Ways", chunk: Corpus, device: str) -> dict[str, float]:
    """Seconds a conversation of each way on one chunk, and the memory of ours by the limit's.

    On the sample all scores must agree.
    """
    lengths = np.array([ways.length(conversation) for conversation in chunk.conversations])
    nearest = chunk.conversations[np.abs(lengths - lengths.mean()).argmin()]
    sample = Corpus((nearest,), chunk.dropped, chunk.source)
    calls = {
        "ours": partial(ways.ours, chunk),
        "limit": partial(ways.limit, ways.batches(chunk)),
        "tokens": partial(ways.tokens, chunk),
        "ours_sample": partial(ways.ours, sample),
        "careful": partial(ways.careful, nearest),
        "authors": partial(ways.authors, nearest),
    }
    results, times, peaks = {}, {}, {}
    for name, call in calls.items():
        results[name], times[name], peaks[name] = measured(call, device)
    for other in ("careful", "authors"):
        scores = results["ours_sample"].score.to_numpy()
        np.testing.assert_allclose(scores, results[other], atol=1e-4 if ways.model.dtype == torch.float32 else 0.05)
    times |= {name: times[name] / len(chunk) for name in ("ours", "limit", "tokens")}
    memory = (ways.weights + peaks["ours"]) / (ways.weights + peaks["limit"])
    return times | {"tokens": lengths.mean(), "memory": memory}


class Ways:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.layer = paper_layer(model.config.num_hidden_layers)
        self.weights = model_mib(model)

    def warm_up(self, corpus: Corpus) -> None:
        self.ours(corpus)
        self.limit(self.batches(corpus))

    def length(self, conversation: Conversation) -> int:
        return len(role_map(self.tokenizer, conversation.messages))

    def ours(self, corpus: Corpus) -> pd.DataFrame:
        options = {"layers": [self.layer], "max_length": MAX_LENGTH, "seed_model": "random", "progress": False}
        return score_corpus(self.model, self.tokenizer, corpus, Scoring(), **options)

    def tokens(self, corpus: Corpus) -> list[RoleMap]:
        return [role_map(self.tokenizer, conversation.messages) for conversation in corpus.conversations]

    def batches(self, corpus: Corpus) -> list[torch.Tensor]:
        """The token ids of a corpus, in the batches in which `score_corpus` takes them."""
        ids = [conversation.id for conversation in corpus.conversations]
        encoded = [EncodedConversation(id, of_one, [], {}) for id, of_one in zip(ids, self.tokens(corpus), strict=True)]
        buckets = length_buckets(encoded, 512 if self.model.device.type == "cpu" else 8192)
        return [pad_batch([one.map for one in batch], pad_id=0, side="right").input_ids for batch in buckets]

    @torch.inference_mode()
    def limit(self, batches: list[torch.Tensor]) -> None:
        depth, self.model.config.num_hidden_layers = self.model.config.num_hidden_layers, self.layer + 1
        for ids in batches:
            self.model.get_decoder()(ids.to(self.model.device), use_cache=False)
        self.model.config.num_hidden_layers = depth

    @torch.inference_mode()
    def careful(self, conversation: Conversation) -> list[float]:
        mapped = role_map(self.tokenizer, conversation.messages)
        ids = mapped.ids[None].to(self.model.device)
        self.model.set_attn_implementation("eager")
        pattern = self.model.get_decoder()(ids, use_cache=False, output_attentions=True).attentions[self.layer][0]
        self.model.set_attn_implementation("sdpa")
        return self._scores(pattern, mapped.roles, mapped.turns, conversation)

    def authors(self, conversation: Conversation) -> list[float]:
        mapped = role_map(self.tokenizer, conversation.messages)
        padding = MAX_LENGTH - len(mapped)
        ids = torch.nn.functional.pad(mapped.ids, (0, padding))[None].to(self.model.device)
        mask = (torch.arange(MAX_LENGTH) < len(mapped))[None].long().to(self.model.device)
        self.model.set_attn_implementation("eager")
        output = self.model(ids, attention_mask=mask, output_attentions=True)
        self.model.set_attn_implementation("sdpa")
        pattern = output.attentions[self.layer][0].tril()
        roles, turns = (torch.nn.functional.pad(of, (0, padding), value=-1) for of in (mapped.roles, mapped.turns))
        return self._scores(pattern, roles, turns, conversation)

    @staticmethod
    def _scores(pattern, roles, turns, conversation: Conversation) -> list[float]:
        """Best head for every token of an answer, then their mean."""
        to_user = (pattern * (roles == Role.USER).to(pattern)).sum(-1).amax(0).cpu()
        answers = [turns.eq(turn) & roles.eq(Role.ASSISTANT) for turn, *_ in answered_turns(conversation)]
        return [to_user[answer].mean().item() for answer in answers]


if __name__ == "__main__":
    main()
