"""The static site: notebooks with their stored outputs, the exercises and the pages of `class/`. Nothing is executed.

Every page opens from `file://`: formulas become MathML, images lie in the page, and no address of the network is left.
"""

import ast
import html
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader, select_autoescape

from ctxlib.files import read_text, write
from ctxlib.params import InputError
from ctxlib.teaching.asking import ROOT
from ctxlib.teaching.split import form_of
from ctxlib.teaching.view import write_view

EXPERIMENTS = ("miniature", "evidence", "cures")  # their notebooks have names of their own
_MATH = re.compile(r"(```.*?```|`[^`\n]+`)|\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\w)", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page of the site: its name without suffix, its group in the sidebar, and the file whose links it has."""

    name: str
    title: str
    group: str
    source: Path
    body: str


def build_site(out: Path, root: Path = ROOT) -> list[Path]:
    """Writes all pages into `out`. Raises InputError without latex2mathml, or without stored notebooks."""
    pages = [*_class_pages(root), *_notebook_pages(root)]
    index = {page.source.resolve(): f"{page.name}.html" for page in pages if page.source.suffix in (".md", ".ipynb")}
    for notebook in root.glob("notebooks/*.ipynb"):  # links between notebooks lead to their executed copies
        index[notebook.resolve()] = f"{notebook.stem}.html"
    for form in root.glob("class/*/*.ipynb"):
        index[form.resolve()] = f"{form.stem}.html"
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"])
    ).get_template("page.html")
    written = [write_view(out / "attention.html")]
    for place, page in enumerate(pages):
        before, after = pages[place - 1] if place else None, pages[place + 1] if place + 1 < len(pages) else None
        body = _closed(page, index, root)
        text = template.render(page=page, body=body, pages=pages, before=before, after=after)
        written.append(write(out / f"{page.name}.html", text))
    return written


def _class_pages(root: Path) -> list[Page]:
    folder = root / "class"
    first = read_text(root / "README.md").split("<!-- paper says -->")[0]
    start = (
        first + "\n\nStart with the [class](class/README.md), look at [every head](view.html), or read the notebooks.\n"
    )
    frame = '<iframe src="attention.html" title="Attention view" class="view"></iframe>'
    pages = [
        Page("index", "Start", "Class", root / "README.md", _markdown(start)),
        Page("class", "For lecturers", "Class", folder / "README.md", _markdown(read_text(folder / "README.md"))),
        Page("view", "Attention view", "Class", folder / "view", f"<h1>Attention view</h1>{frame}"),
    ]
    masters = sorted(folder.glob("master/*.ipynb"))
    for file in masters:
        notebook = form_of(nbformat.read(file, 4), "student")
        pages.append(Page(file.stem, _title(notebook), "Exercises", file, _notebook(notebook)))
    handout = folder / "handout.md"
    return [
        *pages,
        Page("handout", "Handout", "Pages", handout, _markdown(read_text(handout))),
        Page("quiz", "Quiz", "Pages", folder / "quiz.yaml", _quiz(folder / "quiz.yaml")),
        Page("glossary", "Glossary", "Pages", folder / "glossary", _glossary(root, masters)),
        Page("claims", "Claims", "Pages", folder / "claims", _claims(root)),
    ]


def _notebook_pages(root: Path) -> list[Page]:
    files = [file for name in EXPERIMENTS for file in sorted((root / "outputs" / name).glob("[0-9]*.ipynb"))]
    if not files:
        raise InputError(f"{root / 'outputs'}: no executed notebooks there; run: make reproduce")
    notebooks = [(file, nbformat.read(file, 4)) for file in files]
    return [Page(file.stem, _title(made), "Notebooks", file, _notebook(made)) for file, made in notebooks]


def _title(notebook: nbformat.NotebookNode) -> str:
    """Of "# E1 · Attend: which word …" what stands before the colon."""
    return re.split(r"[:?]", notebook.cells[0].source.splitlines()[0].lstrip("# "))[0]


def _markdown(text: str) -> str:
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    text, formulas = _without_math(text)
    return _with_math(markdown2html_mistune(text), formulas)


def _notebook(notebook: nbformat.NotebookNode) -> str:
    from nbconvert import HTMLExporter

    formulas: list[str] = []
    heading = ""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)", cell.source, re.MULTILINE) or [heading])[-1]
            cell.source, found = _without_math(cell.source, len(formulas))
            formulas += found
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop("image/svg+xml", None)
                output.metadata["image/png"] = {"alt": _alt(cell.source, heading)}
    exporter = HTMLExporter(template_name="basic")
    exporter.exclude_anchor_links = True
    return _with_math(exporter.from_notebook_node(notebook)[0], formulas)


def _alt(code: str, heading: str) -> str:
    """The title that a cell gives its figure (the last text with a space in it), or the heading above."""
    titles = [text for text in re.findall(r'"([^"\n]+)"', code.rpartition("results.figure(")[2]) if " " in text]
    return titles[-1] if titles else f"Figure: {heading}"


def _without_math(text: str, start: int = 0) -> tuple[str, list[str]]:
    """The text with a mark in place of every formula, and the formulas as MathML; code is left as it is."""
    try:
        from latex2mathml.converter import convert
    except ImportError:
        raise InputError("the site needs latex2mathml: pip install 'ctxlib[site]'") from None
    formulas: list[str] = []

    def mark(found: re.Match) -> str:
        code, block, inline = found.groups()
        if code:
            return code
        formulas.append(convert(block or inline, display="block" if block else "inline"))
        return f"⟦{start + len(formulas) - 1}⟧"

    return _MATH.sub(mark, text), formulas


def _with_math(page: str, formulas: list[str]) -> str:
    return re.sub(r"⟦(\d+)⟧", lambda found: formulas[int(found[1])], page)


def _closed(page: Page, index: dict[Path, str], root: Path) -> str:
    """The page without anything that would be fetched: links lead to pages of the site, or become text."""
    soup = BeautifulSoup(page.body, "html.parser")
    for anchor in soup.find_all("a", class_="anchor-link"):
        anchor.decompose()
    for link in soup.find_all("a"):
        address, _, anchor = link.get("href", "").partition("#")
        target = index.get(Path(os.path.normpath(page.source.parent / address)).resolve()) if address else None
        if address in ("view.html", *index.values()):
            target = address
        if target:
            link["href"] = target
        elif address or not soup.find(id=anchor):
            if address.startswith("http") and address not in link.get_text():
                link.append(f" ({address})")
            link.unwrap()
    for image in soup.find_all("img"):
        if not image["src"].startswith("data:"):
            image["src"] = _embedded((page.source.parent / image["src"]).resolve())
        if not image.get("alt") or image["alt"].startswith("No description"):
            image["alt"] = f"Figure of the page {page.title}"
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))
    for script in soup.find_all(["script", "link"]):
        script.decompose()
    return str(soup)


def _embedded(file: Path) -> str:
    import base64

    kind = "svg+xml" if file.suffix == ".svg" else file.suffix.lstrip(".")
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _quiz(file: Path) -> str:
    parts = ["<h1>Quiz</h1><p>Twelve questions. Each answer is proved by a cell; run it in an exercise.</p>"]
    for number, one in enumerate(yaml.safe_load(read_text(file)), start=1):
        options = "".join(f"<li>{html.escape(str(text))}</li>" for text in one["options"].values())
        answer = f"<p>{one['key']}: {html.escape(str(one['options'][one['key']]))}</p>"
        parts.append(
            f'<section><h3>{number}. {html.escape(one["question"])}</h3><ol type="a">{options}</ol>'
            f"<details><summary>Answer and proof</summary>{answer}<pre>from ctxlib.teaching import *\n\n"
            f"{html.escape(one['cell'])}</pre></details></section>"
        )
    return _markdownless_code(parts)


def _markdownless_code(parts: list[str]) -> str:
    """HTML whose code spans were written in backticks."""
    return re.sub(r"`([^`<\n]+)`", r"<code>\1</code>", "\n".join(parts))


def quiz_key(one: dict) -> str:
    """What the cell of a question of the quiz says the answer is: the value of its last line."""
    from ctxlib import teaching

    names = {name: getattr(teaching, name) for name in teaching.__all__}
    tree = ast.parse(one["cell"])
    last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, "quiz", "exec"), names)
    return eval(compile(last, "quiz", "eval"), names)


def _glossary(root: Path, masters: list[Path]) -> str:
    """The sections "Words" of notebook 00 and of the exercises: each word is explained in one place."""
    parts = ["# Glossary"]
    for file in [*sorted(root.glob("notebooks/00_*.ipynb")), *masters]:
        notebook = nbformat.read(file, 4)
        words = [cell.source for cell in notebook.cells if cell.source.startswith("## Words")]
        parts += [source.replace("## Words", f"## [{_title(notebook)}]({file.stem}.html)") for source in words]
    return _markdown("\n\n".join(parts))


def _claims(root: Path) -> str:
    """The committed tables of claims, with the notebooks that made them."""
    parts = ["# Claims", "Means over five seeds come first; then those of a single run, with intervals over questions."]
    for title, file in (
        ("Over five seeds: notebook [07](07_seeds.html)", "evidence/tables/paper_says.md"),
        ("One run: notebooks [01](01_attention_shift.html), [02](02_context_dependency.html), [04](04_evaluation.html)",
         "miniature/tables/claims.md"),
        ("Predictions, and which came true", "miniature/tables/predictions.md"),
    ):  # fmt: skip
        text = read_text(root / "outputs" / file)
        parts += [f"## {title}", text.split("\n", 1)[1]]
    return _markdown("\n\n".join(parts))
