"""Three forms of every exercise from one master: the student's, the solution, and the one for Colab.

In a master, solutions lie between "# BEGIN SOLUTION" and "# END SOLUTION"; a cell tagged `student`, `solution` or
`colab` is only in that form (`student` also in Colab's).
"""

import re
from copy import deepcopy
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from ctxlib.files import write
from ctxlib.params import InputError

FORMS = ("student", "solutions", "colab")
BLANK = 'raise NotImplementedError("your turn")'
_SOLUTION = re.compile(r"^([ \t]*)# BEGIN SOLUTION\n(.*?)^[ \t]*# END SOLUTION(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_TAGS = {"student": {"student", "colab"}, "solution": {"solutions"}, "colab": {"colab"}}


def write_forms(masters: Path, out: Path, *, seed: int = 0) -> list[Path]:
    """Writes `student/`, `solutions/` and `colab/` with a notebook each for every one in `masters`.

    seed: of the needles that are drawn. Another one gives other numbers than the published solutions have.
    Raises InputError for a folder without notebooks, and a solution that is opened and not closed.
    """
    files = sorted(masters.glob("*.ipynb"))
    if not files:
        raise InputError(f"{masters}: no notebooks there; name the folder of the masters")
    written = []
    for file in files:
        master = nbformat.read(file, 4)
        for form in FORMS:
            made = nbformat.writes(form_of(master, form, seed, file.name)) + "\n"
            written.append(write(out / form / file.name, made))
    return written


def form_of(master: NotebookNode, form: str, seed: int = 0, name: str = "master") -> NotebookNode:
    """One form of a master, without outputs."""
    made = deepcopy(master)
    made.cells = [cell for cell in made.cells if _belongs(cell, form)]
    for cell in made.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag not in _TAGS]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = _SOLUTION.sub(rf"\1{BLANK}\n" if form != "solutions" else r"\2", cell.source).rstrip("\n")
            if "SOLUTION" in cell.source:
                raise InputError(f"{name}: a cell has '# BEGIN SOLUTION' without '# END SOLUTION'; close it")
        if "parameters" in tags:
            cell.source = re.sub(r"^seed = \d+", f"seed = {seed}", cell.source, flags=re.MULTILINE)
    return made


def _belongs(cell: NotebookNode, form: str) -> bool:
    only = [_TAGS[tag] for tag in cell.metadata.get("tags", []) if tag in _TAGS]
    return not only or any(form in forms for forms in only)
