"""Whether a loaded model has every weight from its files, and reads every weight in them."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ctxlib.params import InputError

# Multimodal checkpoints carry these beside the text model; llama's oldest files carry what is computed today.
_NOT_OF_THE_TEXT = re.compile(r"vision|visual|image|audio|speech|multi_modal|mm_|rotary_emb\.inv_freq|\bmtp\b")


def check_complete(report: Mapping[str, Any], path: str | Path) -> None:
    """Raises InputError unless the files hold every weight of the model, in its shape, and no further layers."""
    missing, unexpected = (sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys"))
    if missing:
        prefixes = {key.removesuffix(missing[0]) for key in unexpected if key.endswith(missing[0])}
        hint = "fetch the model again, or correct config.json"
        if prefixes:
            hint = f"in the files their names begin with '{min(prefixes)}': save the model without that wrapper"
        raise InputError(f"{path}: {_some(missing)} missing in its files and would be random; {hint}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, there, wanted = mismatched[0]
        shapes = f"{_shape(there)} in the files, {_shape(wanted)} by config.json"
        raise InputError(
            f"{path}: {_some([key for key, *_ in mismatched])} of another shape ({name}: {shapes}) and would be "
            "random; fetch the model again, or correct config.json"
        )
    if report["error_msgs"]:
        raise InputError(f"{path}: weights not loadable: {report['error_msgs'][0]}; fetch the model again")
    unread = [key for key in unexpected if not _NOT_OF_THE_TEXT.search(key)]
    if layers := [key for key in unread if re.search(r"\.(layers|h|blocks)\.\d+\.", key)]:
        raise InputError(
            f"{path}: {_some(layers)} in its files and not in the model that config.json describes; correct config.json"
        )
    if unread:
        warnings.warn(f"{path}: {_some(unread)} in its files and not read", stacklevel=3)


def check_adapter_is_read(model: nn.Module, file: Path, path: str | Path) -> None:
    """Raises InputError unless the adapter's file holds exactly the weights that were laid over the model."""
    from peft import get_peft_model_state_dict

    with safe_open(file, framework="pt") as weights:
        in_file = set(weights.keys())
    known = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if unread := sorted(in_file - known - set(model.state_dict())):  # embeddings may be saved whole
        raise InputError(
            f"{file}: {_some(unread)} of no layer of {path}: the adapter was made for another model; give its base "
            "model as base_model_name_or_path in adapter_config.json"
        )
    lora = {key for key in known if "lora_" in key}
    if missing := sorted(lora - in_file):
        raise InputError(f"{file}: {_some(missing)} missing; fetch the adapter again")


def _some(names: list[str]) -> str:
    """'3 weights (a, b, …) are', 'the weight a is'."""
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    return f"the weight {shown} is" if len(names) == 1 else f"{len(names)} weights ({shown}) are"


def _shape(of: Any) -> str:
    return "×".join(map(str, tuple(of)))
