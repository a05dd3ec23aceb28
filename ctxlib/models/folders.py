"""Model folders: what lies in them, checked before anything is loaded, and names by their contents."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ctxlib.files import check_is_itself, check_safetensors, read_json_object
from ctxlib.params import InputError, expanded, locate, nowhere

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

_TOKENIZER_JSON = (  # transformers reads the first of them, too, to choose the tokenizer's class
    *("config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
BASE_FROM_HERE = "base_from_here"  # key of finetune.json: the base as seen from the adapter


def is_local(path: str | Path) -> bool:
    """False for a hub id, see `locate`; True for everything on this machine, and for paths that do not exist."""
    return locate(path) != "hub"


def is_adapter(path: str | Path) -> bool:
    """True for a local folder that holds a peft adapter."""
    return is_local(path) and (expanded(path) / "adapter_config.json").is_file()


def trained_over(path: str | Path) -> str | None:
    """The quantisation of the weights below an adapter that `finetune` wrote: nf4 after QLoRA. None for all else."""
    return "nf4" if is_adapter(path) and _record(path).get("method") == "qlora" else None


def _record(adapter: str | Path) -> dict[str, Any]:
    """What `finetune` wrote about a training; nothing for an adapter that came from elsewhere."""
    file = expanded(adapter) / "finetune.json"
    return read_json_object(file) if file.is_file() else {}


def adapter_base(path: str | Path) -> str:
    """Name or folder of the model that an adapter was trained on; InputError for a folder that is not there."""
    return _base_of(path)[0]


def adapter_revision(path: str | Path) -> str | None:
    """The revision of a hub's model that an adapter was trained on."""
    return _adapter_config(path).get("revision")


def _base_of(adapter: str | Path) -> tuple[str, str | None]:
    """The model that an adapter was trained on, and its revision.

    peft names a local base by its absolute path. When a project folder has moved, the base is found where it lies as
    seen from the adapter, which `finetune` writes down as `base_from_here`.
    """
    config = _adapter_config(adapter)
    base = config["base_model_name_or_path"]
    if is_local(base) and not expanded(base).exists():
        moved = _record(adapter).get(BASE_FROM_HERE)
        if isinstance(moved, str) and (expanded(adapter) / moved / "config.json").is_file():
            return str((expanded(adapter) / moved).resolve()), None
        raise InputError(
            f"{adapter}/adapter_config.json: base_model_name_or_path: "
            + nowhere(base, "the adapter was trained on it: put that model there, or correct the key")
        )
    return base, config.get("revision")


def _adapter_config(adapter: str | Path) -> dict[str, Any]:
    file = expanded(adapter) / "adapter_config.json"
    config = read_json_object(file)
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise InputError(f"{file}: not the configuration of an adapter: it names no base_model_name_or_path")
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise InputError(f"{file}: peft_type {kind}: only LoRA adapters are read; merge it into its base model first")
    return config


def check_weights(path: str | Path) -> None:
    """Raises InputError for a local model or adapter with files that are missing, cut short or something else."""
    check_adapter_files(path) if is_adapter(path) else check_model_files(path)


def check_model_files(path: str | Path) -> None:
    if not is_local(path):
        return
    folder = _folder(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"{path}: not a model folder (config.json is missing)")
    for name in ("config.json", "generation_config.json"):  # of a broken second one transformers says nothing
        if (folder / name).is_file():
            read_json_object(folder / name)
    check_safetensors(_weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = read_json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: names no files of weights (weight_map); fetch it again")
        return [folder / name for name in sorted({str(name) for name in shards.values()})]
    there = [file.name for file in sorted(folder.glob("*.safetensors"))]
    if any("-of-" in name for name in there):
        raise InputError(f"{index}: missing, though its shards are there ({there[0]}, …); fetch it, too")
    if len(there) == 1 and there[0].startswith("consolidated"):
        raise InputError(f"{folder}: {there[0]} is in its makers' own format; fetch the model in transformers' format")
    if there:
        names = ", ".join(there[:3])
        raise InputError(f"{folder}: no model.safetensors or its index there, only {names}; rename or save it again")
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]
    found = f"only {', '.join(pickled)}, which can run code" if pickled else "no weights"
    raise InputError(f"{folder}: no *.safetensors there, {found}; save it again with save_pretrained")


def check_adapter_files(adapter: str | Path) -> None:
    if not is_adapter(adapter):
        raise InputError(f"{adapter}: no adapter there (adapter_config.json is missing)")
    _adapter_config(adapter)
    check_safetensors([expanded(adapter) / "adapter_model.safetensors"])


def check_tokenizer_files(path: str | Path, *, required: bool = True) -> bool:
    """Whether a local folder holds a tokenizer. Raises InputError for unreadable files, and if `required` for none.

    Also for one that asks transformers to run code from the folder.
    """
    folder = _folder(path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if required:
            raise InputError(f"{path}: no tokenizer there (looked for {', '.join(TOKENIZER_FILES)})")
        return False
    for name in _TOKENIZER_JSON:
        if (folder / name).is_file():
            read_json_object(folder / name)
    for name in ("vocab.json", "tokenizer.model", "merges.txt", "chat_template.jinja"):
        check_is_itself(folder / name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "AutoTokenizer" in (read_json_object(settings).get("auto_map") or {}):
        raise InputError(
            f"{settings}: auto_map asks to run code of the folder, which is never done; delete auto_map if "
            "tokenizer.json holds the whole tokenizer, or use a model that transformers knows"
        )
    return True


def _folder(path: str | Path) -> Path:
    folder = expanded(path)
    if not folder.exists():
        raise InputError(nowhere(path))
    if not folder.is_dir():
        raise InputError(f"{path}: a file; give a model's folder, or a hub id such as 'owner/name'")
    return folder


def source(path: str | Path) -> str:
    """Absolute where local: it is what an adapter remembers as its base, wherever it is loaded from."""
    return str(expanded(path).resolve()) if is_local(path) else str(path)


def model_hash(path: str | Path, *, revision: str | None = None) -> str:
    """12 hex digits that name a model by its contents, wherever it lies: sha256 over names and bytes of its files.

    An adapter's hash covers its base model. A hub id is named by itself and its revision.
    Raises InputError for a missing folder.
    """
    digest = hashlib.sha256()
    if not is_local(path):
        digest.update(f"{path}@{revision or 'main'}".encode())
        return digest.hexdigest()[:12]
    for file in sorted(_folder(path).iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name == "README.md":
            continue
        digest.update(f"{file.name}\0".encode())
        if file.name == "adapter_config.json":
            base, revision = _base_of(path)
            config = {key: value for key, value in _adapter_config(path).items() if key != "base_model_name_or_path"}
            digest.update(json.dumps(config, sort_keys=True).encode())
            digest.update(model_hash(base, revision=revision).encode())
        elif file.name == "finetune.json" and BASE_FROM_HERE in (record := read_json_object(file)):
            # where the base lies is no content; the rest as it is written without it
            del record[BASE_FROM_HERE]
            digest.update(hashlib.sha256(f"{json.dumps(record, indent=2, sort_keys=True)}\n".encode()).digest())
        else:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]
