"""Typed parameters of an experiment. One YAML file is one experiment, and every file has the same keys."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator


class InputError(ValueError):
    """Bad input: one clear line that names the file, the key or row, and the remedy. The command line exits with 2."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string: take it as the number that was meant."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0)]
Variant = Literal["standard", "authors_code"]  # the paper's text, mended where it is unclear; or what its code computes
FirstResponseToken = Literal["last_input", "forced_prefix"]
MODEL_ROLES = ("pretrained", "instruct", "seed_model")
TRAINED_MODELS = ("vanilla", "indicator")  # by 03, in <outputs>/<experiment>/work/models


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Models(Section):
    pretrained: str
    instruct: str
    seed_model: str
    revision: str | None  # of `pretrained`
    instruct_revision: str | None
    seed_model_revision: str | None
    chat_template: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    quantisation: Literal["nf4"] | None
    attention: Literal["sdpa", "eager"]
    batch_size: Count
    indicator: Annotated[str, Field(min_length=1)]

    def revision_of(self, which: str) -> str | None:
        """The commit, tag or branch of `pretrained`, `instruct` or `seed_model`; None: the newest."""
        return self.revision if which == "pretrained" else getattr(self, f"{which}_revision")


class Conversations(Section):
    source: str
    split: str
    revision: str | None
    n: Count | None
    max_length: Count
    on_bad_row: Literal["error", "drop"]
    remove_refusals: bool


class Miniature(Section):
    shares: dict[str, Fraction] | None

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "Miniature":
        total = 1 if self.shares is None else sum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares must sum to 1, they sum to {total:g}")
        return self


class Allocation(Section):
    prompts: Count
    layer: Layer
    first_response_token: FirstResponseToken


class Steering(Section):
    alphas: Annotated[list[Annotated[Positive, Field(le=1)]], Field(min_length=1)]
    per_task: Count
    variant: Variant


class Scoring(Section):
    layer: Layer = 15
    variant: Variant = "standard"
    head_reduction: Literal["max_then_mean", "mean_then_max", "mean", "first_token"] = "max_then_mean"
    thresholds: Annotated[list[Fraction], Field(min_length=1)] = [0.5, 0.6, 0.7, 0.8]
    threshold: Fraction = 0.6
    token_budget: Count | None = None


class Finetune(Section):
    method: Literal["full", "lora", "qlora"] = "lora"
    variant: Variant = "standard"
    steps: Count | None = None
    epochs: Positive | None = 1
    batch_size: Count = 2
    gradient_accumulation: Count = 8
    learning_rate: Positive = 2e-4
    warmup_fraction: Fraction = 0.1
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    lora_rank: Count = 16
    lora_alpha: Positive = 16
    lora_dropout: Fraction = 0.05
    max_grad_norm: Positive = 1
    group_by_length: bool = True
    packing: bool = False
    gradient_checkpointing: bool | None = None
    save_every: Count = 100

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "Finetune":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs', set the other to null")
        return self


class Needle(Section):
    source: Literal["miniature", "text"]
    haystack: str | None
    prompt: Annotated[int, Field(ge=1, le=4)]
    needle: str | list[str] | None
    question: str | None
    keywords: list[str] | None
    response_prefix: str | None
    lengths: Annotated[list[Count], Field(min_length=1)]
    depths: Annotated[list[Annotated[Number, Field(ge=0, le=100)]], Field(min_length=1)]
    per_cell: Count
    max_new_tokens: Count
    variant: Variant

    @model_validator(mode="after")
    def _text_needs_its_parts(self) -> "Needle":
        missing = [key for key in ("haystack", "needle", "question", "keywords") if not getattr(self, key)]
        if self.source == "text" and missing:
            raise ValueError(f"source 'text' needs {', '.join(missing)}")
        return self


class Qa(Section):
    sources: list[str]
    split: str
    n: Count
    prompt: Literal["instruction", "plain"]
    variant: Variant
    max_new_tokens: Count


class Facts(Section):
    n: Count


class Instructions(Section):
    n: Count
    max_new_tokens: Count


class Bootstrap(Section):
    samples: Count


class Evidence(Section):
    """What the notebooks from 06 on vary; the other sections say what they keep."""

    seeds: Annotated[list[Seed], Field(min_length=2)]
    ablation_seeds: Annotated[list[Seed], Field(min_length=2)]
    doses: Annotated[list[Fraction], Field(min_length=2)]
    thresholds: Annotated[list[Fraction], Field(min_length=1)]
    marked_shares: Annotated[list[Fraction], Field(min_length=1)]
    compared_scores: Count
    step_factors: Annotated[list[Count], Field(min_length=2)]
    second_stage_steps: Annotated[list[Count], Field(min_length=1)]
    head_counts: Annotated[list[Count], Field(min_length=1)]
    head_draws: Count
    widths: Annotated[list[Annotated[int, Field(ge=8, multiple_of=8)]], Field(min_length=2)]
    pretraining_seeds: Annotated[list[Seed], Field(min_length=2)]
    pretraining_steps: Count

    @model_validator(mode="after")
    def _each_seed_once(self) -> "Evidence":
        for name in ("seeds", "ablation_seeds", "pretraining_seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must differ from one another: a seed that is named twice is no second run")
        return self


class Params(Section):
    """The parameters of one experiment, as `load_params` read and checked them."""

    experiment: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    seed: Seed
    threads: Count
    outputs: str
    models: Models
    conversations: Conversations
    miniature: Miniature
    allocation: Allocation
    steering: Steering
    scoring: Scoring
    finetune: Finetune
    needle: Needle
    qa: Qa
    facts: Facts
    instructions: Instructions
    bootstrap: Bootstrap
    evidence: Evidence | None

    _file: str = PrivateAttr("params")
    _root: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _miniature_needs_its_shares(self) -> "Params":
        if self.conversations.source == "miniature" and self.miniature.shares is None:
            raise ValueError("conversations.source 'miniature' needs miniature.shares, copy them from miniature.yaml")
        return self

    @property
    def file(self) -> str:
        """The file they came from, for messages."""
        return self._file

    @property
    def root(self) -> Path:
        """The folder from which relative paths count: the working directory, or its parent."""
        return self._root

    @property
    def digest(self) -> str:
        """12 hex digits of everything that can change a result (so not of the folder that the results go to)."""
        canonical = json.dumps(self.model_dump(mode="json", exclude={"outputs"}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def changed(self, overrides: Mapping[str, Any]) -> "Params":
        """The same experiment with other values, checked as those of a file: `changed({"needle.per_cell": 2})`."""
        return _checked(self.model_dump(), overrides, self._file, self._root)

    @property
    def output_dir(self) -> Path:
        return self.path(self.outputs) / self.experiment

    def path(self, name: str) -> Path:
        """A path named in the file: absolute, or relative to the folder from which the file was found."""
        return self._root / Path(name).expanduser()

    def trains(self, role: str) -> bool:
        """Whether `pretrained`, `instruct` or `seed_model` is one of the models that 03 trains in this experiment."""
        named = self.path(getattr(self.models, role))
        return named.parent == self.output_dir / "work" / "models" and named.name in TRAINED_MODELS

    def missing_inputs(self) -> dict[str, str]:
        """Keys that name a file or folder which is not there, with the name.

        A model or dataset named `owner/name` may lie on a hub, so that only loading it can tell. `models.instruct` may
        be one that 03 trains: what asks it comes after 03.
        """
        on_disk = {"needle.haystack": self.needle.haystack, "models.chat_template": self.models.chat_template}
        anywhere = {"conversations.source": self.conversations.source}
        anywhere |= {f"models.{role}": getattr(self.models, role) for role in MODEL_ROLES}
        anywhere |= {f"qa.sources[{number}]": name for number, name in enumerate(self.qa.sources)}
        named = on_disk | {key: name for key, name in anywhere.items() if not is_hub_id(name)}
        return {
            key: name
            for key, name in named.items()
            if name is not None and name.split(":")[0] != "miniature" and not self.path(name).exists()
            if not (key == "models.instruct" and self.trains("instruct"))
        }

    def check_inputs(self) -> None:
        """Raises InputError for the first file or folder that is named and is not there."""
        for key, name in self.missing_inputs().items():
            raise InputError(f"{self.file}: {key}: no file or folder '{name}'; {self.remedy(key)}")

    def remedy(self, key: str) -> str:
        """What to do about a missing input."""
        role = key.removeprefix("models.")
        if role in MODEL_ROLES and self.trains(role):
            return f"it is trained here: first run 02 and 03 by themselves, with --set {key}={self.models.pretrained}"
        supplied = {
            "needle.haystack": "put a folder of .txt there",
            "qa.sources": "put an official JSON file of SQuAD, QuAC or DROP there",
        }
        what = supplied.get(key.split("[")[0])
        return f"{what}, or correct the path" if what else "correct the path"


def is_hub_id(name: str) -> bool:
    """True for what looks like a hub's `owner/name`: one slash, no path, no data file."""
    is_path = name.startswith((".", "/", "~")) or name.endswith(("/", ".json", ".jsonl", ".ndjson", ".parquet"))
    return name.count("/") == 1 and not is_path


def load_params(params_file: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Reads and checks an experiment's parameters.

    `params_file` is looked for in the working directory, then in its parent (where a notebook opened in `notebooks/`
    finds it). `overrides` replaces values after reading: `{"needle.per_cell": 2}` or `{"needle": {"per_cell": 2}}`.

    Raises InputError for a missing file, broken YAML, an unknown, missing or ill-typed key.
    """
    found = [root for root in (Path(), Path("..")) if (root / params_file).is_file()]
    if not found:
        raise InputError(f"{params_file}: no such params file{_others(Path(params_file))}")
    try:
        content = yaml.safe_load((found[0] / params_file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{params_file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{params_file}: expected keys such as 'experiment: miniature', found no keys")
    overrides = overrides or {}
    if not isinstance(overrides, Mapping):
        raise InputError(f"overrides: expected a dict such as {{'needle.per_cell': 2}}, got {overrides!r}")
    return _checked(content, overrides, str(params_file), found[0])


def _checked(content: dict[str, Any], overrides: Mapping[str, Any], file: str, root: Path) -> Params:
    replaced = dict(_dotted(overrides))
    for where, keys in ((file, dict(_dotted(content))), ("overrides", replaced)):
        for key in keys:
            if key not in known_keys() and not _is_section(key):
                raise InputError(f"{where}: unknown key '{key}'; {_nearest(key)}")
    for key, value in replaced.items():
        section, _, name = key.rpartition(".")
        if section in content and content[section] is None:
            content[section] = {}
        (content[section] if isinstance(content.get(section), dict) else content)[name] = value
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise InputError(_message(file, set(replaced), error)) from None
    params._file, params._root = file, root
    return params


def known_keys() -> list[str]:
    """Every key in dotted form, in the order of the schema: `experiment`, …, `needle.lengths`, …"""
    keys = []
    for name in Params.model_fields:
        section = _section(name)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys


def _section(name: str) -> type[Section] | None:
    """The section that goes by this name, also one that may be null."""
    field = Params.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _is_section(name: str) -> bool:
    return _section(name) is not None


def _dotted(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        section = _is_section(str(key)) or str(key) not in known_keys()
        if isinstance(value, Mapping) and section:
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield str(key), value


def _message(file: str, replaced: set[str], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        touched = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in replaced)
        where = f"{file} with overrides" if touched else file
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"{where}: missing key '{key}'; all files have all keys, copy it from params/miniature.yaml")
        elif isinstance(problem["input"], dict):
            lines.append(f"{where}: key '{key}': {what}")
        else:
            lines.append(f"{where}: key '{key}': {what[:1].lower()}{what[1:]}, got {problem['input']!r}")
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _nearest(key: str) -> str:
    known = known_keys()
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    siblings = [name for name in known if name.split(".")[:-1] == key.split(".")[:-1]]
    meant = [f"did you mean '{close[0]}'?"] if close else []
    return " ".join([*meant, f"keys there: {', '.join(siblings)}" if siblings else "see params/miniature.yaml"])


def _others(missing: Path) -> str:
    folders = (missing.parent, Path("..") / missing.parent, Path("params"))
    names = [os.fspath(path) for folder in folders for path in sorted(folder.glob("*.yaml"))]
    return f"; there are: {', '.join(dict.fromkeys(names))}" if names else "; no params file lies there"
