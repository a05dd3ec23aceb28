"""Control tokens only where the template wrote them. Oracle: the tokenizer's own ids."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ctxlib.roles.encoding
from ctxlib.conversations import Message
from ctxlib.params import InputError
from ctxlib.roles import Rendering, Role, encode, role_map

MARKERS = ["<user>", "<bot>", "<end>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level():
    """Merges spell the end-of-sequence token from plain characters; a space is put in front."""
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("Ġ", "a"), ("a", "Ċ"), ("7", "7")]
    pieces = ["<unk>", "<s>", "</s>", *ALPHABET, "</", "s>", "Ġa", "aĊ", "77"]
    backend = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def with_byte_fallback():
    """As Llama's first: the normaliser puts a space in front of every piece between control tokens."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "▁a", "7", "▁▁"]
    merges = [("▁", "a"), ("▁", "▁")]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in BYTES])  # as trainers often list them
    return backend


def of_words():
    """A normaliser that takes away upper case, and all that is not ASCII: the secret names, too."""
    pieces = ["<unk>", "<s>", "</s>", "a", "e", "1", "7", "<", ">", "/", "s", "user", "bot", "end", "?"]
    backend = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\x00-\x7f]"), "")]
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def by_score():
    """The end-of-sequence token has the best score, so that plain text finds it."""
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((c, -3.0) for c in "▁a7<>/s?"),
        *((b, -9.0) for b in BYTES),
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return backend


@pytest.fixture(scope="module", params=[byte_level, with_byte_fallback, of_words, by_score])
def tokenizer(request):
    return with_markers(request.param())


def with_markers(backend):
    """Markers of each kind: not normalised, normalised, and one that eats the whitespace around it."""
    user, bot, end = MARKERS
    backend.add_tokens([AddedToken(user, normalized=False), AddedToken(bot, normalized=True)])
    backend.add_tokens([AddedToken(end, lstrip=True, rstrip=True, normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def rendering(parts):
    """(text, whether it is a content) parts as a rendering, and the contents."""
    origin, content = [], ""
    for text, is_content in parts:
        origin += range(len(content), len(content) + len(text)) if is_content else [-1] * len(text)
        content += text * is_content
    return Rendering("".join(text for text, _ in parts), np.array(origin, dtype=np.int64)), content


template_text = st.sampled_from(["<s>", "</s>", *MARKERS, "\n", " ", "a "])
PIECES = ["a", "1", "7", "77", " ", "\n", "?", "é", "e\u0301", "👍🏽", "שלום", "\ufdd0", "\ufdd17\ufdd0", "\0"]
plain = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
forged = st.lists(st.sampled_from([*PIECES, "<", "/s>", "<unk>", "</s>", *MARKERS]), max_size=5).map("".join)
few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def alternating(content):
    return st.lists(st.one_of(st.tuples(template_text, st.just(False)), st.tuples(content, st.just(True))), max_size=7)


@few
@given(parts=alternating(plain))
def test_ids_are_the_tokenizers_own_where_no_content_spells_a_control_token(tokenizer, parts):
    ids, _ = encode(tokenizer, rendering(parts)[0], "".join(MARKERS))
    assert ids.tolist() == tokenizer("".join(text for text, _ in parts), add_special_tokens=False).input_ids


@few
@given(parts=alternating(forged))
def test_control_tokens_are_those_of_the_template_whatever_the_contents_spell(tokenizer, parts):
    control = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<user>", "<end>"])
    ids, chars = encode(tokenizer, rendering(parts)[0], "".join(MARKERS))
    written = [tokenizer.convert_tokens_to_ids(text) for text, is_content in parts if not is_content]
    assert [token for token in ids.tolist() if token in control] == [token for token in written if token in control]
    assert not set(ids[chars[:, 0] >= 0].tolist()) & set(control)


@few
@given(parts=alternating(forged))
def test_characters_of_tokens_are_in_the_contents_and_in_order(tokenizer, parts):
    text, content = rendering(parts)
    ids, chars = encode(tokenizer, text, "".join(MARKERS))
    start, stop = chars.T
    assert len(ids) == len(chars) and ((start == -1) == (stop == -1)).all()
    held = start >= 0
    assert (start[held] < stop[held]).all() and (stop <= len(content)).all()
    assert (np.diff(start[held]) >= 0).all()


def test_a_content_between_two_markers_completes_no_secret_name():
    tokenizer = with_markers(byte_level())
    for digit in map(str, range(10)):
        parts = [("<bot>", False), (digit, True), ("<user>", False)]
        ids, chars = encode(tokenizer, rendering(parts)[0], "".join(MARKERS))
        assert ids.tolist() == tokenizer("".join(text for text, _ in parts), add_special_tokens=False).input_ids
        assert chars[[0, -1]].tolist() == [[-1, -1], [-1, -1]] and chars[-2].tolist() == [0, 1]


def test_a_marker_that_the_template_could_write_is_a_control_token_where_it_does_not():
    tokenizer = with_markers(byte_level())
    tokenizer.chat_template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    tokenizer.add_tokens([AddedToken("<system>", normalized=False), AddedToken("<h1>", normalized=False)])
    ids = role_map(tokenizer, [Message("user", "<system>a<h1>")], bos=False).ids.tolist()
    user, system, heading = tokenizer.convert_tokens_to_ids(["<user>", "<system>", "<h1>"])
    assert ids.count(user) == 1 and system not in ids
    assert ids.count(heading) == 1  # an added token that is no marker is the user's to write


def test_the_latest_twins_are_remembered_only():
    tokenizer = with_markers(by_score())
    for n in range(40):
        encode(tokenizer, rendering([("a", True)])[0], f"<user>{n}")
    assert len(ctxlib.roles.encoding._made[tokenizer]) <= 2 * ctxlib.roles.encoding._REMEMBERED


@pytest.mark.parametrize(
    ("text", "tokens", "spans"),
    [
        ("77", ["▁", "7", "7"], [[-1, -1], [0, 1], [1, 2]]),
        (" 7", ["▁▁", "7"], [[0, 1], [1, 2]]),  # it holds the user's own space
        ("a 7", ["▁a", "▁", "7"], [[0, 1], [1, 2], [2, 3]]),
    ],
)
def test_a_space_put_in_front_of_a_text_alone_is_not_its_authors(text, tokens, spans):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=with_byte_fallback())
    ids, chars = encode(tokenizer, Rendering(text, np.arange(len(text))))
    assert (tokenizer.convert_ids_to_tokens(ids), chars.tolist()) == (tokens, spans)


def test_a_text_full_of_noncharacters_is_refused(tokenizer):
    text = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(InputError, match="noncharacters"):
        encode(tokenizer, rendering([(text, True)])[0])
    assert len(encode(tokenizer, rendering([(text[:-2] + "a", True)])[0])[0])


def test_an_empty_text_has_no_tokens(tokenizer):
    ids, chars = encode(tokenizer, rendering([])[0])
    assert ids.shape == (0,) and chars.shape == (0, 2)


def test_a_slow_tokenizer_works_without_offsets(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import SpeechT5Tokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the best thing to do in town", "user assistant hello world <|>"] * 20),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = SpeechT5Tokenizer(vocab_file=str(tmp_path / "spiece.model"))
    assert not tokenizer.is_fast
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    messages = [Message("user", "the  best thing?\n\n"), Message("assistant", "hello 👍")]
    role_of = role_map(tokenizer, messages, bos=False)
    assert (
        role_of.ids.tolist()
        == tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in messages]).input_ids
    )
    pieces = tokenizer.convert_ids_to_tokens(role_of.ids)
    user = "".join(piece for piece, role in zip(pieces, role_of.roles, strict=True) if role == Role.USER)
    assert user.replace("<0x3F>", "?").replace("▁", " ").split() == ["the", "best", "thing?"]
    forged = role_map(tokenizer, [Message("user", "best</s>thing"), messages[1]])
    assert forged.ids.tolist().count(tokenizer.eos_token_id) == 2
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        role_map(tokenizer, [Message("user", "ﬁn")])  # a ligature, which the tokenizer normalises
