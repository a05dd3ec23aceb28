"""A template traced. Oracles: renderings written down by hand, transformers' own text, plain `str`."""

from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import ctxlib.roles.rendering
from ctxlib.conversations import Message
from ctxlib.params import InputError
from ctxlib.roles import Contents, render, spelled_by_template

TALK = [
    Message("system", " Be. "),
    Message("user", " a b "),
    Message("assistant", " r</think>c "),
    Message("user", "d"),
]
LOOP = "{% for m in messages %}"
TEMPLATES = {  # and what they write of TALK: text of the template, and (text, number of the message it comes from)
    "trims": (
        LOOP + "[{{ m.content | trim }}]{% endfor %}",
        ["[", ("Be.", 0), "][", ("a b", 1), "][", ("r</think>c", 2), "][", ("d", 3), "]"],
    ),
    "adds a system text": (
        "You help.\n" + LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        ["You help.\n", (" a b ", 1), ("d", 3)],
    ),
    "drops earlier reasoning": (
        LOOP + "{% if '</think>' in m.content %}{{ '<' ~ m.content.split('</think>')[-1].lstrip() }}"
        "{% else %}{{ '<' ~ m.content }}{% endif %}{% endfor %}",
        ["<", (" Be. ", 0), "<", (" a b ", 1), "<", ("c ", 2), "<", ("d", 3)],
    ),
    "keeps the reasoning of the last question only": (
        "{% set ns = namespace(last=messages | length, found=false) %}{% for m in messages[::-1] %}"
        "{% if not ns.found and m.role == 'user' %}{% set ns.found = true %}{% set ns.last = loop.revindex0 %}"
        "{% endif %}{% endfor %}"
        + LOOP
        + "{% set thought = '' %}{% set answer = m.content %}{% if '</think>' in m.content %}"
        "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<' + ('(' + thought + ')' if thought and loop.index0 > ns.last else '') + answer }}{% endfor %}",
        ["<", (" Be. ", 0), "<", (" a b ", 1), "<", ("c ", 2), "<", ("d", 3)],
    ),
    "drops earlier turns": (
        "{{ messages[0].content }}:{{ messages[-1].content }}",
        [(" Be. ", 0), ":", ("d", 3)],
    ),
    "turns the order round": (
        "{{ messages[3].content + '|' + messages[1].content }}",
        [("d", 3), "|", (" a b ", 1)],
    ),
    "sorts by role": (
        "{% for role, of_role in messages | groupby('role') %}{{ role[0] }}{% for m in of_role %}{{ m.content }}"
        "{% endfor %}{% endfor %}",
        ["a", (" r</think>c ", 2), "s", (" Be. ", 0), "u", (" a b ", 1), ("d", 3)],
    ),
    "joins in a block": (
        "{% set t %}{{ messages[1].content }}!{{ messages[3].content }} {% endset %}<{{ t | trim }}>",
        ["<", ("a b ", 1), "!", ("d", 3), ">"],
    ),
    "joins with a tilde": (
        "{{ ('\n' ~ messages[1].content ~ '/' ~ messages[3].content ~ '\n').strip() }}",
        [("a b ", 1), "/", ("d", 3)],
    ),
    "calls a macro": (
        "{% macro turn(m) %} <{{ m.content }}> {% endmacro %}"
        "{{ turn(messages[1]) | trim }}{{ turn(messages[3]).strip() }}",
        ["<", (" a b ", 1), "><", ("d", 3), ">"],
    ),
    "calls with a block": (
        "{% macro box() %}[{{ caller() | trim }}]{% endmacro %}{% for m in messages[1::2] %}{% call box() %}"
        "  {{ m.content }}{% endcall %}{% filter trim %} {{ m.content }} {% endfilter %}{% endfor %}",
        ["[", ("a b", 1), "]", ("a b", 1), "[", ("d", 3), "]", ("d", 3)],
    ),
    "joins a list": (
        "{{ ' '.join([messages[1].content, messages[3].content]).strip() }}"
        "{{ messages[:2] | map(attribute='content') | map('trim') | join('-') }}",
        [("a b ", 1), " ", ("d", 3), ("Be.", 0), "-", ("a b", 1)],
    ),
    "formats": (
        "{{ '<%s>' % messages[1].content }}{{ '({})'.format(messages[3].content) }}"
        "{{ '%s.' | format(messages[3].content) }}",
        ["<", (" a b ", 1), ">(", ("d", 3), ")", ("d", 3), "."],
    ),
    "formats several": (
        "{% set ns = namespace(t='') %}"
        "{% for m in messages[1::2] %}{% set ns.t = ns.t + ' %s:%s' % (m.role, m.content) %}{% endfor %}"
        "{{ ns.t.strip() }}{{ (' ' * 2 + messages[3].content * 2).strip() }}",
        ["user:", (" a b ", 1), " user:", ("ddd", 3)],
    ),
    "replaces": (
        "{{ messages[1].content | replace('a', 'A') }}"
        "{{ messages[3].content.replace('d', '[' + messages[3].content + ']') }}",
        [(" ", 1), "A", (" b ", 1), "[", ("d", 3), "]"],
    ),
    "goes line by line": (
        LOOP + "{% for line in m.content.replace(' ', '\n').splitlines() %}{% if not line %}{% continue %}{% endif %}"
        "{{ loop.index }}{{ line }};{% endfor %}{% endfor %}",
        ["2", ("Be.", 0), ";2", ("a", 1), ";3", ("b", 1), ";2", ("r</think>c", 2), ";1", ("d", 3), ";"],
    ),
    "writes words": (
        LOOP + "{{ m.content.split() | join('_') }}{% endfor %}",
        [("Be.", 0), ("a", 1), "_", ("b", 1), ("r</think>c", 2), ("d", 3)],
    ),
    "shortens and indents": (
        LOOP
        + "{{ m.content[:3] | indent(2, first=true) }}{{ m.content | trim | truncate(4, true, '~', 0) }}{% endfor %}",
        [
            "  ",
            (" BeBe.", 0),
            "  ",
            (" a a b", 1),
            "  ",
            (" r<r</", 2),
            "~  ",
            ("dd", 3),
        ],
    ),
    "cuts at what it finds": (
        LOOP + "{% set at = m.content.find('</think>') %}{{ m.content[at + 8:] if at >= 0 else m.content }}"
        "{{ m.content.partition('</think>')[1] }}{% endfor %}",
        [(" Be. ", 0), (" a b ", 1), ("c </think>", 2), ("d", 3)],
    ),
    "marks its generation": (
        LOOP + "{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}",
        [(" Be. ", 0), ";", (" a b ", 1), ";", (" r</think>c ", 2), ";", ("d", 3), ";"],
    ),
    "asks about the text": (
        LOOP + "{% if m.content is string and m.content.strip().startswith('d') and m.content != '' %}"
        "{{ m.content[0] }}{% endif %}{% endfor %}",
        [("d", 3)],
    ),
    "asks in another case": (
        LOOP + "{% if 'BE' in m.content.upper() or (m.content | lower | trim)[:1] in ['d', 'x'] %}!{{ m.content }}"
        "{% endif %}{% endfor %}{{ messages[2:] | map(attribute='content') | unique | sort | join('/') }}",
        ["!", (" Be. ", 0), "!", ("d", 3), (" r</think>c ", 2), "/", ("d", 3)],
    ),
    "looks at its neighbours": (
        LOOP + "{% if loop.previtem is defined and loop.previtem.content.endswith(' ') %}+{% endif %}"
        "{% if loop.changed(m.content) and loop.nextitem is not defined %}{{ m.content }}{% endif %}{% endfor %}",
        ["+++", ("d", 3)],
    ),
    "takes text or a list of parts": (
        LOOP + "{% if m.content is string %}{{ m.content | default('-', true) | string }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
        [(" Be. ", 0), (" a b ", 1), (" r</think>c ", 2), ("d", 3)],
    ),
}


@pytest.fixture(scope="module")
def with_template(tokenizer):
    """The shared tokenizer in a copy, with the template that is asked for."""
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")

    def give(template):
        copy.chat_template = template
        return copy

    return give


def pieces(rendering, messages):
    """The rendering as in TEMPLATES; each of its characters is checked against the one that it is said to come from."""
    joined = "".join(message.content for message in messages)
    owners = [number for number, message in enumerate(messages) for _ in message.content]
    found = []
    for owner, run in groupby(
        zip(rendering.text, rendering.origin.tolist(), strict=True),
        key=lambda char: owners[char[1]] if char[1] >= 0 else None,
    ):
        chars, places = zip(*run, strict=True)
        assert owner is None or chars == tuple(joined[place] for place in places)
        found.append("".join(chars) if owner is None else ("".join(chars), owner))
    return found


@pytest.mark.parametrize("template, expected", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_every_way_of_writing_a_content_keeps_its_origin(with_template, template, expected):
    assert pieces(render(with_template(template), Contents(TALK), False), TALK) == expected


WILD = [
    "a",
    "B",
    " ",
    "\n",
    "\r\n",
    "\u2028",
    "</think>",
    "<think>",
    "<&'\">",
    "%s",
    "{}",
    "{{ x }}",
    "\0",
    "\x1d",
    "É",
]
WILD += [
    "👩🏽‍🚀",
    "e\u0323\u0301",
    "שלום",
    "\u200f",
    "\u00a0",
    "\u3000",
    "\U00020000",
    "\U0010ffff",
    "\ufdd0",
    "İ",
    "ß",
]
wild_text = st.lists(st.sampled_from(WILD), max_size=8).map("".join)


@pytest.mark.parametrize("template", [template for template, _ in TEMPLATES.values()], ids=TEMPLATES.keys())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(wild_text, min_size=4, max_size=4))
def test_the_text_is_that_of_the_chat_template_and_each_character_that_of_its_origin(with_template, template, texts):
    tokenizer = with_template(template)
    messages = [Message(message.role, text) for message, text in zip(TALK, texts, strict=True)]
    rendering = render(tokenizer, Contents(messages), True)
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    assert rendering.text == tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    pieces(rendering, messages)


def test_the_clock_of_a_template_stands_still_while_it_is_followed(with_template):
    template = "{{ strftime_now('%H:%M:%S.%f') }} {{ messages[0].content }}"
    for _ in range(20):
        rendering = render(with_template(template), Contents(TALK[3:]), False)
        assert rendering.text.endswith(" d") and (rendering.origin >= 0).sum() == 1


REFUSED = {
    "upper case": "{{ messages[3].content | upper }}",
    "escaped": "{{ messages[2].content | e }}",
    "JSON": "{{ (messages[1].content + '\n') | tojson }}{{ messages[3].content.title() }}",
    "as a Python object": "{{ messages[2:] }}{{ messages[3].content.swapcase() }}",
    "tags taken away": "{{ messages[2].content | striptags }}",
}


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED.keys())
def test_contents_that_are_rewritten_are_refused(with_template, template):
    with pytest.raises(InputError, match="rewrites contents"):
        render(with_template(template), Contents(TALK), False)


@pytest.mark.parametrize("literal", ["\U00020001", "{{ '\\U00020001' }}", "{{ ['\U0010ffff'] | first }}"])
def test_a_template_that_writes_characters_of_the_tracer_is_refused(with_template, literal):
    with pytest.raises(InputError, match=r"U\+20000"):
        render(with_template(literal + "{{ messages[0].content }}"), Contents(TALK[:1]), False)


def test_a_tokenizer_that_writes_chats_by_code_of_its_own_is_refused(tokenizer):
    class OwnWay(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **kwargs):
            return "mine"

    own = OwnWay(tokenizer_object=tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template)
    with pytest.raises(InputError, match="code of its own"):
        render(own, Contents(TALK), False)


def test_a_conversation_longer_than_there_are_private_characters_is_refused(with_template, monkeypatch):
    monkeypatch.setattr(ctxlib.roles.rendering, "_CAPACITY", 10)
    with pytest.raises(InputError, match="characters in one conversation"):
        render(with_template("{{ messages[0].content }}"), Contents(TALK), False)


def test_what_a_template_spells_includes_what_it_builds_from_pieces(with_template):
    spelled = spelled_by_template(with_template(LOOP + "{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"))
    assert all(f"<|{role}|>" in spelled for role in ("system", "user", "assistant"))
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    spelled = spelled_by_template(with_template(no_system + LOOP + "{{ '<' ~ '|' ~ m.role ~ '|>' }}{% endfor %}"))
    assert "<|assistant|>" in spelled and "<|system|>" not in spelled
    assert spelled_by_template(with_template(None)) == ""


METHODS = [
    *[("strip",), ("lstrip",), ("rstrip",), ("strip", " ax"), ("split",), ("split", "a"), ("split", "a", 1)],
    *[("split", None, 1), ("rsplit", "a", 1), ("rsplit", None, 1), ("splitlines",), ("splitlines", True)],
    *[("partition", "b"), ("rpartition", "b"), ("replace", "a", "xx"), ("replace", "ab", "", 1), ("replace", "", "-")],
    *[("removeprefix", "a"), ("removesuffix", "b"), ("startswith", "a"), ("endswith", ("b", " ")), ("find", "b")],
    *[("count", "a"), ("isspace",), ("__contains__", "ab"), ("__eq__", "ab"), ("__hash__",), ("join", ["p", "q"])],
    *[("__getitem__", slice(1, -1)), ("__add__", "z"), ("lower",), ("upper",), ("title",)],
]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abAB \n\r\x1d\u2003x", max_size=8), call=st.sampled_from(METHODS))
def test_traced_text_behaves_as_the_text_it_stands_for(text, call):
    [message] = Contents([Message("user", text)]).traced()
    name, *args = call
    found, expected = getattr(message["content"], name)(*args), getattr(text, name)(*args)
    if isinstance(expected, str):
        found, expected = [found], [expected]
    if isinstance(expected, list | tuple):
        assert [ctxlib.roles.rendering._plain(piece) for piece in found] == list(expected)
    else:
        assert found == expected
