"""The site is whole and closed: every page opens from a folder, and nothing of it would be fetched."""

import copy
import re
import time
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup

from ctxlib.params import InputError
from ctxlib.teaching import site
from ctxlib.teaching.site import build_site

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All pages but the attention view, which has tests of its own."""
    folder, patch = tmp_path_factory.mktemp("site"), pytest.MonkeyPatch()
    patch.setattr(site, "write_view", lambda out: (out.write_text("<html></html>"), out)[1])
    begun = time.process_time()
    with patch.context():
        build_site(folder)
    patch.undo()
    taken = time.process_time() - begun
    made = {path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in folder.glob("*.html")}
    return made, taken


def test_it_has_a_page_for_every_notebook_and_exercise_and_of_each_kind(pages):
    made, _ = pages
    files = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("class/master/*.ipynb")]
    named = {"index", "class", "view", "attention", "handout", "quiz", "glossary", "claims"}
    assert {f"{name}.html" for name in {*named, *(file.stem for file in files)}} == set(made)


def test_nothing_remote_is_in_it(pages):
    for name, page in pages[0].items():
        for tag in page.find_all(True):
            for key in ("src", "href", "srcset", "data", "action"):
                value = tag.get(key, "")
                assert not re.match(r"\s*(https?:|//)", value), (name, value)
            assert not [key for key in tag.attrs if key.startswith("on")], (name, tag.name)
        code = "".join(tag.get_text() for tag in page.find_all(["script", "style"]))
        assert "http" not in code and "@import" not in code and "url(" not in code, name


def test_every_link_leads_to_a_page_or_a_place_that_is_there(pages):
    made, _ = pages
    for name, page in made.items():
        for link in page.find_all("a", href=True):
            file, _, anchor = link["href"].partition("#")
            target = made[unquote(file) or name]
            assert not anchor or file or target.find(id=unquote(anchor)), (name, link["href"])


def test_every_image_is_in_its_page_and_says_what_it_shows(pages):
    n = 0
    for name, page in pages[0].items():
        for image in page.find_all("img"):
            n += 1
            assert image["src"].startswith("data:image/"), name
            assert len(image["alt"]) > 10 and "No description" not in image["alt"], name
    assert n > 20


def test_formulas_are_mathml_and_code_keeps_its_dollars(pages):
    made, _ = pages
    assert len(made["E1_attend.html"].find_all("math")) >= 5
    for page in map(copy.copy, made.values()):
        for code in page.find_all(["pre", "code", "script"]):
            code.decompose()
        assert not re.search(r"\\frac|\\sum|⟦\d", page.get_text())


def test_the_stored_outputs_are_shown_and_no_solution_is(pages):
    made, _ = pages
    stored = nbformat.read(ROOT / "outputs/miniature/01_attention_shift.ipynb", 4)
    printed = [out.text for cell in stored.cells for out in cell.get("outputs", []) if out.output_type == "stream"]
    assert printed[0].split("\n")[0] in made["01_attention_shift.html"].get_text()
    assert "your turn" in str(made["E1_attend.html"]) and "BEGIN SOLUTION" not in str(made["E1_attend.html"])


def test_every_word_that_a_student_needs_is_in_the_glossary(pages):
    bold = {tag.get_text().lower() for tag in pages[0]["glossary.html"].find_all("strong")}
    needed = {"query", "key", "dot product", "softmax", "token", "head", "chat template", "rlhf", "sft", "hallucinates"}
    assert needed <= bold


def test_it_is_built_in_a_minute(pages):
    assert pages[1] < 60


def test_without_its_package_it_names_the_one_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "latex2mathml.converter", None)
    with pytest.raises(InputError, match=r"needs latex2mathml: pip install 'ctxlib\[site\]'"):
        build_site(tmp_path)
    assert not list(tmp_path.iterdir())
