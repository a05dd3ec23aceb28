"""An experiment from end to end on small random models, before GPU hours are spent on it.

Data, chat template, tokenizers, indicator, variants, quantisation and method are those of the params file; the models
are random, the numbers of examples and steps small. A rehearsal shows that everything runs; its results mean nothing.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tabulate import tabulate
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ctxlib import experiment, indicator, scoring
from ctxlib.commands.sources import find_model
from ctxlib.files import check_writable
from ctxlib.params import MODEL_ROLES, InputError, Params, load_params
from ctxlib.results import write

AT_MOST = {
    "models.batch_size": 8,
    "conversations.n": 24,
    "allocation.prompts": 4,
    "steering.per_task": 4,
    "finetune.steps": 12,
    "finetune.batch_size": 2,
    "finetune.gradient_accumulation": 2,
    "finetune.save_every": 5,
    "needle.per_cell": 1,
    "needle.max_new_tokens": 8,
    "qa.n": 12,  # QuAC's dialogues, which stay whole, have up to 12 questions
    "qa.max_new_tokens": 8,
    "facts.n": 4,
    "instructions.n": 4,
    "instructions.max_new_tokens": 8,
    "bootstrap.samples": 100,
}


@dataclass(frozen=True)
class Rehearsal:
    """The experiment to run: `params`, written to `params_file`, and a description of everything that was reduced."""

    params_file: Path
    params: Params
    description: list[str]


def prepare(
    params_file: str | Path, overrides: Mapping[str, Any] | None = None, *, width: int = 64, layers: int = 4
) -> Rehearsal:
    """Writes random models and a params file to `<outputs>/rehearsal-<experiment>`; called again, the same ones.

    Every model becomes a random one of its architecture (`shrunk`) with its own tokenizer. Configuration and tokenizer
    come from the local folder, which needs no weights, or from the hub. Embedded models stay as they are; if
    `models.instruct` is a model that 03 trains, 03 trains it here, too. Numbers are reduced to `AT_MOST`; of the
    needles' lengths and depths the least and the greatest are kept; layers are scaled to the models; and the threshold
    is the median of the scores, so that about half of the turns are marked. Values in `overrides` are kept, except the
    models.

    Raises InputError, before anything is written, as `load_params` and `check_inputs` do, for a layer that the full
    model does not have, a tokenizer that does not load, and an architecture that cannot be made smaller; and,
    before any notebook runs, for bad conversations and bad questions on passages.
    """
    written, overrides = load_params(params_file), dict(overrides or {})
    if written.evidence:
        raise InputError(f"{params_file}: evidence: its models are the miniature's, small already; run it as it is")
    overrides = {"finetune.epochs": None, "finetune.steps": _at_most("finetune.steps", written)} | overrides
    elsewhere = ("outputs", "experiment")  # the place of the file's own results decides which models 03 trains
    full = load_params(params_file, {key: value for key, value in overrides.items() if key not in elsewhere})
    trained = {which for which in MODEL_ROLES if full.trains(which)}
    like = {which: "pretrained" if which in trained else which for which in MODEL_ROLES}
    instead = {f"models.{which}": full.models.pretrained for which in trained}
    load_params(params_file, overrides | instead).check_inputs()
    embedded = {which for which in MODEL_ROLES if full.locate(getattr(full.models, which)) == "embedded"}
    made = [which for which in MODEL_ROLES if which not in embedded | (trained & {"instruct"})]
    configs = {which: find_model(full, like[which]).network.config for which in MODEL_ROLES}
    small_configs = configs | {which: shrunk(configs[which], width, layers) for which in made}
    small_configs["instruct"] = small_configs[like["instruct"]]
    tokenizers = {which: experiment.tokenizer(full, like[which]) for which in made}

    name = f"rehearsal-{full.experiment}"
    check_writable(full.path(overrides.get("outputs", full.outputs)))
    work = f"{overrides.get('outputs', full.outputs)}/{overrides.get('experiment', name)}/work"
    places = {f"models.{which}": f"{work}/random_models/{which}" for which in made}
    if "instruct" in trained:
        places["models.instruct"] = f"{work}/models/{Path(full.models.instruct).name}"
    places |= {f"models.{role}revision": None for role in ("", "instruct_", "seed_model_")}
    changes = {"experiment": name} | _fewer(full) | _scaled(full, configs, small_configs) | overrides | places
    small = load_params(params_file, changes)
    for which in made:
        _write_model(small, which, small_configs[which], tokenizers[which])
    if "scoring.threshold" not in overrides:
        changes = {"scoring.threshold": _median_score(small)} | changes
        small = load_params(params_file, changes)
    experiment.passage_questions(small)  # or their faults would show only in 04, after all training

    file = small.output_dir / "params.yaml"
    content = f"# Written by ctxlib rehearse from {params_file}; its results mean nothing.\n"
    content += yaml.safe_dump(small.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if not file.is_file() or file.read_text(encoding="utf-8") != content:
        write(file, content)
    shapes = [f"  {which}: {_shape(configs[which])} → {_shape(small_configs[which])}" for which in made]
    return Rehearsal(file, load_params(file), [*shapes, *_differences(written, small)])


def shrunk(config: PreTrainedConfig, width: int, layers: int) -> PreTrainedConfig:
    """The same architecture, at most so wide and deep; vocabulary, positions and query heads per key head are kept.

    At most two key heads are kept. `width` is rounded up to a multiple that the heads divide.
    Raises InputError if no such model can be made.
    """
    small = deepcopy(config)
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = min(2, key_heads) * (config.num_attention_heads // key_heads)
    small.num_attention_heads = heads
    small.hidden_size = min(config.hidden_size, 2 * heads * math.ceil(width / (2 * heads)))
    small.num_hidden_layers = min(layers, config.num_hidden_layers)
    of_the_heads = {"num_key_value_heads": min(2, key_heads), "head_dim": small.hidden_size // heads}
    of_the_layers = {"layer_types": (getattr(config, "layer_types", None) or [])[: small.num_hidden_layers]}
    ratio = small.hidden_size / config.hidden_size
    of_the_width = {"intermediate_size": round(ratio * (getattr(config, "intermediate_size", None) or 0))}
    for key, value in (of_the_heads | of_the_layers | of_the_width).items():
        if getattr(config, key, None):
            setattr(small, key, value)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    try:
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        with torch.inference_mode():
            model(torch.arange(4)[None])
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        what = f"a {config.model_type} of width {small.hidden_size} and {small.num_hidden_layers} layers cannot be made"
        raise InputError(f"rehearsal: {what}: {error}; choose another width or number of layers") from error
    return small


def summary(params: Params) -> Iterator[str]:
    """A table of the notebooks that ran (time, memory, tables, figures), and the folder of their results."""
    path = params.output_dir / "manifest.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.is_file() else {}
    rows = []
    for receipt in sorted((params.output_dir / "work" / "receipts").glob("*.json")):
        name, entry = receipt.stem, entries[receipt.stem]
        suffixes = [Path(output).suffix for output in entry["outputs"]]
        counts = suffixes.count(".csv"), suffixes.count(".png")
        rows.append((name, f"{entry['wall_seconds']:.0f}", f"{entry['peak_memory_mib']:,}", *counts))
    yield tabulate(rows, ["ran", "seconds", "MiB", "tables", "figures"], tablefmt="plain", disable_numparse=True)
    yield f"results (which mean nothing) and models: {params.output_dir}"


def _fewer(params: Params) -> dict[str, Any]:
    """The reduced values, by key."""
    fewer: dict[str, Any] = {key: _at_most(key, params) for key in AT_MOST}
    fewer["threads"] = min(params.threads, os.cpu_count() or 1)
    for name in ("lengths", "depths"):
        values = getattr(params.needle, name)
        fewer[f"needle.{name}"] = sorted({min(values), max(values)})
    return fewer


def _at_most(key: str, params: Params) -> int:
    section, _, name = key.partition(".")
    value = getattr(getattr(params, section), name)
    return AT_MOST[key] if value is None else min(value, AT_MOST[key])


def _scaled(params: Params, configs: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, int]:
    """The layers of the settings, by key, scaled to the smaller models."""
    scaled = {}
    for key, which, layer in (
        ("allocation.layer", "instruct", params.allocation.layer),
        ("scoring.layer", "seed_model", params.scoring.layer),
    ):
        depth = configs[which].num_hidden_layers
        if layer >= depth:
            there = f"models.{which} has layers 0 to {depth - 1}"
            raise InputError(f"{params.file}: {key}: {layer} does not exist, {there}; choose one of them")
        scaled[key] = layer * small[which].num_hidden_layers // depth
    return scaled


def _write_model(params: Params, which: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = params.path(getattr(params.models, which))
    part = folder.with_name(f"{folder.name}.part")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed + MODEL_ROLES.index(which))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _median_score(params: Params) -> float:
    """The threshold that about half of the turns exceed; 02 reuses the scores that were computed for it."""
    section = params.scoring
    torch.set_num_threads(params.threads)
    scores = scoring.score_corpus(
        experiment.model(params, "seed_model"),
        experiment.tokenizer(params, "seed_model"),
        experiment.conversations(params),
        section,
        max_length=params.conversations.max_length,
        shard_dir=params.output_dir / "work" / "scores",
        progress=False,
    )
    return round(indicator.threshold_for_fraction(scores, 0.5, layer=section.layer), 3)


def _shape(config: PreTrainedConfig) -> str:
    return f"{config.num_hidden_layers} layers of width {config.hidden_size:,}"


def _differences(written: Params, small: Params) -> Iterator[str]:
    before, after = written.model_dump(mode="json"), small.model_dump(mode="json")
    for section, values in after.items():
        pairs = {section: (before[section], values)}
        if isinstance(values, dict):
            pairs = {f"{section}.{key}": (before[section][key], value) for key, value in values.items()}
        for key, (old, new) in pairs.items():
            if old != new and not key.startswith("models."):
                yield f"  {key}: {json.dumps(old)} → {json.dumps(new)}"
