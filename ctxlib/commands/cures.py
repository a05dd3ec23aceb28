"""Cures of one's own beside no cure, without a notebook."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlib import metrics
from ctxlib.evidence import bench, trials
from ctxlib.params import InputError


def try_cures(
    params_file: str | Path,
    places: Sequence[str],
    seeds: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """What each cure, given as path.py:Name, gains and costs against no cure, as text; trainings are kept.

    Raises InputError for a file without the section `cures`, and if no cure is given.
    """
    params = trials.open_evidence(params_file, overrides)
    if params.cures is None:
        raise InputError(f"{params.file}: cures: null; take params/cures.yaml, or copy that section from there")
    chosen = [bench.load_cure(place) for place in [*params.cures.files, *places]]
    if not chosen:
        raise InputError(
            "cures: none given; name yours as --cure path.py:Name, or run make cures for all built-in ones"
        )
    rows = bench.run(params, [bench.NONE, *chosen], seeds or params.cures.trained_seeds)
    table = bench.compared(bench.by_seed(rows))
    changes = table.drop(columns="value").rename(columns={"change": "value"})
    lines = []
    for name in (cure.name for cure in chosen):
        told = changes[(changes.cure == name) & (changes.kind == "all")].set_index("metric")
        gained, paid = (metrics.in_words(told.loc[metric]) for metric in ("reading", "price paid"))
        n = int(told.n.iloc[0])
        lines.append(f"{name}: reading {gained}, price paid {paid}, {n} seed{'s' * (n != 1)}")
    kinds = table[table.metric.isin(["recall", "instructions"])].pivot(index="cure", columns="kind", values="value")
    return "\n".join([*lines, kinds[list(bench.KINDS)].round(3).to_string()])
