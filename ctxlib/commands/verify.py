"""Somebody's tables against the committed ones, claim by claim, within a stated tolerance."""

from pathlib import Path

import pandas as pd

from ctxlib import metrics
from ctxlib.params import InputError, expanded

TABLES = ("claims", "claims_over_seeds")


def verify(yours: str | Path, committed: str | Path, tolerance: float = 0.02) -> pd.DataFrame:
    """One row per claim: claim, committed, yours, verdict, your_verdict, agrees, why.

    yours, committed: experiments' folders, with their `tables/claims.csv` or `tables/claims_over_seeds.csv`. A claim
    agrees if its verdict is the same and your value lies within the committed interval widened on both sides by
    `tolerance`, in the claim's unit; without an interval, within the tolerance of the committed value. On the same
    processor and versions all values are equal to the last digit; on others rounding makes training diverge, and then
    an interval over questions or seeds is the yardstick. A claim that one side lacks does not agree.

    Raises InputError for a folder without claims, and for two folders that share no table of claims.
    """
    mine, theirs = _claims(yours), _claims(committed)
    both = [table for table in TABLES if table in mine and table in theirs]
    if not both:
        raise InputError(
            f"{yours}: has {', '.join(mine)}, {committed} has {', '.join(theirs)}; give the same experiment"
        )
    rows = []
    for table in both:
        old, new = theirs[table], mine[table]
        for claim in dict.fromkeys([*old.index, *new.index]):
            rows.append(
                _compared(claim, *(part.loc[claim] if claim in part.index else None for part in (old, new)), tolerance)
            )
    return pd.DataFrame(rows)


def report(frame: pd.DataFrame) -> str:
    """The comparison as text: a line per claim that does not agree, and the count."""
    wrong = frame[~frame.agrees]
    lines = [f"DIFFERS  {row.claim}: {row.why}" for row in wrong.itertuples()]
    return "\n".join([*lines, f"{int(frame.agrees.sum())} of {len(frame)} claims agree"])


def _claims(folder: str | Path) -> dict[str, pd.DataFrame]:
    tables = expanded(folder) / "tables"
    found = {}
    for name in TABLES:
        file = tables / f"{name}.csv"
        if file.is_file():
            frame = pd.read_csv(file)
            if missing := {"claim", "value", "ci_low", "ci_high", "threshold"} - set(frame.columns):
                raise InputError(f"{file}: no column {min(missing)!r}; make it anew with ctxlib reproduce")
            if frame.claim.duplicated().any():
                raise InputError(f"{file}: {frame.claim[frame.claim.duplicated()].iloc[0]!r} is there twice")
            found[name] = frame.set_index("claim")
    if not found:
        raise InputError(f"{tables}: no {' or '.join(f'{name}.csv' for name in TABLES)}; first run ctxlib reproduce")
    return found


def _verdict(row: pd.Series) -> str:
    if not pd.isna(row.ci_low) and not pd.isna(row.get("holds")):
        return "holds" if row.holds else "no"
    return metrics.verdict(row.ci_low, row.ci_high, row.threshold)


def _compared(claim: str, old: pd.Series | None, new: pd.Series | None, tolerance: float) -> dict:
    row = {"claim": claim, "committed": None, "yours": None, "verdict": None, "your_verdict": None, "agrees": False}
    if old is None or new is None:
        return row | {"why": "only in yours" if old is None else "missing in yours"}
    row |= {"committed": metrics.in_words(old, ".3f"), "yours": metrics.in_words(new, ".3f")}
    row |= {"verdict": _verdict(old), "your_verdict": _verdict(new)}
    low, high = (old.value if pd.isna(limit) else limit for limit in (old.ci_low, old.ci_high))
    if row["verdict"] != row["your_verdict"]:
        return row | {
            "why": f"verdict {row['your_verdict']!r}, committed {row['verdict']!r} ({row['yours']}, {row['committed']})"
        }
    if not low - tolerance <= new.value <= high + tolerance:
        return row | {"why": f"{row['yours']} lies outside {row['committed']} by more than {tolerance:g}"}
    return row | {"agrees": True, "why": ""}
