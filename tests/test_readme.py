"""The README tells what the committed results say, and every file that it links to is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_claims_is_the_committed_one():
    block = README.split("<!-- claims -->")[1].split("<!-- /claims -->")[0].strip()
    committed = (ROOT / "outputs/miniature/tables/claims.md").read_text(encoding="utf-8")
    assert block == "\n".join(line for line in committed.splitlines() if line.startswith("|"))


def test_every_link_into_the_repository_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_commands_it_tells_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    told = re.findall(r"\bmake (\w+)", README)
    assert {"reproduce", "test"} <= set(told) <= set(targets)
