"""A folder of scores: computed from conversations, resumed when interrupted, read back, and used to mark the data.

    prepare(Settings(model="./model", data="chats.jsonl")).score("scores")

The folder holds `scores.parquet` (the frame of `score_corpus`), `scores.json` (the manifest, written last),
`dropped_rows.csv`, and `parts/`, from which an interrupted run resumes and which can be deleted afterwards.
"""

import math
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Strict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ctxlib.commands.settings import ScoredRows, ScoreRun
from ctxlib.conversations import Corpus, data_files, open_conversations
from ctxlib.files import check_writable, digest, file_digest, folder_for_now, to_json, write
from ctxlib.miniature import model_source
from ctxlib.models import load_config, load_model, load_tokenizer, require_chat_template
from ctxlib.paper import THRESHOLD, paper_layer
from ctxlib.params import InputError, Layer, Loading, ScoreRule, Scoring, expanded, locate
from ctxlib.roles import role_map
from ctxlib.scoring import (
    answered_turns,
    checked_layers,
    checked_length,
    corpus_hash,
    score_corpus,
    weights_hash,
)

Share = tuple[int, int]  # (i, n): the i-th of n, counted from 1
PACKAGES = ("ctxlib", "torch", "transformers", "tokenizers", "peft", "bitsandbytes", "datasets", "pandas")


class Settings(Loading, ScoredRows, ScoreRule, ScoreRun):
    """Everything that decides the scores.

    layers: numbers from 0, "all", or None for the paper's layer, to scale (`paper_layer`).
    """

    model: str
    data: str
    layers: Annotated[tuple[Layer, ...], Strict(False)] | Literal["all"] | None = None

    def load_data(self) -> Corpus:
        rules = ("format", "split", "on_bad_row", "max_bad_rows", "remove_refusals", "limit")
        return open_conversations(self.data, **{name: getattr(self, name) for name in rules})

    def changed(self, **changes: Any) -> "Settings":
        return Settings(**self.model_dump() | changes)


@dataclass(frozen=True)
class Run:
    """The result of one call of `Prepared.score`. `manifest` is None while parts of `missing_shares` are missing."""

    manifest: dict[str, Any] | None
    scores: pd.DataFrame
    missing_shares: list[Share]
    tokens: int
    seconds: float

    def summary(self) -> list[str]:
        """A summary in a few lines."""
        speed = f"{self.tokens:,} tokens in {self.seconds:,.1f} s ({self.tokens / self.seconds:,.0f} tokens/s)"
        lines = [speed if self.tokens else "no new tokens: all parts existed"]
        if self.manifest is None:
            shares = ", ".join(f"{i}/{n}" for i, n in self.missing_shares)
            return [*lines, f"not complete: still to be run, with the same --out: --shard {shares}"]
        counts, skipped = self.manifest["counts"], self.manifest["skipped"]
        lines.append(f"scored {counts['turns_scored']:,} of {counts['turns']:,} turns")
        lines += [f"  not scored: {n:,}, {reason}" for reason, n in skipped.items()]
        for layer, of_layer in self.scores.groupby("layer")["score"]:
            low, middle, high = of_layer.quantile([0.1, 0.5, 0.9])
            over = (of_layer > THRESHOLD).mean()
            lines.append(
                f"  layer {layer}: median {middle:.2f}, 10–90 % {low:.2f}–{high:.2f}; over {THRESHOLD}: {over:.1%}"
            )
        return lines


@dataclass(frozen=True)
class Prepared:
    """Checked and completed settings with data and tokenizer; the weights are not loaded yet."""

    settings: Settings
    depth: int
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    files: dict[str, str]

    @cached_property
    def n_turns(self) -> int:
        return sum(len(answered_turns(conversation)) for conversation in self.corpus.conversations)

    def description(self) -> list[str]:
        """What will be scored and how, in a few lines, with the first dropped rows."""
        settings, listed = self.settings, self.corpus.dropped_rows
        lines = [
            f"{settings.data}: {len(self.corpus):,} conversations ({settings.format}), {self.n_turns:,} answered turns",
            *(f"  {n:,} × {reason}" for reason, n in self.corpus.dropped.itertuples(index=False)),
            *(
                f"    {place}, {key}: {reason}".replace(", :", ":")
                for place, key, reason, _ in listed.head(5).to_numpy()
            ),
            *([f"    … and {len(listed) - 5:,} more rows, all in dropped_rows.csv"] if len(listed) > 5 else []),
        ]
        layers = ", ".join(map(str, settings.layers))
        paper = "; the paper's 15 of 22, to scale" if settings.layers == (paper_layer(self.depth),) else ""
        how = f"{settings.variant} variant, {settings.head_reduction}, up to {settings.max_length:,} tokens"
        return [*lines, f"{settings.model}: layer {layers} (of 0 to {self.depth - 1}{paper}); {how}"]

    def score(self, folder: str | Path, share: Share = (1, 1), progress: bool = True) -> Run:
        """Scores one share of the parts and, when the parts of all shares exist, writes the folder's files.

        Parts are kept under a hash of everything that decides the scores: an interrupted run resumes and ends with the
        same bytes; other settings start anew. The token budget is not part of it: if memory runs out, a run with a
        smaller one resumes from the parts. Scores in the folder are replaced only when the new ones are complete.

        Raises InputError for a folder that cannot be written or holds the data, for a model that is not loadable or
        whose attention cannot be recorded, for a score that is not a number, and when no turn could be scored.
        """
        folder = expanded(folder)
        self._check(folder)
        with folder_for_now(folder / "parts"):
            try:
                return self._score(folder, share, progress)
            except InputError:
                for record in (folder / "parts").glob("*/*/settings.json"):
                    if not any(record.parent.glob("part-*")):
                        record.unlink(missing_ok=True)
                raise

    def _score(self, folder: Path, share: Share, progress: bool) -> Run:
        settings = self.settings
        model = load_model(
            model_source(settings.model),
            dtype=settings.dtype,
            quantisation=settings.quantisation,
            attention=settings.attention,
            revision=settings.revision,
        )
        identity = {
            "weights": weights_hash(model),
            "chat_template": digest(self.tokenizer.chat_template),
            "vocabulary": digest(sorted(self.tokenizer.get_vocab().items())),
            "conversations": corpus_hash(self.corpus),
        }
        how = {name: getattr(settings, name) for name in _HOW}
        parts = folder / "parts" / digest([identity, how, settings.dtype, settings.quantisation, settings.attention])
        rule = Scoring(**{name: getattr(settings, name) for name in ScoreRule.model_fields})
        call = {
            "model": model,
            "tokenizer": self.tokenizer,
            "corpus": self.corpus,
            "settings": rule,
            "shard_dir": parts,
        }
        call |= {name: getattr(settings, name) for name in ("layers", "max_length", "conversations_per_part")}
        call |= {"weights": identity["weights"], "data": identity["conversations"]}

        there_before = set(_part_files(parts))
        began = time.perf_counter()
        try:
            scores = score_corpus(**call, shard=(share[0] - 1, share[1]), progress=progress)
        except InputError:
            if share == (1, 1) or share in self._missing(parts, share[1]):
                raise
            scores = pd.DataFrame()  # a share of nothing but turns that cannot be scored
        seconds = time.perf_counter() - began
        tokens = sum(_n_tokens(pd.read_parquet(part)) for part in _part_files(parts) if part not in there_before)
        if missing := self._missing(parts, share[1]):
            return Run(None, scores, missing, tokens, seconds)
        if share[1] > 1:
            scores = score_corpus(**call, progress=False)
        manifest = self._manifest(identity, scores) | {
            "run": {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}
        }
        write(folder / "dropped_rows.csv", self.corpus.dropped_rows.to_csv(index=False, lineterminator="\n"))
        write(folder / "scores.parquet", scores.to_parquet(index=False))
        manifest["scores_sha256"] = file_digest(folder / "scores.parquet")
        write(folder / "scores.json", to_json(manifest))
        return Run(manifest, scores, [], tokens, seconds)

    def _check(self, folder: Path) -> None:
        if folder.resolve() == expanded(self.settings.data).resolve():
            raise InputError(f"{folder}: is where the data are; choose another folder for the scores")
        check_writable(folder / "parts")

    def _missing(self, parts: Path, shares: int) -> list[Share]:
        """The shares that have missing parts."""
        there = {int(re.sub(r"\D", "", part.stem)) for part in _part_files(parts)}
        wanted = range(math.ceil(len(self.corpus) / self.settings.conversations_per_part))
        return [(i + 1, shares) for i in sorted({number % shares for number in wanted if number not in there})]

    def _manifest(self, identity: dict[str, str], scores: pd.DataFrame) -> dict[str, Any]:
        dropped = self.corpus.dropped
        return {
            "settings": self.settings.model_dump(mode="json"),
            "identity": identity,
            "data_sha256": self.files,
            "counts": {
                "conversations": len(self.corpus),
                "turns": self.n_turns,
                "turns_scored": len(scores[["conversation", "turn"]].drop_duplicates()),
                "tokens": _n_tokens(scores),
            },
            "skipped": scores.attrs["skipped"],
            "dropped": dict(zip(dropped["reason"], dropped["n"].tolist(), strict=True)),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        }


_HOW = ("layers", "variant", "head_reduction", "max_length", "conversations_per_part")


def prepare(settings: Settings) -> Prepared:
    """Checks everything that can be checked without the weights; completes layers, max_length and format.

    Raises InputError for a model, tokenizer, chat template or data that is missing or not usable, a layer that the
    model does not have, and data without a turn to score.
    """
    model = model_source(settings.model)
    config = load_config(model, revision=settings.revision)
    depth, positions = (getattr(config, name, None) for name in ("num_hidden_layers", "max_position_embeddings"))
    if not depth or not positions:
        missing = "layers" if not depth else "positions"
        raise InputError(f"{settings.model}: a {config.model_type} model has no fixed number of {missing}; use another")
    layers = (paper_layer(depth),) if settings.layers is None else settings.layers
    layers = tuple(checked_layers(layers, depth, settings.model))
    _check_layer_types(config, layers)
    tokenizer = load_tokenizer(model, chat_template=settings.chat_template, revision=settings.revision)
    require_chat_template(tokenizer)
    corpus = settings.load_data()
    prepared = Prepared(
        settings=settings.changed(
            layers=layers,
            max_length=checked_length(settings.max_length, positions, settings.variant),
            format=corpus.format,
        ),
        depth=depth,
        tokenizer=tokenizer,
        corpus=corpus,
        files=data_digests(settings.data),
    )
    _check_template(tokenizer, corpus)
    if not prepared.n_turns:
        left = f"the {len(corpus):,} conversations hold" if len(corpus) else "every row was dropped, which leaves"
        raise InputError(f"{settings.data}: {left} no user message with an answer; there is nothing to score")
    return prepared


def _check_template(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    """Raises InputError if the chat template does not show who wrote which token in any conversation."""
    reason = None
    for conversation in corpus.conversations:
        try:
            role_map(tokenizer, conversation.messages)
            return
        except InputError as error:
            reason = reason or error
    if reason:
        raise InputError(f"{corpus.source}: no turn can be scored: {reason}")


def _check_layer_types(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Raises InputError for layers without attention, if the configuration gives their types."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    with_attention = [layer for layer, type in enumerate(types) if type not in ("linear_attention", "conv", "moe")]
    if missing := [layer for layer in layers if layer not in with_attention]:
        nothing = f"this {config.model_type} model has no attention that can be recorded in layers {missing}"
        raise InputError(f"{nothing}; choose one of {with_attention}" if with_attention else f"{nothing}; use another")


def parse_share(text: str) -> Share:
    """(2, 4) of "2/4". Raises InputError for anything else; shares are 1-based."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    share = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= share[0] <= share[1]:
        raise InputError(f"shard {text}: give the share and their number, counted from 1: 1/4, 2/4, 3/4 or 4/4")
    return share


def parse_layers(texts: list[str] | None) -> tuple[int, ...] | Literal["all"] | None:
    """(3, 4) of ["3", "4"], "all" of ["all"], None of nothing. Raises InputError for anything else."""
    if not texts:
        return None
    if texts == ["all"]:
        return "all"
    if wrong := [text for text in texts if not text.strip().isdecimal()]:
        raise InputError(f"layer {wrong[0]}: give a number from 0 on, or 'all' alone")
    return tuple(int(text) for text in texts)


def data_digests(source: str) -> dict[str, str]:
    """sha256 of every data file by name; none for a dataset on the hub, which is compared by its conversations."""
    if locate(source) == "hub":
        return {}
    return {path.name: file_digest(path) for path in data_files(source)}


def _part_files(parts: Path) -> list[Path]:
    return sorted(parts.glob("*/part-*.parquet"))


def _n_tokens(scores: pd.DataFrame) -> int:
    """Tokens that the model read: of every conversation, up to the end of its last scored answer."""
    return int((scores["context_tokens"] + scores["answer_tokens"]).groupby(scores["conversation"]).max().sum())
