"""The class as it is committed: forms from one master, solutions that run, blanks that fail by name, a proved quiz."""

import base64
import itertools
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient

from ctxlib import teaching
from ctxlib.conversations import Message
from ctxlib.params import InputError
from ctxlib.teaching.site import quiz_key
from ctxlib.teaching.split import BLANK, form_of, write_forms
from ctxlib.teaching.view import CONDITIONS, write_view

ROOT = Path(__file__).resolve().parents[1]
CLASS = ROOT / "class"
MASTERS = sorted((CLASS / "master").glob("*.ipynb"))
QUIZ = yaml.safe_load((CLASS / "quiz.yaml").read_text(encoding="utf-8"))
each_exercise = pytest.mark.parametrize("name", [path.name for path in MASTERS])
by_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def run(notebook, folder):
    """The errors of all code cells, in their order, the others run all the same."""
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True)
    client.resources = {"metadata": {"path": str(folder)}}
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [(cell, [one for one in cell.outputs if one.output_type == "error"]) for cell in cells]


def test_writing_the_forms_again_changes_nothing(tmp_path):
    for file in write_forms(CLASS / "master", tmp_path):
        assert file.read_bytes() == (CLASS / file.relative_to(tmp_path)).read_bytes(), file.name
    assert len(MASTERS) == 4


@each_exercise
def test_no_solution_is_in_the_students_form(name):
    cells = nbformat.read(CLASS / "master" / name, 4).cells
    solved = re.findall(r"# BEGIN SOLUTION\n(.*?)# END SOLUTION", "\n".join(c.source for c in cells), re.DOTALL)
    for form in ("student", "colab"):
        text = "\n".join(cell.source for cell in nbformat.read(CLASS / form / name, 4).cells)
        assert "SOLUTION" not in text and text.count(BLANK) == len(solved) >= 1
        for block in solved:
            for line in block.splitlines():
                assert line.strip() not in text.split("\n") or not line.strip()
                assert len(line.strip()) < 25 or line.strip() not in text


@each_exercise
def test_only_colabs_form_fetches_anything(name):
    sources = {form: nbformat.read(CLASS / form / name, 4).cells for form in ("student", "solutions", "colab")}
    installs = {form: sum("%pip" in cell.source for cell in cells) for form, cells in sources.items()}
    assert installs == {"student": 0, "solutions": 0, "colab": 1}


def test_another_seed_draws_other_needles_and_leaves_all_else(tmp_path):
    write_forms(CLASS / "master", tmp_path, seed=7)
    for file in tmp_path.glob("solutions/*.ipynb"):
        ours = (CLASS / "solutions" / file.name).read_text()
        assert file.read_text() == ours.replace('"seed = 0"', '"seed = 7"') != ours
    assert teaching.needles(1, seed=0)[0].messages != teaching.needles(1, seed=7)[0].messages


def test_a_solution_that_is_not_closed_and_a_folder_without_masters_are_refused(tmp_path):
    cell = nbformat.v4.new_code_cell("def f():\n    # BEGIN SOLUTION\n    return 1")
    with pytest.raises(InputError, match=r"E9\.ipynb: .*without '# END SOLUTION'; close it"):
        form_of(nbformat.v4.new_notebook(cells=[cell]), "student", name="E9.ipynb")
    with pytest.raises(InputError, match="no notebooks there"):
        write_forms(tmp_path, tmp_path)


@each_exercise
def test_the_solution_runs_and_passes_every_check(name, tmp_path, capfd):
    errors = run(nbformat.read(CLASS / "solutions" / name, 4), tmp_path)
    assert [error.evalue for _, found in errors for error in found] == []
    checks = [cell for cell, _ in errors if cell.source.startswith("teaching.check_")]
    assert checks and all(": right." in cell.outputs[0].text for cell in checks)


@each_exercise
def test_in_the_students_form_every_check_fails_with_its_own_message(name, tmp_path, capfd):
    notebook = nbformat.read(CLASS / "student" / name, 4)
    heavy, left_out = ("teaching.answers(", "teaching.attention_of(", "query_and_key("), ""
    for cell in notebook.cells:  # those that only use what is not written yet
        if cell.cell_type == "code" and any(word in cell.source for word in heavy):
            left_out, cell.source = left_out + cell.source, "pass"
    found = run(notebook, tmp_path)
    for error in (error for _, errors in found for error in errors):
        missing = re.findall(r"name '(\w+)' is not defined", error.evalue)
        assert error.ename in ("AssertionError", "NotImplementedError") or f"{missing[0]} = " in left_out, error.evalue
    for cell, errors in found:
        if check := re.match(r"teaching\.(check_\w+)", cell.source):
            assert errors[0].evalue.startswith(f"{check[1]}: your turn"), cell.source


@by_peft
@pytest.mark.parametrize("one", QUIZ, ids=range(1, len(QUIZ) + 1))
def test_the_key_of_every_question_is_what_its_cell_says(one):
    assert set(one) == {"question", "options", "key", "cell"} and one["key"] in one["options"]
    assert quiz_key(one) == one["key"]


def test_there_are_twelve_questions_and_none_has_a_digit_that_another_run_could_move():
    assert len(QUIZ) == 12
    for one in QUIZ:
        assert not re.search(r"\d\.\d\d|\d+ ?%", one["question"] + "".join(map(str, one["options"].values())))


@by_peft
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", (CLASS / "README.md").read_text(), re.DOTALL))
def test_the_cells_of_the_instructors_page_run(code, capsys):
    exec(code, {})
    assert capsys.readouterr().out.strip()


def unpacked(page: Path) -> tuple[dict, bytes]:
    packed = dict(re.findall(r'(content|patterns): "([\w+/=]+)"', page.read_text(encoding="utf-8")))
    content, patterns = (zlib.decompress(base64.b64decode(packed[name])) for name in ("content", "patterns"))
    return json.loads(content), patterns


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    question = teaching.needles(1, tokens=60)[0]
    hostile = Message("user", f"{HOSTILE} {question.messages[0].content}")
    asked = [question, replace(question, messages=(hostile,))]
    return [write_view(folder / f"{n}.html", asked) for n in "ab"], asked


@by_peft
def test_the_view_holds_eager_attention_to_within_1_in_255(views):
    (page, _), asked = views
    content, patterns = unpacked(page)
    for question, shown in zip(asked, content["prompts"], strict=True):
        for condition, view in zip(CONDITIONS, shown["views"], strict=True):
            subject = teaching.load(condition.model)
            tokens = teaching.prompt(subject, question, template=condition.template, indicator=condition.indicator)
            eager, n = teaching.attention_of(subject, tokens.ids), len(tokens)
            assert view["tokens"] == [subject.tokenizer.decode([token]) for token in tokens.ids]
            place = view["start"]
            for layer in range(view["layers"]):
                for head in range(view["heads"]):
                    rows = [patterns[place + i * (i + 1) // 2 : place + (i + 1) * (i + 2) // 2] for i in range(n)]
                    seen = torch.tensor([[*row, *[0] * (n - len(row))] for row in rows]) / 255
                    assert (seen - eager[layer, head]).abs().max() <= 1 / 255
                    place += n * (n + 1) // 2


def test_the_view_is_the_same_twice_is_small_and_names_no_address(views):
    (first, second), _ = views
    text = first.read_text(encoding="utf-8")
    assert first.read_bytes() == second.read_bytes()
    assert "http" not in text and "src=" not in text and "import(" not in text and "innerHTML" not in text
    assert len(first.read_bytes()) * 6 / 2 < 2e6  # two prompts here, six in the class


def test_hostile_text_in_a_prompt_is_only_text_in_the_view(views):
    (page, _), _ = views
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 1
    assert "alert(" not in text and "onerror" not in text
    content, _ = unpacked(page)
    tame, hostile = (len(prompt["views"][0]["tokens"]) for prompt in content["prompts"])
    assert hostile > tame + 5  # it is there, as tokens


def test_the_forms_and_the_page_are_where_the_readme_says():
    readme = (CLASS / "README.md").read_text(encoding="utf-8")
    assert all((CLASS / form).is_dir() for form in ("master", "student", "solutions", "colab"))
    minutes = [tuple(map(int, span)) for span in re.findall(r"^\| (\d+)–(\d+) \|", readme, re.MULTILINE)]
    assert minutes[0][0] == 0 and minutes[-1][1] == 90
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(minutes))
