"""Where models and data are: embedded, in a folder, in the hub's cache, on the hub, or still to be trained."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import CachedRevisionInfo, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ctxlib import experiment
from ctxlib.commands.plan.network import KNOWN, Network, as_config, count
from ctxlib.models import TOKENIZER_FILES, adapter_base, is_adapter
from ctxlib.params import InputError, Params, locate, nowhere


@dataclass(frozen=True)
class Source:
    """A model: its name, where it is, its counts, and the bytes that are still to be downloaded.

    `folder` holds its files where they are here, `adapter` tells that it is an adapter over its base.
    """

    name: str
    where: str
    network: Network
    to_download: int = 0
    folder: Path | None = None
    adapter: bool = False

    @property
    def has_tokenizer(self) -> bool:
        return self.folder is not None and any((self.folder / name).is_file() for name in TOKENIZER_FILES)


def find_model(params: Params, which: str) -> Source:
    """The model `pretrained`, `instruct` or `seed_model`; nothing is downloaded.

    Raises InputError for a folder that is not there or holds no model, and for a model of the hub that is not in the
    cache and whose shape is not known.
    """
    name, revision = getattr(params.models, which), params.models.revision_of(which)
    key = f"{params.file}: models.{which}"
    if params.trains(which) and not params.path(name).exists():
        base = find_model(params, "pretrained")
        return Source(name, "still to be trained, by 03", base.network, adapter=params.finetune.method != "full")
    if f"models.{which}" in params.missing_inputs():
        raise InputError(f"{key}: {nowhere(name, params.remedy(f'models.{which}'))}")
    if name.startswith(f"{experiment.EMBEDDED}:"):
        folder = Path(experiment.model_path(params, which))
        return Source(name, "embedded", _read(folder, key), folder=folder)
    if not params.path(name).exists():
        return _on_hub(name, revision, key)
    folder = params.path(name)
    if not is_adapter(folder):
        return Source(name, "a folder here", _read(folder, key), folder=folder)
    base = adapter_base(folder)
    found = _on_hub(base, None, key) if locate(base) == "hub" else None
    network = found.network if found else _read(Path(base), key)
    where = f"an adapter here, over {base}" + (f" ({found.where})" if found and found.to_download else "")
    return Source(name, where, network, found.to_download if found else 0, folder, adapter=True)


def _on_hub(name: str, revision: str | None, key: str) -> Source:
    found = cached(name, "model", revision)
    at = f"{name}@{revision[:8] if revision else 'main'}"
    files = {file.file_name: Path(file.file_path) for file in found.files} if found else {}
    if "config.json" in files:
        network = _read(files["config.json"].parent, key)
    elif name in KNOWN:
        network = count(as_config(KNOWN[name]))
    else:
        raise InputError(
            f"{key}: '{name}' is neither here nor in the hub's cache, and its shape is not known; fetch that alone "
            f"(hf download {name} config.json), or name a local folder"
        )
    folder = found.snapshot_path if found else None
    weights = _weight_files(files)
    if weights and weights <= files.keys():
        return Source(at, "in the hub's cache", network, folder=folder)
    there = sum(file.size_on_disk for file in found.files if file.file_name.endswith(".safetensors")) if found else 0
    where = "on the hub; to be downloaded" if not there else "partly in the hub's cache; the rest to be downloaded"
    return Source(at, where, network, max(0, network.stored_bytes - there), folder)


def cached(name: str, kind: str, revision: str | None) -> CachedRevisionInfo | None:
    """What the hub's cache holds of a "model" or "dataset" at a commit, tag or branch (None: main)."""
    for repo in _cache():
        if (repo.repo_id, repo.repo_type) == (name, kind):
            for found in repo.revisions:
                if revision == found.commit_hash or (revision or "main") in found.refs:
                    return found
    return None


@cache
def _cache() -> frozenset:
    try:
        return scan_cache_dir().repos
    except CacheNotFound:
        return frozenset()


def _weight_files(files: dict[str, Path]) -> set[str]:
    """The names of the files that hold the weights; none where that is not told."""
    index = "model.safetensors.index.json"
    if index in files:
        return set(json.loads(files[index].read_text(encoding="utf-8"))["weight_map"].values())
    return {"model.safetensors"}


def _read(folder: Path, key: str) -> Network:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: no readable config.json in {folder}; name a model's folder") from error
    try:
        return count(as_config(content))
    except InputError as error:
        raise InputError(f"{key}: {folder}: {error}") from error
