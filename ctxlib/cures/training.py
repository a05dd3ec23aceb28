"""Cures that change what is trained on: more raw text, fewer or other answers, other losses."""

from dataclasses import dataclass, replace
from typing import Any

from ctxlib.conversations import Conversation, Corpus, Message, Question
from ctxlib.cures.cure import Cure, Material
from ctxlib.finetune import TurnLoss
from ctxlib.generate import answer_questions
from ctxlib.roles import PLAIN_SEPARATOR


@dataclass(frozen=True)
class Rehearsal(Cure):
    """More raw text among the training examples: `share` in [0, 1) of all of them, in addition to the conversations.

    Reference: Robins 1995, rehearsal against catastrophic forgetting; Ouyang et al. 2022, appendix C.4 (PPO-ptx).
    """

    share: float = 0.25
    name: str = "rehearsal with raw text"

    @property
    def changes(self) -> dict[str, Any]:
        return {"finetune.raw_text_share": self.share}


@dataclass(frozen=True)
class DropContradicting(Cure):
    """Without the turns whose answer contradicts the user's text: answers of these `kinds`, a truth of the miniature.

    An answer is dropped with the user's message before it. The number of training steps stays the same. The paper names
    such turns as a cause (section 2.2); notebook 06 gives their dose.
    """

    kinds: tuple[str, ...] = ("contradicting_passage",)
    name: str = "turns against the text dropped"

    def corpus(self, material: Material) -> Corpus:
        kept = (self._without(one) for one in material.corpus.conversations)
        return replace(material.corpus, conversations=tuple(one for one in kept if one.messages))

    def _without(self, conversation: Conversation) -> Conversation:
        drop = {n for n, message in enumerate(conversation.messages) if message.kind in self.kinds}
        drop |= {n - 1 for n in drop}
        messages = tuple(message for n, message in enumerate(conversation.messages) if n not in drop)
        return replace(conversation, messages=messages)


@dataclass(frozen=True)
class WeightByScore(Cure):
    """The turns that the indicator would mark, score over `threshold`, weigh 1 in the loss, all others `rest`.

    The same knowledge as the scored marks, in the loss instead of a token: nothing has to be added to the prompt.
    """

    threshold: float = 0.9
    rest: float = 0.1
    name: str = "loss weighted by score"

    def corpus(self, material: Material) -> Corpus:
        return material.scored

    def turn_loss(self, answer: Message) -> TurnLoss:
        dependent = answer.score is not None and answer.score > self.threshold
        return TurnLoss(weight=1.0 if dependent else self.rest)


@dataclass(frozen=True)
class KeepToBase(Cure):
    r"""On turns with a score over `threshold`, $\lambda\,\mathrm{KL}(p_\text{base} \| p_\theta)$ is added to the loss.

    The base is the same model with the adapter off, reading the same tokens. Reference: Ziegler et al. 2019 (arXiv
    1909.08593), equation 2, a KL penalty against the model before; here forward, exact over the vocabulary, per token.
    """

    threshold: float = 0.9
    strength: float = 1.0
    name: str = "KL to the base"

    def corpus(self, material: Material) -> Corpus:
        return material.scored

    def turn_loss(self, answer: Message) -> TurnLoss:
        dependent = answer.score is not None and answer.score > self.threshold
        return TurnLoss(reference=self.strength if dependent else 0.0)


@dataclass(frozen=True)
class SelfDistilled(Cure):
    """Every answer replaced by what the base model says, asked the same in raw text.

    An answer that is empty or not ended after `max_new_tokens` is not taken: the original stays. Earlier turns are the
    original ones. Reference: Yang et al. 2024 (arXiv 2402.13669), self-distillation; there the model rewrites the
    original answer, which a base model of a town cannot be asked for.
    """

    max_new_tokens: int = 48
    name: str = "self-distilled answers"

    def corpus(self, material: Material) -> Corpus:
        asked = {
            (c, n): Question(f"{c}-{n}", "distilled", "", conversation.messages[:n])
            for c, conversation in enumerate(material.corpus.conversations)
            for n, message in enumerate(conversation.messages)
            if message.role == "assistant"
        }
        told = answer_questions(
            material.base,
            list(asked.values()),
            template=False,
            indicator=None,
            max_new_tokens=self.max_new_tokens,
            stop_text=PLAIN_SEPARATOR,
            batch_size=64,
            use_prefix=False,
            progress=False,
        )
        usable = (told.answer != "") & (told.answer_tokens < self.max_new_tokens)
        said = {place: answer for place, answer, use in zip(asked, told.answer, usable, strict=True) if use}
        conversations = tuple(
            replace(
                conversation,
                messages=tuple(
                    replace(message, content=said.get((c, n), message.content))
                    for n, message in enumerate(conversation.messages)
                ),
            )
            for c, conversation in enumerate(material.corpus.conversations)
        )
        return replace(material.corpus, conversations=conversations)
