"""One line of an examination."""

from typing import NamedTuple

VERDICTS = ("fail", "note", "ok")


class Check(NamedTuple):
    """One line of the examination."""

    check: str
    verdict: str
    finding: str
    remedy: str = ""
