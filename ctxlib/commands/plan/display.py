"""A plan as printed in a terminal."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tabulate import tabulate

from ctxlib.commands.plan.machines import ASSUMPTIONS, GIB, RESERVED_GIB
from ctxlib.commands.plan.memory import BATCH_SIZES
from ctxlib.commands.plan.planning import Plan, free_bytes

PARTS = ("weights", "adapter", "gradients", "optimiser", "kv_cache", "activations", "logits")


def print_plan(plan: Plan) -> Iterator[str]:
    """The lines of a plan, for a person."""
    params = plan.params
    yield f"{params.experiment} ({params.file}, params {params.digest}): a plan; nothing was run or downloaded"
    rows = []
    for which, source in plan.models.items():
        network = source.network
        size = f"{network.parameters / 1e9:.2f} B" if network.parameters > 1e8 else f"{network.parameters:,}"
        rows.append((which, source.name, f"{size} parameters, {network.layers} layers", source.where))
    yield from _section("Models", ["", "name", "size", "where"], rows)
    rows = [
        (name, _number(texts.n), _number(texts.length), _number(texts.longest), texts.source)
        for name, texts in plan.texts.items()
    ]
    yield from _section("Texts", ["", "n", "tokens, mean", "longest", "known from"], rows)
    yield from _time(plan)
    yield from _memory(plan)
    found = {"download": plan.downloads(), "results": plan.results()}
    rows = [(kind, name, f"{size / 1e9:,.2f}") for kind, sizes in found.items() for name, size in sizes.items()]
    total = sum(sum(sizes.values()) for sizes in found.values())
    yield from _section("Downloads and disk", ["", "", "GB"], [*rows, ("", "total", f"{total / 1e9:,.2f}")])
    yield f"  {free_bytes(params.output_dir) / 1e9:,.2f} GB free"
    yield from _problems(plan)


def _time(plan: Plan) -> Iterator[str]:
    hours = {step: plan.hours(step) for step in plan.steps}
    rows = [
        (s.what, s.subject, _number(s.rows), _number(s.tokens), _number(s.rows * s.new_tokens), _duration(taken))
        for s, taken in hours.items()
    ]
    total = ("total", "", "", "", "", _duration(sum(hours.values())))
    headers = ["", "", "rows", "tokens read", "new tokens, at most", "time"]
    yield from _section(f"Time on one {plan.gpu.name}, estimated", headers, [*rows, total])
    yield f"  assumed: {ASSUMPTIONS}"
    if plan.times:
        times = ", ".join(f"{family} {times:.2g}×" for family, times in plan.times.items())
        yield f"  rows as often as in the rehearsal: {times}"
    else:
        yield (
            "  each conversation scored once, each question answered once; the notebooks ask every model in several "
            f"ways: run `ctxlib rehearse {plan.params.file}` first, and the plan counts all of it"
        )


def _memory(plan: Plan) -> Iterator[str]:
    rows = []
    for one in plan.footprints:
        parts = (_gib(one.parts[part]) if one.parts.get(part) else "" for part in PARTS)
        rows.append((one.what, f"{one.setting}: {one.value}" if one.setting else "", *parts, _gib(one.total)))
    yield from _section("GPU memory, GiB", ["", "", *PARTS, "total"], rows)
    rows = []
    for one in (one for one in plan.footprints if one.setting):
        sizes = (plan.footprint(one.what, {one.setting: size * one.each}).total for size in BATCH_SIZES)
        rows.append((one.what, *map(_gib, sizes)))
    yield from _section("GPU memory by batch size, GiB", ["", *map(str, BATCH_SIZES)], rows)
    yield "  weights, adapter, gradients and optimiser are exact; the rest is an estimate for the longest texts"


def _problems(plan: Plan) -> Iterator[str]:
    found = plan.remedies()
    if not found and not plan.problems:
        yield "\nEverything fits."
        return
    yield "\nProblems, each with the setting that fixes it"
    yield from (f"  {problem}" for problem in plan.problems)
    together: dict[str, Any] = {}
    for one, change, size in found:
        line = f"  {one.what} takes {_gib(one.total)} of {plan.gpu.memory - RESERVED_GIB:g} GiB on {plan.gpu.name}"
        if change is None:
            yield f"{line}; no setting makes it fit: use a larger GPU"
            continue
        yield f"{line}; {_gib(size)} with {_settings(change)}"
        for key, value in change.items():  # several steps may need the same key: the smallest number suits all
            together[key] = min(value, together[key]) if isinstance(together.get(key), int) else value
    if together:
        yield f"  all of these: {_settings(together)}"
    if not found:
        yield f"  memory: every step fits on {plan.gpu.name}"


def _settings(change: dict[str, Any]) -> str:
    values = {key: json.dumps(value) if isinstance(value, bool) else value for key, value in change.items()}
    return " ".join(f"--set {key}={value}" for key, value in values.items())


def _section(title: str, headers: list[str], rows: Iterable[tuple]) -> Iterator[str]:
    yield f"\n{title}"
    text = tabulate([[*row] for row in rows], headers, tablefmt="plain", disable_numparse=True)
    yield "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _gib(size: int | float) -> str:
    return f"{size / GIB:.1f}" if size > GIB / 10 else f"{size / GIB:.3f}"


def _number(value: int | float) -> str:
    if value != value:
        return "not known"
    return f"{value / 1e6:,.1f} M" if value >= 1e7 else f"{value:,.0f}"


def _duration(hours: int | float) -> str:
    if hours != hours:
        return "not known"
    return f"{hours:,.1f} h" if hours >= 0.95 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else "< 1 min"
