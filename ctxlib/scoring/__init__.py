r"""Context-dependency scores: how much of an answer's attention goes to the user's text.

$$s_M(Y_m) = \frac{1}{|Y_m|} \sum_{y \in Y_m} \max_{h} \sum_{x \in X_1 \cup \dots \cup X_m} \mathrm{Att}_h(y, x)$$

Two variants. `standard` is the formula as printed: every user token is a key, the answer is its content.
`authors_code` computes the same as the authors' script: the text of a system message counts as the user's, tokens that
are only newlines or special do not, the answer includes the end-of-sequence and newline tokens that close it, and
conversations end at 2047 tokens. A sentencepiece tokenizer such as TinyLlama's writes a lone "▁" after every `</s>`;
their script counts it as the user's before an answer and as part of the answer behind one.

In both variants an answer that does not fit into the length is skipped and counted. There the script differs: it scores
the part of an answer that fits, and drops some whole answers of a conversation that it cuts.

Reference: Wang et al. 2024, section 3.1; official script `process_dataset.py`.
"""

from ctxlib.scoring.answers import (
    AnswerSpan,
    EncodedConversation,
    HeadReduction,
    answered_turns,
    checked_layers,
    checked_length,
    encode_conversation,
    length_buckets,
    reduce_heads,
    rope_borders,
)
from ctxlib.scoring.corpus import SCORE_COLUMNS, at_layer, corpus_hash, encoded_ahead, score_corpus, weights_hash

__all__ = [
    "SCORE_COLUMNS",
    "AnswerSpan",
    "EncodedConversation",
    "HeadReduction",
    "answered_turns",
    "at_layer",
    "checked_layers",
    "checked_length",
    "corpus_hash",
    "encode_conversation",
    "encoded_ahead",
    "length_buckets",
    "reduce_heads",
    "rope_borders",
    "score_corpus",
    "weights_hash",
]
