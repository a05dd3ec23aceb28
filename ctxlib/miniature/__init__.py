"""The embedded miniature: an invented town, its tokenizer, and its four models: two whole ones, two adapters."""

from pathlib import Path

from ctxlib.params import EMBEDDED, InputError, locate

MODELS = Path(__file__).parent / "models"
PREFIX = f"{EMBEDDED}:"


def model_source(name: str) -> str:
    """The folder of the embedded model that `miniature:<name>` names; any other name, as it is.

    Raises InputError for a model that the miniature does not have.
    """
    if locate(name) != "embedded" or ":" not in name:
        return name
    configs = (*MODELS.glob("*/config.json"), *MODELS.glob("*/adapter_config.json"))
    embedded = {config.parent.name: config.parent for config in sorted(configs)}
    try:
        return str(embedded[name.removeprefix(PREFIX)])
    except KeyError:
        names = ", ".join(f"{PREFIX}{one}" for one in embedded)
        raise InputError(f"{name}: the miniature has no such model; it has {names}") from None
