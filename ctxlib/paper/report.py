"""The paper claim by claim: what it says and where, our verdict and interval, the compute, the command.

python -m ctxlib.paper.report        writes docs/claims.md from the committed tables
"""

import re
from pathlib import Path

import nbformat
import pandas as pd
from tabulate import tabulate

from ctxlib import metrics
from ctxlib.files import write

WHERE = {  # by the number with which our claims begin
    "1": ("the chat template makes a model lose its context", "Figure 2, Table 7"),
    "2": ("in the template it attends less to the user's text", "Figure 3"),
    "3": ("steering attention to the user helps", "section 2.3, Table 1"),
    "4": ("attention finds the turns that need their context", "section 3.1, Figure 6"),
    "5": ("with the indicator it reads again, and is as good at everything else", "Table 3"),
    "6": ("with the indicator it attends to the user's text again", "Figure 5"),
}
NOTEBOOK = "07_seeds"


def claims_page(root: Path) -> str:
    """The page, from `outputs/evidence/tables/claims_over_seeds.csv` and from what notebook 07 says of its compute."""
    claims = pd.read_csv(root / "outputs" / "evidence" / "tables" / "claims_over_seeds.csv")
    first = nbformat.read(root / "notebooks" / f"{NOTEBOOK}.ipynb", 4).cells[0].source
    compute = re.search(r"^\| Measured \| (.+) \|$", first, re.MULTILINE).group(1)
    rows = [
        {
            "the paper says": WHERE[row.claim[0]][0],
            "where": WHERE[row.claim[0]][1],
            "measured here": row.claim[2:],
            "mean [95 % interval]": metrics.in_words(row),
            "threshold": f"{row.threshold:+.2f}",
            "verdict": metrics.verdict(row.ci_low, row.ci_high, row.threshold),
            "seeds": row.n,
        }
        for row in claims.itertuples()
    ]
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
    counts = pd.Series([row["verdict"] for row in rows]).value_counts()
    told = ", ".join(f"{verdict}: {n}" for verdict, n in counts.items())
    return f"""# The paper, claim by claim

Made by `python -m ctxlib.paper.report` from the committed tables; a test keeps it so. {len(rows)} measurements on the
miniature: {told}. A claim holds if its whole interval lies above the
threshold. These are claims about a small model of
an invented town; the paper's own numbers, next to ours, are in notebook 05.

{table}

- Compute: {compute}
- Command: `make evidence`, or notebook 07 alone: `ctxlib run notebooks/{NOTEBOOK}.ipynb --params params/evidence.yaml`
- Your tables against these: `ctxlib verify YOURS/outputs/evidence outputs/evidence`
"""


if __name__ == "__main__":
    write(Path("docs") / "claims.md", claims_page(Path()))
