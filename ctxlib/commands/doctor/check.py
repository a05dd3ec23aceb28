"""The result of one check."""

from typing import NamedTuple

VERDICTS = ("fail", "note", "ok")


class Check(NamedTuple):
    """One line of an examination."""

    check: str
    verdict: str
    finding: str
    remedy: str = ""
