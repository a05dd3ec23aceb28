"""What the notebooks 07 and 08 measured over seeds, under the keys of the paper's tables."""

from collections.abc import Iterator

import pandas as pd

from ctxlib.paper.outputs import Experiment
from ctxlib.paper.printed import ALPHA, IN_RAW, IN_TEMPLATE, INDICATED, PRETRAINED, STEERED, VANILLA

FEWEST_SEEDS = 5  # with an interval, as `metrics.over_seeds`
NEEDLES = {f"NIH recall, {kind}": f"nih ({kind})" for kind in ("unknown", "contradicting")}
TASKS = {"NIH recall": "nih", "passage QA": "passages", "instructions followed": "instructions"}
CELLS = {  # table of the paper: its conditions by ours, its metrics by ours
    "1": ({"vanilla, template": IN_TEMPLATE, "vanilla, steered": STEERED}, NEEDLES),
    "3": ({"vanilla, template": VANILLA, "indicator, template + [IND]": INDICATED}, TASKS),
    "7": (
        {"pretrained, raw text": PRETRAINED, "vanilla, template": IN_TEMPLATE, "vanilla, raw text": IN_RAW},
        NEEDLES,
    ),
}


def over_seeds(experiment: Experiment) -> Iterator[pd.DataFrame]:
    """Means over seeds: table, dataset, model, condition, threshold, metric, ours, ci_low, ci_high, n (seeds), note.

    Tables 1, 3 and 7 from `seeds` (notebook 07), Table 9 from `threshold` (08). Fractions in [0, 1]; below five seeds
    there is no interval. Tables 3 and 9 are asked in the template, with `[IND]` where the model knows it.
    """
    seeds, thresholds = experiment.table("seeds"), experiment.table("threshold")
    strongest = min(experiment.setting("steering.alphas")) if len(seeds) else None
    for table, (conditions, metrics) in CELLS.items():
        model = experiment.setting("models.pretrained") if table == "3" else f"{experiment.name}, vanilla"
        part = seeds[seeds.condition.isin(conditions.keys()) & seeds.metric.isin(metrics.keys())]
        steered = f"; steered with α = {strongest:g}, the paper's {ALPHA:g}" if table == "1" and len(part) else ""
        rows = _rows(part, experiment, table, model, metrics, steered)
        yield rows.assign(condition=part.condition.map(conditions), threshold=float("nan"))
    beta = thresholds.condition.astype(str).str.extract(r"^β = ([0-9.]+), \[IND\]$")[0].astype(float)
    beta = beta.mask(thresholds.condition == "vanilla, template", 1.0)
    part = thresholds[beta.notna() & thresholds.metric.isin(TASKS.keys())]
    rows = _rows(part, experiment, "9", experiment.setting("models.pretrained"), TASKS, "")
    yield rows.assign(condition=beta[part.index].map(lambda each: VANILLA if each == 1 else INDICATED), threshold=beta)


def _rows(
    part: pd.DataFrame, experiment: Experiment, table: str, model: str, metrics: dict[str, str], more: str
) -> pd.DataFrame:
    few = part.n < FEWEST_SEEDS
    note = "mean over " + part.n.astype(str) + " seeds" + more
    return pd.DataFrame(
        {
            "table": table,
            "dataset": experiment.dataset if table in ("3", "9") else "",
            "model": model,
            "metric": part.metric.map(metrics),
            "ours": part.value,
            "ci_low": part.ci_low.mask(few),
            "ci_high": part.ci_high.mask(few),
            "n": part.n,
            "note": note,
        }
    )
