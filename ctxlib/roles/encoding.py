"""Token ids of a rendering, with control tokens only where the template wrote them.

The text is encoded once, as a whole, by a twin of the tokenizer whose control tokens (special tokens, the indicator,
added tokens that the template spells) have secret names. Only what the template wrote is given these names, so text of
a user that looks like a control token stays text.
"""

import bisect
import dataclasses
import itertools
import json
import operator
import re
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ctxlib.params import InputError
from ctxlib.roles.rendering import Rendering, tokenizer_name

# What a name begins and ends with: pairs of Unicode's "noncharacters", never to be interchanged. Were the two the same,
# a content between two names could complete one.
_GUARDS = [(chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDF0, 2)]
_MASK = chr(0x10FFFF)  # in place of the contents: another noncharacter, so that no token can be found in them
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte of a character that the vocabulary lacks
_REMEMBERED = 8  # twins of a tokenizer: one for each chat template, more for odd texts


def encode(
    tokenizer: PreTrainedTokenizerBase, rendering: Rendering, spelled: str = ""
) -> tuple[Int[np.ndarray, " pos"], Int[np.ndarray, "pos 2"]]:
    """Ids, and the characters of the contents that each token holds: first and last + 1, or -1, -1 for none.

    Added tokens that occur in `spelled`, or in what the template wrote here, are control tokens as special tokens are.
    Raises InputError for a slow tokenizer that normalises text, and for a text full of noncharacters.
    """
    text, masked = rendering.text, rendering.masked(_MASK)
    guard = next((pair for pair in _GUARDS if not (pair[0] in text or pair[1] in text)), None)
    if guard is None:
        raise InputError("the text holds noncharacters from all over U+FDD0 to U+FDEF; remove them")
    control, any_token = _control_tokens(tokenizer, spelled)
    found = [*any_token.finditer(masked)]
    if wrote := {match.group() for match in found} - control:
        control |= wrote  # the same set as before has its hash already
    of_this_text = (guard, control, len(tokenizer))
    encoder = _once(tokenizer, of_this_text, lambda: _encoder(tokenizer, guard, control))

    # Control tokens are replaced by secret names, only where the template wrote them (G, H: the guards around a name):
    #   text    < s > H i < / s > < / s >      the user wrote "Hi</s>", the template the rest
    #   masked  < s > M M M M M M < / s >
    #   named   G 0 H H i < / s > G 1 H        only the second </s> is one token; the first one is plain text
    # What the twin does not recognise as a token (a name inside a word, say) goes back to plain text: hence the loop.
    found = [match for match in found if match.group() in encoder.names]
    while True:
        named = _with_names(text, found, encoder.names)
        if encoder.backend is None:
            tokens, offsets = _encode_by_pieces(tokenizer, named, {name: t for t, name in encoder.names.items()})
        else:
            encoding = encoder.backend.encode(named, add_special_tokens=False)
            tokens, offsets, original = encoding.ids, encoding.offsets, encoder.original_ids
            tokens = [original.get(token, token) for token in tokens] if original else tokens
        heads = [name.start() for name in re.finditer(guard[0], named)]
        at = [bisect.bisect_right(offsets, head, key=operator.itemgetter(1)) for head in heads]  # the tokens found
        recognised = [tokens[n : n + 1] == [encoder.ids[match.group()]] for n, match in zip(at, found, strict=True)]
        if all(recognised):
            break
        found = [match for match, is_token in zip(found, recognised, strict=True) if is_token]  # others stay text
    ids = np.array(tokens, dtype=np.int64)
    flat = itertools.chain.from_iterable(offsets)  # faster than an array of pairs
    places = np.fromiter(flat, dtype=np.int64, count=2 * len(ids))
    # Characters of the contents are counted up to each place, and a token is asked for the counts at its two ends:
    #   masked  G 0 H M M M M M M G 1 H
    #   before  0 0 0 0 1 2 3 4 5 6 6 6 6      "Hi", at 3:5, has 0 and 2: it holds those from the 0th to the 1st
    masked = _with_names(masked, found, encoder.names).encode("utf-32-le")
    before = np.zeros(len(named) + 1, dtype=np.int64)
    (np.frombuffer(masked, dtype=np.uint32) == ord(_MASK)).cumsum(out=before[1:])
    held = before[places].reshape(-1, 2)
    held[:, 1] -= 1
    chars = np.concatenate([rendering.origin[rendering.origin >= 0], [-1]])[held]
    chars[:, 1] += 1
    # A lone "▁" that sentencepiece puts in front of text claims the first character, which is the next token's, and
    # holds no content: "123" is "▁" at 0:1, "1" at 0:1, "2" at 1:2, "3" at 2:3.
    empty = held[:, 0] > held[:, 1]
    empty[:-1] |= (ids[:-1] == encoder.space) & (places[2::2] == places[:-2:2])
    empty[at] = True  # control tokens, which may take in whitespace of the contents around them
    chars[empty] = -1
    return ids, chars


def _with_names(text: str, found: list[re.Match], names: dict[str, str]) -> str:
    """The text with names in place of the control tokens found."""
    pieces, done = [], 0
    for match in found:
        pieces += [text[done : match.start()], names[match.group()]]
        done = match.end()
    return "".join([*pieces, text[done:]])


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """A twin of a tokenizer in which the control tokens have names that no content spells."""

    backend: Tokenizer | None  # None for a slow tokenizer
    names: dict[str, str]
    ids: dict[str, int]
    original_ids: dict[int, int]  # of the tokens whose id differs in the twin
    space: int  # the id of a lone "▁", or -1


_made: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Hashable, Any]] = WeakKeyDictionary()


def _once(tokenizer: PreTrainedTokenizerBase, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` yields, made once for a key of a tokenizer as long as it is among the latest."""
    of_tokenizer = _made.setdefault(tokenizer, {})
    if key not in of_tokenizer:
        of_tokenizer[key] = make()
        for oldest in [*of_tokenizer][: -2 * _REMEMBERED]:
            of_tokenizer.pop(oldest, None)  # another thread may have dropped it
    return of_tokenizer[key]


def _control_tokens(tokenizer: PreTrainedTokenizerBase, spelled: str) -> tuple[frozenset[str], re.Pattern]:
    """Special tokens and the added tokens that the template spells; and what matches any token, the longest first.

    Added tokens that are whitespace count only if they are special.
    """
    special = tokenizer.all_special_tokens

    def sort_out() -> tuple[frozenset[str], re.Pattern]:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special or token.content.strip()]
        control = {*special, *(token.content for token in added if token.special or token.content in spelled)}
        longest_first = sorted({*special, *(token.content for token in added)}, key=len, reverse=True)
        return frozenset(control), re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    return _once(tokenizer, (spelled, *special, len(tokenizer)), sort_out)


def _encoder(tokenizer: PreTrainedTokenizerBase, guard: tuple[str, str], control: frozenset[str]) -> _Encoder:
    own_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in sorted(control)}
    names = {token: str(n).join(guard) for n, (token, own) in enumerate(own_ids.items()) if own is not None}
    if not tokenizer.is_fast:
        return _Encoder(None, names, own_ids, {}, -1)  # its pieces are placed without it

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = state["model"], tokenizer.backend_tokenizer.normalizer
    if model.get("byte_fallback"):  # its bytes are pieces of characters, even where they are listed as special
        state["added_tokens"] = [token for token in state["added_tokens"] if not _BYTE.fullmatch(token["content"])]
        names = {token: name for token, name in names.items() if not _BYTE.fullmatch(token)}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), *score] for piece, *score in model["vocab"]]
    if "merges" in model:
        merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        model["merges"] = [pair for pair in merges if not names.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state["post_processor"] = state["truncation"] = state["padding"] = None  # it would trim offsets
    ids = {}
    for token in state["added_tokens"]:
        token["content"] = name = names.get(token["content"], token["content"])
        ids[name] = token["id"]
        if token["normalized"] and normalizer and name in names.values() and name not in normalizer.normalize_str(name):
            token["normalized"] = False  # the name would not survive
    twin = Tokenizer.from_str(json.dumps(state))
    in_twin = {twin.token_to_id(content): token for content, token in ids.items()}
    original_ids = {t: own for t, own in in_twin.items() if t != own}
    return _Encoder(twin, names, own_ids, original_ids, tokenizer.get_vocab().get("▁", -1))


_AS_SPACE = bytes.maketrans(b"\t\n\v\f\r", b" " * 5)  # as sentencepiece's usual normalisation has it


def _encode_by_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, control: dict[str, str]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets with a slow (sentencepiece) tokenizer: each piece lies right behind the one before it."""
    ids, offsets, start = [], [], 0
    for part in re.split(f"({'|'.join(control) or '(?!)'})", text):
        if part in control:
            ids.append(tokenizer.convert_tokens_to_ids(control[part]))
            offsets.append((start, start + len(part)))
        elif part:
            text_bytes, place = part.encode().translate(_AS_SPACE), 0
            character = np.repeat(np.arange(len(part)), [len(c.encode()) for c in part]) + start
            for piece in tokenizer.tokenize(part, split_special_tokens=True):
                byte = _BYTE.fullmatch(piece)
                surface = bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
                surface = surface.translate(_AS_SPACE)
                while not text_bytes.startswith(surface, place):
                    if surface[:1] == b" " and text_bytes.startswith(surface[1:], place):  # a space put in front
                        surface = surface[1:]
                    elif text_bytes[place : place + 1] == b" ":  # a space left out
                        place += 1
                    else:
                        raise InputError(
                            f"{tokenizer_name(tokenizer)}: a slow tokenizer that normalises text, its tokens cannot be "
                            "placed; save it as tokenizer.json (PreTrainedTokenizerFast)"
                        )
                stop = place + len(surface)
                ids.append(tokenizer.convert_tokens_to_ids(piece))
                offsets.append((int(character[place]), int(character[stop - 1]) + 1) if surface else (start, start))
                place = stop
        start += len(part)
    return ids, offsets
