"""Where a model is: embedded, in a folder, in the hub's cache, on the hub, or still to be trained."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import CachedRevisionInfo, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ctxlib import experiment
from ctxlib.commands.network import KNOWN, Network, as_config, count
from ctxlib.models import TOKENIZER_FILES, adapter_base, is_adapter
from ctxlib.params import InputError, Params, locate, nowhere


@dataclass(frozen=True)
class Source:
    """A model's name, place and counts, the bytes still to be downloaded, and its local folder, if there is one."""

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

    Raises InputError for a missing folder or one without a model, and for a hub model of unknown shape.
    """
    name, revision = getattr(params.models, which), params.models.revision_of(which)
    key, folder = f"{params.file}: models.{which}", params.path(name)
    if params.trains(which) and not folder.exists():
        base = find_model(params, "pretrained")
        return Source(name, "not trained yet", base.network, adapter=params.finetune.method != "full")
    if f"models.{which}" in params.missing_inputs():
        raise InputError(f"{key}: {nowhere(name, params.remedy(f'models.{which}'))}")
    if name.startswith(f"{experiment.EMBEDDED}:"):
        folder = Path(experiment.model_path(params, which))
        return Source(name, "embedded", _read(folder, key), folder=folder)
    if not folder.exists():
        return _on_hub(name, revision, key)
    if not is_adapter(folder):
        return Source(name, "local folder", _read(folder, key), folder=folder)
    base = adapter_base(folder)
    found = _on_hub(base, None, key) if locate(base) == "hub" else None
    network, size = (found.network, found.to_download) if found else (_read(Path(base), key), 0)
    return Source(name, f"local adapter over {base}", network, size, folder, adapter=True)


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
    index, weights = files.get("model.safetensors.index.json"), {"model.safetensors"}
    if index:
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    folder = found.snapshot_path if found else None
    if weights <= files.keys():
        return Source(at, "in the hub's cache", network, folder=folder)
    there = sum(file.size_on_disk for file in found.files if file.file_name.endswith(".safetensors")) if found else 0
    where = "partly in the hub's cache" if there else "on the hub"
    return Source(at, where, network, max(0, network.stored_bytes - there), folder)


def cached(name: str, kind: str, revision: str | None) -> CachedRevisionInfo | None:
    """Files in the hub's cache of a "model" or "dataset" at a commit, tag or branch (None: main)."""
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


def _read(folder: Path, key: str) -> Network:
    try:
        return count(as_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{key}: no readable config.json in {folder}; name a model's folder") from error
    except InputError as error:
        raise InputError(f"{key}: {folder}: {error}") from error
