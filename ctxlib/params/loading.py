"""Reading a params file: what it extends, what overrides replace, and one clear line about anything wrong."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ctxlib.params.errors import InputError
from ctxlib.params.locating import Place, expanded, locate, nowhere
from ctxlib.params.sections import (
    Allocation,
    Bootstrap,
    Conversations,
    Count,
    Cures,
    Evidence,
    Facts,
    Finetune,
    Instructions,
    Miniature,
    Models,
    Needle,
    Qa,
    Scoring,
    Section,
    Seed,
    Steering,
)

MODEL_ROLES = ("pretrained", "instruct", "seed_model")
TRAINED_MODELS = ("vanilla", "indicator")  # by 03, in <outputs>/<experiment>/work/models
EXTENDS = "extends"
RENAMED = {
    "steering.reading": "steering.variant",
    "scoring.reading": "scoring.variant",
    "finetune.reading": "finetune.variant",
    "needle.reading": "needle.variant",
    "qa.reading": "qa.variant",
    "evidence.readings": "evidence.compared_scores",
}
RENAMED_VALUES = {"clean": "standard", "paper": "authors_code"}  # of every `variant`


class Params(Section):
    """The parameters of one experiment, as `load_params` read and checked them."""

    experiment: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    seed: Seed
    threads: Count
    outputs: str = "outputs"
    models: Models
    conversations: Conversations
    miniature: Miniature = Miniature()
    allocation: Allocation
    steering: Steering
    scoring: Scoring = Scoring()
    finetune: Finetune = Finetune()
    needle: Needle
    qa: Qa
    facts: Facts = Facts()
    instructions: Instructions = Instructions()
    bootstrap: Bootstrap = Bootstrap()
    evidence: Evidence | None = None
    cures: Cures | None = None

    _files: tuple[str, ...] = PrivateAttr(("params",))
    _root: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _miniature_needs_its_shares(self) -> "Params":
        if self.conversations.source == "miniature" and self.miniature.shares is None:
            raise ValueError("conversations.source 'miniature' needs miniature.shares, copy them from miniature.yaml")
        return self

    @property
    def file(self) -> str:
        """The file they came from, for messages."""
        return self._files[0]

    @property
    def files(self) -> tuple[str, ...]:
        """That file and those that it extends, the nearest first; relative to `root` unless absolute."""
        return self._files

    @property
    def root(self) -> Path:
        """The folder from which relative paths count: the working directory, or its parent."""
        return self._root

    @property
    def digest(self) -> str:
        """12 hex digits of everything that can change a result (so not of the folder that the results go to)."""
        unused = set() if self.cures else {"cures"}  # so that other experiments keep the digest they had before it
        canonical = json.dumps(self.model_dump(mode="json", exclude={"outputs", *unused}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def changed(self, overrides: Mapping[str, Any]) -> "Params":
        """The same experiment with other values, checked as those of a file: `changed({"needle.per_cell": 2})`."""
        return _checked(self.model_dump(), overrides, {}, self._files, self._root)

    @property
    def raw_text(self) -> str | None:
        """Where the plain text comes from that is mixed into training; None if none is."""
        of_the_town = "miniature" if self.conversations.source == "miniature" else None
        return (self.conversations.raw_text or of_the_town) if self.finetune.raw_text_share else None

    @property
    def output_dir(self) -> Path:
        return self.path(self.outputs) / self.experiment

    def path(self, name: str) -> Path:
        """A path named in the file: absolute, or relative to the folder from which the file was found."""
        return expanded(name, self._root)

    def locate(self, name: str) -> Place:
        """Where a model or dataset that is named in the file is."""
        return locate(name, self._root)

    def trains(self, role: str) -> bool:
        """Whether `pretrained`, `instruct` or `seed_model` is one of the models that 03 trains in this experiment."""
        named = self.path(getattr(self.models, role))
        return named.parent == self.output_dir / "work" / "models" and named.name in TRAINED_MODELS

    def missing_inputs(self) -> dict[str, str]:
        """Keys that name a file or folder that does not exist, with the name.

        Hub ids are not looked up. `models.instruct` may be a model that 03 trains: the notebooks that ask it run later.
        """
        on_disk = {"needle.haystack": self.needle.haystack, "models.chat_template": self.models.chat_template}
        missing = {key: name for key, name in on_disk.items() if name is not None and not self.path(name).exists()}
        anywhere = {"conversations.source": self.conversations.source}
        if self.conversations.raw_text is not None:
            anywhere["conversations.raw_text"] = self.conversations.raw_text
        anywhere |= {f"models.{role}": getattr(self.models, role) for role in MODEL_ROLES}
        anywhere |= {f"qa.sources[{number}]": name for number, name in enumerate(self.qa.sources)}
        missing |= {key: name for key, name in anywhere.items() if self.locate(name) == "nowhere"}
        if self.trains("instruct"):
            missing.pop("models.instruct", None)
        return missing

    def check_inputs(self) -> None:
        """Raises InputError for the first named file or folder that does not exist."""
        for key, name in self.missing_inputs().items():
            raise InputError(f"{self.file}: {key}: {nowhere(name, self.remedy(key))}")

    def remedy(self, key: str) -> str:
        """What to do about a missing input."""
        role = key.removeprefix("models.")
        if role in MODEL_ROLES and self.trains(role):
            return f"it is trained here: first run 02 and 03 by themselves, with --set {key}={self.models.pretrained}"
        supplied = {
            "needle.haystack": "put a folder of .txt there",
            "qa.sources": "put an official JSON file of SQuAD, QuAC or DROP there, or give a hub id",
        }
        what = supplied.get(key.split("[")[0])
        return f"{what}, or correct the path" if what else "correct the path"


def load_params(params_file: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Reads and checks an experiment's parameters.

    `params_file` is looked for in the working directory, then in its parent (where a notebook opened in `notebooks/`
    finds it). With `extends: FILE` (relative to the file that says so, else to the folder `params`) a file holds only
    the keys that differ: sections are merged key by key; lists and `miniature.shares` are replaced whole. `overrides`
    replaces values after reading: `{"needle.per_cell": 2}` or `{"needle": {"per_cell": 2}}`.

    Raises InputError for a missing file, files that extend one another in a circle, broken YAML, and an unknown,
    renamed, repeated, missing or ill-typed key.
    """
    if str(params_file).startswith("~"):
        params_file = expanded(params_file)
    root = next((root for root in (Path(), Path("..")) if expanded(params_file, root).is_file()), None)
    if root is None:
        kind = "a folder, not a params file" if Path(params_file).is_dir() else "no such params file"
        raise InputError(f"{params_file}: {kind}{_others(Path(params_file))}")
    overrides = overrides or {}
    if not isinstance(overrides, Mapping):
        raise InputError(f"overrides: expected a dict such as {{'needle.per_cell': 2}}, got {overrides!r}")
    chain = _chain(str(params_file), root)
    content: dict[str, Any] = {}
    origin = {}
    for file, of_file in reversed(chain.items()):
        content = _merged(content, of_file)
        origin |= dict.fromkeys((key for key, _ in _dotted(of_file)), file)
    return _checked(content, overrides, origin, tuple(chain), root)


def _chain(file: str, root: Path) -> dict[str, dict[str, Any]]:
    """The keys of a file and of those that it extends, by file, the nearest first."""
    chain: dict[str, dict[str, Any]] = {}
    while file:
        content = _read(file, root)
        base = content.pop(EXTENDS, None)
        _check_keys(file, content)
        chain[file] = content
        file = _extended(base, file, root) if base is not None else ""
        if file in chain:
            raise InputError(f"{' extends '.join([*chain, file])}: a circle; remove one '{EXTENDS}'")
    return chain


def _extended(base: Any, file: str, root: Path) -> str:
    candidates = [(root / file).parent / str(base), root / "params" / str(base)]
    found = [path for path in candidates if path.is_file()]
    if not isinstance(base, str) or not found:
        raise InputError(f"{file}: {EXTENDS}: no such params file {base!r}{_others(Path(file))}")
    path = Path(os.path.normpath(found[0]))
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _read(file: str, root: Path) -> dict[str, Any]:
    try:
        content = yaml.load((root / file).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{file}: not readable: {error.strerror}; correct the path or its permissions") from None
    except _RepeatedKey as error:
        raise InputError(f"{file}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # ValueError: of a date such as 2026-13-45
        why = " ".join(str(error).split())
        raise InputError(f"{file}: not readable as YAML: {why}; repair the file, or quote the value") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected keys such as 'experiment: miniature', found no keys")
    return content


class _RepeatedKey(Exception):
    pass


class _Loader(yaml.SafeLoader):
    """PyYAML's, which would silently take the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                first = lines[key.value]
                raise _RepeatedKey(f"key '{key.value}' is in line {first} and again in line {line}; remove one")
        return super().construct_mapping(node, deep)


def _merged(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Sections key by key, everything else whole."""
    merged = dict(base)
    for key, value in more.items():
        old = merged.get(key)
        both = _section(key) and isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = {**old, **value} if both else value
    return merged


def _check_keys(where: str, content: Mapping[str, Any]) -> None:
    """Raises InputError for an unknown or renamed key, and for a renamed value."""
    known = known_keys()
    for key, value in _dotted(content):
        if key in RENAMED:
            values = ", ".join(f"{new} (was {old})" for old, new in RENAMED_VALUES.items())
            now = f"now '{RENAMED[key]}'" + (f", one of {values}" if RENAMED[key].endswith("variant") else "")
            raise InputError(f"{where}: key '{key}' is {now}")
        if key not in known and not _section(key):
            raise InputError(f"{where}: unknown key '{key}'; {_nearest(key)}")
        if key.endswith(".variant") and isinstance(value, str) and value in RENAMED_VALUES:
            raise InputError(f"{where}: key '{key}': the value '{value}' is now '{RENAMED_VALUES[value]}'")


def _checked(
    content: dict[str, Any], overrides: Mapping[str, Any], origin: Mapping[str, str], files: tuple[str, ...], root: Path
) -> Params:
    """Params of merged `content`; `origin` says which file a key is from, for messages."""
    _check_keys("overrides", overrides)
    replaced = dict(_dotted(overrides))
    for key, value in replaced.items():
        section, _, name = key.rpartition(".")
        content = _merged(content, {section: {name: value}} if section else {name: value})
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise InputError(_message(files[0], origin, set(replaced), error)) from None
    params._files, params._root = files, root
    return params


def known_keys() -> list[str]:
    """Every key in dotted form, in the order of the schema: `experiment`, …, `needle.lengths`, …"""
    keys = []
    for name in Params.model_fields:
        section = _section(name)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys


def _section(name: str) -> type[Section] | None:
    """The section of this name, including one that may be null."""
    field = Params.model_fields.get(str(name))
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _dotted(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`needle.per_cell, 2` of `{"needle": {"per_cell": 2}}` and of `{"needle.per_cell": 2}`."""
    known = known_keys()
    for key, value in content.items():
        if isinstance(value, Mapping) and (_section(key) or str(key) not in known):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield str(key), value


def _message(file: str, origin: Mapping[str, str], replaced: set[str], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(parts)
        touched = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in replaced)
        of_key = next(
            (origin[name] for name in (".".join(parts[:2]), parts[0] if parts else "") if name in origin), file
        )
        where = f"{file} with overrides" if touched else of_key
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            remedy = "it has no default: add it, or extend a file that has it (extends: miniature.yaml)"
            lines.append(f"{where}: missing key '{key}'; {remedy}")
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
    return f"; there are: {', '.join(dict.fromkeys(names))}" if names else "; there is no params file in that folder"
