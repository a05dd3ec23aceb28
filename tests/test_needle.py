"""The needle stands where it should, in a context as long as reported; attention to it is that of the eager path."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ctxlib import experiment, generate
from ctxlib.generate import answer_questions, question_prompt
from ctxlib.metrics import needle_recall, score_answers, summarise
from ctxlib.miniature.texts import needles as town_needles
from ctxlib.miniature.town import Town
from ctxlib.models import Subject
from ctxlib.params import InputError, load_params
from ctxlib.questions.needle import (
    GRID,
    PAPER_NEEDLE,
    PROMPTS,
    needle_attention,
    needle_depths,
    needle_groups,
    paper_grid,
    place_needle,
    place_needles,
    read_haystack,
    text_needles,
)
from ctxlib.roles import ROLES, Role

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SENTENCES = [f"Sentence number {n} says nothing." for n in range(30)]
NEEDLE = "The best thing to do is to eat a sandwich."
SECOND = "The next best thing is to sit in a park."


@pytest.fixture
def haystack(tmp_path):
    (tmp_path / "b.txt").write_text("\n".join(SENTENCES[15:]), encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join(SENTENCES[:15]), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory):
    if not SHARED.exists():
        pytest.skip("needs a real tokenizer in ../shared/data")
    folder = tmp_path_factory.mktemp("llama-2")
    (folder / "tokenizer.model").write_bytes((SHARED / "tokenizers/llama-2/tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return AutoTokenizer.from_pretrained(folder)


def ask(sentences, tokenizer, **changes):
    about = {"needle": NEEDLE, "question": "What is best?", "keywords": ["eat", "sandwich"]}
    cells = {"lengths": [120, 200], "depths": [0, 50, 100], "per_cell": 2, "seed": 0}
    return text_needles(sentences, tokenizer, **about | cells | changes)


def context_of(question):
    return question.messages[0].content.split(": \n", 1)[1].rpartition("\n\n")[0]


def n_tokens(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (50, 2), (100, 4)])
def test_depth_is_the_share_of_sentences_before_the_needle(depth, place):
    text = place_needle(["A.", "B.", "C.", "D."], "N.", depth)
    assert text.split().index("N.") == place


@pytest.mark.parametrize(
    ("depths", "text"),
    [
        ([0, 50], "N. A. B. M. C. D."),
        ([50, 0], "M. A. B. N. C. D."),
        ([50, 50], "A. B. N. M. C. D."),
        ([100, 100], "A. B. C. D. N. M."),
        ([25, 100], "A. N. B. C. D. M."),
    ],
)
def test_several_needles_stand_each_at_its_own_depth_of_the_same_haystack(depths, text):
    assert place_needles(["A.", "B.", "C.", "D."], ["N.", "M."], depths) == text


def test_several_needles_spread_from_the_first_ones_depth_to_the_end():
    assert needle_depths(40, 1) == [40]
    assert needle_depths(0, 4) == [0, 25, 50, 75]
    assert needle_depths(40, 3) == [40, 60, 80]
    assert needle_depths(100, 2) == [100, 100]


def test_several_needles_in_one_haystack_are_asked_with_all_their_keywords(tokenizer):
    keywords = ["eat", "sandwich", "sit", "park"]
    (question,) = ask(
        SENTENCES, tokenizer, needle=[NEEDLE, SECOND], keywords=keywords, lengths=[500], depths=[20], per_cell=1
    )
    before, between, after = context_of(question).replace(SECOND, NEEDLE).split(NEEDLE)
    counts = [part.count("Sentence") for part in (before, between, after)]
    hay = sum(counts)
    assert counts[0] == round(0.2 * hay) and counts[0] + counts[1] == round(0.6 * hay)
    assert n_tokens(tokenizer, f" {context_of(question)}") <= 500
    assert needle_recall("Eat. Sit!", question.keywords) == 0.5
    assert question.depth_percent == 20 and question.answers == (f"{NEEDLE} {SECOND}",)


def test_a_haystack_is_read_in_the_order_of_names_and_without_newlines(haystack):
    assert read_haystack(haystack) == SENTENCES


def test_the_authors_haystack_keeps_double_spaces_and_loses_a_last_character(tmp_path):
    texts = ["One.  Two!\nThree\n\nand four.\n", "Five.\nSix"]  # the second has no final newline
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    theirs = "One.  Two! Three  and four. Five. Si "
    assert " ".join(read_haystack(tmp_path, "authors_code")) == theirs
    assert " ".join(read_haystack(tmp_path)) == "One. Two! Three and four. Five. Six"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("谷仓里有盐。绳子在船上！“铁匠呢？”他问。", ["谷仓里有盐。", "绳子在船上！", "“铁匠呢？”", "他问。"]),
        ("वह आया। वह गया।", ["वह आया।", "वह गया।"]),
        ("It cost 3.50 then. Who? I.", ["It cost 3.50 then.", "Who?", "I."]),
    ],
)
def test_a_haystack_ends_its_sentences_as_its_script_does(tmp_path, text, sentences):
    (tmp_path / "a.TXT").write_text(text, encoding="utf-8")
    assert read_haystack(tmp_path) == sentences


def test_files_of_a_haystack_that_are_not_read_are_named(haystack):
    (haystack / "c.md").write_text("More.", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"not read, as they are no \.txt files: c\.md"):
        assert read_haystack(haystack) == SENTENCES


def test_a_text_without_sentence_ends_fills_its_contexts_all_the_same(tokenizer):
    words = " ".join(f"word{n}" for n in range(900))
    questions = ask([words], tokenizer, lengths=[200, 700], depths=[0, 50, 100], per_cell=2)
    for question in questions:
        context, length = context_of(question), question.context_length_tokens
        assert length / 2 <= n_tokens(tokenizer, f" {context}") <= length and context.count(NEEDLE) == 1
        assert set(context.replace(NEEDLE, "").split()) <= set(words.split())
    middle = [context_of(q).index(NEEDLE) for q in questions if q.depth_percent == 50]
    assert all(place > 50 for place in middle)


def test_a_context_is_never_longer_than_reported_and_at_most_one_sentence_shorter(haystack, tokenizer):
    sentence = max(n_tokens(tokenizer, f" {s}") for s in SENTENCES)
    questions = ask(read_haystack(haystack), tokenizer, lengths=[300, 400])
    assert len(questions) == 2 * 3 * 2
    for question in questions:
        context = context_of(question)
        tokens = n_tokens(tokenizer, f" {context}")
        assert question.context_length_tokens - sentence <= tokens <= question.context_length_tokens
        assert context.count(NEEDLE) == 1


def test_a_context_is_as_long_as_reported_in_tokens_of_llama_2(llama_2):
    sentence = max(n_tokens(llama_2, s) for s in SENTENCES)
    for question in ask(SENTENCES, llama_2, lengths=[100, 240]):
        tokens = n_tokens(llama_2, context_of(question))
        assert question.context_length_tokens - sentence <= tokens <= question.context_length_tokens + 1


def test_repetitions_of_a_cell_are_other_stretches_and_a_seed_gives_the_same(haystack, tokenizer):
    first, second = ask(SENTENCES, tokenizer, lengths=[300], depths=[50])
    assert first.messages != second.messages
    assert ask(SENTENCES, tokenizer, lengths=[300], depths=[50]) == [first, second]


def test_all_depths_of_a_length_share_their_haystack(tokenizer):
    questions = ask(SENTENCES, tokenizer, lengths=[300], depths=[0, 30, 100])
    for repetition in ("-0", "-1"):
        texts = [context_of(q).replace(NEEDLE, "").split() for q in questions if q.id.endswith(repetition)]
        assert len(texts) == 3 and texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(("asked", "hay"), [(200, 174), (242, 16), (284, 58), (400, 174), (1000, 774)])
def test_the_paper_reading_repeats_the_buffers_fault_and_reports_what_is_left(llama_2, asked, hay):
    """The first three lengths are those of the authors' grid up to 1,000, worked out from their script by hand."""
    sentences = [f"Nothing much happened on day {n}." for n in range(200)]
    grid = {"lengths": [asked], "depths": [0, 100], "per_cell": 1, "seed": 0, "variant": "authors_code"}
    whole = llama_2(" ".join(sentences), add_special_tokens=False)["input_ids"]
    for question in text_needles(sentences, llama_2, **PAPER_NEEDLE, **grid):
        assert question.context_length_tokens == hay + 26
        left = " ".join(context_of(question).replace(PAPER_NEEDLE["needle"].strip(), "").split())
        assert left == " ".join(llama_2.decode(whole[:hay]).split())
        assert question.response_prefix == "The best thing to do in San Francisco"
    clean = text_needles(sentences, llama_2, **PAPER_NEEDLE, **grid | {"variant": "standard"})
    assert {question.context_length_tokens for question in clean} == {asked}


def test_the_paper_reading_moves_the_needle_back_behind_a_full_stop(tokenizer):
    sentences = ["Is it one? It is. " + "a" * 40 + "!", *SENTENCES]
    questions = ask(
        sentences, tokenizer, lengths=[500], depths=[0, 4, 10, 40, 80, 100], per_cell=1, variant="authors_code"
    )
    hay = " ".join(sentences)[: 500 - 200 - len(NEEDLE)]
    for question in questions:
        context, place = context_of(question), int(len(hay) * question.depth_percent / 100)
        place = len(hay) if question.depth_percent == 100 else hay.rfind(".", 0, place) + 1
        assert context == hay[:place] + NEEDLE + hay[place:]
        assert question.context_length_tokens == len(context) == 300
    assert [context_of(q).index(NEEDLE) for q in questions[:3]] == [0, 0, 17]


def test_the_papers_first_repetition_is_the_haystacks_beginning_and_the_others_are_not(tokenizer):
    first, second = ask(SENTENCES, tokenizer, lengths=[400], depths=[100], per_cell=2, variant="authors_code")
    assert context_of(first).startswith("Sentence number 0 says nothing. Sentence number 1 ")
    assert not context_of(second).startswith("Sentence number 0")


def test_four_prompts_by_number_and_the_typing_error_only_in_the_paper_reading(tokenizer):
    for number, wording in PROMPTS.items():
        (clean,) = ask(SENTENCES, tokenizer, depths=[0], lengths=[300], per_cell=1, prompt=number)
        context = context_of(clean)
        assert clean.messages[0].content == wording.format(context=context, question="What is best?")
        (paper,) = ask(
            SENTENCES, tokenizer, depths=[0], lengths=[500], per_cell=1, prompt=number, variant="authors_code"
        )
        assert ("accoriding to the provided" in paper.messages[0].content) == (number > 2)
        assert "accoriding" not in clean.messages[0].content
    assert len(set(PROMPTS.values())) == 4


def test_the_papers_grid():
    grid = paper_grid(1000)
    assert grid["lengths"][:3] == [200, 242, 284] and grid["lengths"][-1] == 1000
    assert grid["depths"][:3] == [0, 5, 11] and grid["depths"][-1] == 100
    assert len(grid["lengths"]) * len(grid["depths"]) == 400


def test_what_the_needles_lack_is_said(haystack, tmp_path, tokenizer):
    with pytest.raises(InputError, match="asks for 100000"):
        ask(SENTENCES, tokenizer, lengths=[100_000])
    with pytest.raises(InputError, match=r"needle\.lengths: 20 is less than"):
        ask(SENTENCES, tokenizer, lengths=[20, 200])
    with pytest.raises(InputError, match=r"needle\.needle: empty"):
        ask(SENTENCES, tokenizer, needle=[NEEDLE, " "])
    with pytest.raises(InputError, match="prompt 5"):
        ask(SENTENCES, tokenizer, prompt=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.txt file"):
        read_haystack(tmp_path / "empty")
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", r"a\.txt: a Git-LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", r"a\.txt: a web page, not the file itself"),
        (b"caf\xe9 in the old town", r"a\.txt: not UTF-8 at byte 3"),
        ("It ends in an é".encode()[:-1], r"a\.txt: cut short, it ends within a character"),
    ):
        (tmp_path / "empty" / "a.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_haystack(tmp_path / "empty")


@pytest.mark.parametrize("template", [True, False])
def test_the_needles_tokens_are_told_apart_and_no_other(tokenizer, template):
    questions = ask(SENTENCES, tokenizer, needle=[NEEDLE, SECOND], lengths=[300], depths=[0, 50, 100], per_cell=1)
    for question in questions:
        rendered = question_prompt(tokenizer, question, template, None, False)
        groups = needle_groups(rendered, question, [NEEDLE, SECOND])
        of_needle = groups.ids == groups.names.index("needle")
        assert tokenizer.decode(rendered.ids[of_needle]) == "".join(
            sorted([NEEDLE, SECOND], key=question.messages[0].content.index)
        )
        assert (rendered.roles[of_needle] == Role.USER).all()
        for role, group in zip(rendered.roles[~of_needle].tolist(), groups.ids[~of_needle].tolist(), strict=True):
            assert groups.names[group] == ROLES[role]


def test_a_needle_that_is_not_there_exactly_once_is_said(tokenizer):
    (question,) = ask(SENTENCES, tokenizer, lengths=[300], depths=[0], per_cell=1)
    rendered = question_prompt(tokenizer, question, True, None, False)
    with pytest.raises(InputError, match="is there 0 times"):
        needle_groups(rendered, question, ["Nothing of the kind."])
    with pytest.raises(InputError, match=r"'needle-text-300-0-0'.* times instead of once"):
        needle_groups(rendered, question, ["says nothing."])
    with pytest.raises(InputError, match="needs a map made by role_map"):
        needle_groups(replace(rendered, chars=None), question)


def test_needle_attention_is_the_last_rows_share_in_the_eager_pattern(model, tokenizer):
    questions = ask(SENTENCES, tokenizer, lengths=[150, 220], per_cell=1)
    maps = [question_prompt(tokenizer, question, True, None, False) for question in questions]
    frame = needle_attention(model, maps, questions, layer=1, batch_size=4, pad_token_id=0)
    assert frame["id"].tolist() == [question.id for question in questions]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    wanted = tokenizer(NEEDLE, add_special_tokens=False)["input_ids"]
    for prompt, row in zip(maps, frame.itertuples(), strict=True):
        ids = prompt.ids.tolist()
        (start,) = [place for place in range(len(ids)) if ids[place : place + len(wanted)] == wanted]
        with torch.no_grad():
            pattern = eager(prompt.ids[None], output_attentions=True).attentions[1][0, :, -1]
        expected = pattern[:, start : start + len(NEEDLE)].sum(dim=-1).mean().item()
        assert row.needle_attention == pytest.approx(expected, abs=1e-6)
        assert row.needle_tokens == pytest.approx(len(NEEDLE) / len(prompt))
    cells = summarise(frame, GRID, "needle_attention")
    assert len(cells) == 6 and (cells["n"] == 1).all()


def test_the_maps_of_answers_and_of_attention_have_the_same_cells_with_intervals(model, tokenizer):
    questions = town_needles(Town(), lengths=[60, 100], depths=[0, 100], per_cell=3, seed=0)
    maps = [question_prompt(tokenizer, question, True, None, False) for question in questions]
    attention = needle_attention(model, maps, questions, layer=0, batch_size=8, pad_token_id=0)
    answers = score_answers(attention.assign(answer="It is nothing."), questions)
    cells = [
        summarise(frame, GRID, metric)
        for frame, metric in ((answers, "needle_recall"), (attention, "needle_attention"))
    ]
    assert cells[0][[*GRID, "n"]].equals(cells[1][[*GRID, "n"]])
    assert (cells[1].ci_low <= cells[1].value).all() and (cells[1].value <= cells[1].ci_high).all()
    assert attention.needle_attention.between(0, 1, inclusive="neither").all()


@pytest.mark.parametrize("variant", ["standard", "authors_code"])
def test_an_experiment_asks_text_needles_in_its_reading_and_reads_shared_text_once(
    model, tokenizer, haystack, tmp_path, monkeypatch, variant
):
    about = {"haystack": str(haystack), "needle": NEEDLE, "question": "What is best?", "keywords": ["eat", "sandwich"]}
    cells = {"lengths": [250, 300], "depths": [0, 50, 100], "per_cell": 1, "max_new_tokens": 4}
    params = load_params(
        ROOT / "params" / "smoke.yaml",
        {"needle": {"source": "text", "variant": variant, **about, **cells}, "outputs": str(tmp_path / "outputs")},
    )
    questions = experiment.needles(params, tokenizer)
    sentences = read_haystack(haystack, variant)
    assert questions == ask(sentences, tokenizer, variant=variant, seed=params.seed, lengths=[250, 300], per_cell=1)
    read = []
    beginning = generate._Prefixes._read
    monkeypatch.setattr(generate._Prefixes, "_read", lambda self, ids: read.append(len(ids)) or beginning(self, ids))
    subject = Subject("tiny", model, tokenizer, "tiny")
    answers = experiment.ask(params, subject, questions, condition="plain", template=True, use_prefix=True)
    assert len(read) == len(questions)
    plain = {"template": True, "indicator": None, "use_prefix": True, "max_new_tokens": 4, "batch_size": 1}
    expected = answer_questions(subject, questions, **plain, progress=False)
    assert answers[expected.columns].equals(expected)
    assert (
        answers["prompt"].str.contains("The best thing to do is to eat" if variant == "authors_code" else "best").all()
    )
