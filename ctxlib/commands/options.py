"""Options of a command from the sections of a params file, and one line for whatever is wrong with them."""

from typing import Annotated, Any

import yaml
from cyclopts import CycloptsError, Group, Parameter
from pydantic import BaseModel, ConfigDict, ValidationError, create_model, field_validator

from ctxlib.params import RENAMED_VALUES, InputError, Section

RENAMED_OPTIONS = {"--reading": "--variant"}
INPUT, DATA, SCORE, JUDGE, MODEL, RUN = (
    Group.create_ordered(name)
    for name in ("Input and output", "The data", "The score", "The judge", "The model", "The run")
)


def _from_text(value: Any) -> Any:
    return None if value in ("none", "null") else value


def options(section: type[Section], group: Group, *only: str) -> Any:
    """The keys of a section as options of a command; they are texts here, where a YAML file has types."""
    lax: Any = {"model_config": ConfigDict(strict=False), "from_text": field_validator("*", mode="before")(_from_text)}
    kind: Any = type(section.__name__, (section,), lax | {"__module__": __name__})
    if only:
        fields: Any = {name: (section.model_fields[name].annotation, section.model_fields[name]) for name in only}
        config = ConfigDict(extra="forbid", frozen=True)
        kind = create_model(section.__name__, __config__=config, __validators__={"none": lax["from_text"]}, **fields)
    return Annotated[kind, Parameter(name="*", group=group)]


def option(help: str, group: Group | None = None, **more: Any) -> Parameter:
    """An option that no section has."""
    return Parameter(help=help, group=group, **more)


def refuse_renamed(arguments: list[str]) -> None:
    """Raises InputError, which names the new option, for one that was renamed."""
    for old, new in RENAMED_OPTIONS.items():
        if old in (argument.split("=")[0] for argument in arguments):
            values = ", ".join(f"{now} (was {before})" for before, now in RENAMED_VALUES.items())
            raise InputError(f"{old} is now {new}, one of {values}")


def one_line(error: CycloptsError | ValidationError) -> str:
    """What is wrong with the options, in one line."""
    wrong = error if isinstance(error, ValidationError) else error.__cause__
    if not isinstance(wrong, ValidationError):
        return " ".join(str(error).split())
    problem = wrong.errors()[0]
    argument = getattr(error, "argument", None)
    of_section = " ".join(f"--{str(part).replace('_', '-')}" for part in problem["loc"][:1])
    option = of_section or (argument.name if argument and argument.name != "*" else "")
    what = problem["msg"].removeprefix("Value error, ")
    return f"{option} {problem['input']}: {what[:1].lower()}{what[1:]}" if option else what


def values(*sections: BaseModel | None) -> dict[str, Any]:
    """Values by name of several sections; a section of which no option was given is None."""
    return {name: value for section in sections if section for name, value in section.model_dump().items()}


def parse_overrides(overrides: list[str] | None) -> dict[str, Any]:
    """Values by key of `--set key=value`; a value is YAML: a number, null, true, a list, or a whole section as JSON.

    Raises InputError for anything else.
    """
    parsed = {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected key=value, such as --set needle.per_cell=2")
        try:
            parsed[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # ValueError: of a date
            why = " ".join(str(error).split())[:100]
            raise InputError(f"--set {override}: the value is not readable as YAML ({why}); quote it") from None
    return parsed
