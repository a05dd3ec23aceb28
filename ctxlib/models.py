"""The only `from_pretrained` of the project: tokenizers, models, 4-bit weights, adapters and the indicator's token."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import pandas as pd
import torch
from jaxtyping import Float
from jinja2 import TemplateError
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctxlib.files import check_is_itself, check_safetensors, hub_remedy, one_line, read_json_object, read_text
from ctxlib.params import InputError, locate, nowhere

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Subject:
    """A model that is asked questions, with its tokenizer, its name, and the key of its answers in a cache.

    key: a hash of the model's files (`model_hash`), so that a retrained model is asked again.
    """

    name: str
    model: torch.nn.Module
    tokenizer: Any
    key: str


@contextmanager
def memory_advice(settings: str, kept: str | Path | None = None) -> Iterator[None]:
    """Where memory runs out in the block, raises InputError with the settings to change.

    `kept` is where finished work lies, which is not done again.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        go_on = f"; what is finished lies in {kept}, a run with less goes on from there" if kept else ""
        raise InputError(f"out of memory ({one_line(error)}): set {settings}{go_on}") from error


def load_tokenizer(
    path: str | Path, *, chat_template: str | Path | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer of a local folder or of a hub id, with `chat_template` (a .jinja file or the template itself) if given.

    A tokenizer without a padding token pads with `unk`, else with `eos`: the vocabulary keeps its size, and padding is
    told from text by the attention mask alone.

    Raises InputError for a missing folder, a folder without a tokenizer, an unreadable or faulty template.
    """
    if is_local(path):
        folder = _folder(path)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(f"{path}: no tokenizer there (looked for {', '.join(TOKENIZER_FILES)})")
        _check_tokenizer_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(path), revision=revision, local_files_only=is_local(path))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable("tokenizer", path, revision, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(f"{path}: the tokenizer has no pad, unk or eos token; give it one")
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
        require_chat_template(tokenizer)
    return tokenizer


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless the tokenizer has a chat template that renders a question and its answer."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; name a .jinja file as models.chat_template"
        )
    turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        tokenizer.apply_chat_template(turn, tokenize=False)
    except TemplateError as error:
        raise InputError(f"{tokenizer.name_or_path}: the chat template is faulty: {one_line(error)}") from error


def load_config(path: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """The text model's configuration (of an adapter's base) without its weights, for what can be checked before.

    Raises InputError as `load_model` does for a folder or configuration that it would not load.
    """
    check_weights(path)
    if is_adapter(path):
        path = adapter_base(path)
        _check_model_files(path)
    try:
        config = AutoConfig.from_pretrained(
            _source(path), revision=revision, local_files_only=is_local(path), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable("model", path, revision, error) from error
    return config.get_text_config()


@memory_advice("models.dtype to bfloat16, or models.quantisation to nf4 (--dtype, --quantisation)")
def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    quantisation: str | None = None,
    attention: str = "sdpa",
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Causal language model in eval mode, from a local folder or a hub id; safetensors only, never remote code.

    Parameters
    ----------
    path: model folder or hub id; the folder of an adapter stands for its base model together with the adapter, and
        for the revision that it was trained on unless another is given.
    quantisation: "nf4" for 4-bit NormalFloat weights with double quantisation (Dettmers et al. 2023), or None.
    adapter: folder of a peft adapter. Where its tokenizer knows more tokens than the base has embeddings (the
        indicator's), the new rows are the mean of the old ones before the adapter is laid over them.
    device: default "cuda" where there is one, else "cpu".

    Raises InputError for a missing folder, one without config.json or without whole safetensors, an unknown dtype or
    quantisation, an unreadable file, what the hub refuses, and a model that does not fit into memory.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    if quantisation not in (None, "nf4"):
        raise InputError(f"quantisation '{quantisation}': expected 'nf4' or null")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if adapter is None and is_adapter(path):
        revision = revision or _base_of(path)[1]
        path, adapter = adapter_base(path), path
    _check_model_files(path)
    if adapter is not None and is_local(adapter):
        _check_adapter_files(adapter)
    config = None
    if quantisation == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _source(path),
            dtype=DTYPES[dtype],
            quantization_config=config,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            revision=revision,
            local_files_only=is_local(path),
            device_map={"": device},
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _not_loadable("model", path, revision, error) from error
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # An eval-mode forward on AVX512-BF16 processors repacks the weights and gradients are wrong ever after.
            module.support_avx512bf16_for_cpu = False
    if adapter is not None:
        _resize_with_mean(model, len(load_tokenizer(adapter)))
        try:
            model = PeftModel.from_pretrained(model, _source(adapter))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{adapter}: adapter not loadable onto {path}: {one_line(error)}") from error
    return model.eval()


def add_indicator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indicator: str = "[IND]") -> int:
    """Makes `indicator` one token, in place, and returns its id; its rows are the mean of the embeddings.

    The mean is over the rows of the tokenizer's own tokens, in the input and in the output embedding (paper: "an
    additional special token"; the mean as in the official script). No random number is drawn.

    Raises InputError if the text is a token already.
    """
    n_tokens = len(tokenizer)
    indicator_id = add_indicator_token(tokenizer, indicator)
    set_indicator_row(model, indicator_id, n_tokens)
    return indicator_id


def add_indicator_token(tokenizer: PreTrainedTokenizerBase, indicator: str) -> int:
    """The tokenizer's half of `add_indicator`."""
    if not indicator.strip():
        raise InputError("indicator: expected a text such as '[IND]', got an empty one")
    if indicator in tokenizer.get_vocab():
        where = "was added already" if indicator in tokenizer.get_added_vocab() else "is in the vocabulary"
        raise InputError(
            f"{tokenizer.name_or_path}: '{indicator}' {where} as token {tokenizer.convert_tokens_to_ids(indicator)}; "
            "take the base model's own tokenizer, or another indicator"
        )
    tokenizer.add_tokens([AddedToken(indicator, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(indicator)


def set_indicator_row(model: PreTrainedModel, indicator_id: int, n_tokens: int) -> None:
    """The model's half of `add_indicator`: the indicator's rows become the mean of the first `n_tokens` rows."""
    _resize_with_mean(model, indicator_id + 1)
    with torch.no_grad():
        for embedding in _embeddings(model):
            embedding.weight[indicator_id] = embedding.weight[:n_tokens].float().mean(0).to(embedding.weight.dtype)


def _resize_with_mean(model: PreTrainedModel, n_tokens: int) -> None:
    n_rows = model.get_input_embeddings().weight.shape[0]
    if n_tokens <= n_rows:
        return
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    with torch.no_grad():
        for embedding in _embeddings(model):
            embedding.weight[n_rows:] = embedding.weight[:n_rows].float().mean(0).to(embedding.weight.dtype)


def embedding_changes(
    before: torch.nn.Module, after: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> pd.DataFrame:
    """What fine-tuning did to the embeddings: embedding ("input", "output"), rows, changed, tokens, distance, typical.

    changed: number of rows that differ between the two models. tokens: the tokens of the first five of them.
    distance: the largest Euclidean distance between a row before and after. typical: the median distance of a row
    from the mean of all rows before. Rows are what the models compute with, so those of an adapter are seen.
    """
    counts = []
    for name in ("input", "output"):
        old, new = (_rows(model, name) for model in (before, after))
        moved = (new - old).norm(dim=1)
        changed = moved.nonzero().flatten().tolist()
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(changed[:5])) + (", …" if len(changed) > 5 else "")
        typical = (old - old.mean(0)).norm(dim=1).median()
        counts.append((name, len(old), len(changed), tokens, moved.max().item(), typical.item()))
    return pd.DataFrame(counts, columns=["embedding", "rows", "changed", "tokens", "distance", "typical"])


@torch.no_grad()
def _rows(model: torch.nn.Module, which: str) -> Float[Tensor, "token width"]:
    """The rows of an embedding as its layer computes with them, adapters included."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    n_tokens, width = inputs.weight.shape
    if which == "input":
        return inputs(torch.arange(n_tokens, device=model.device)).float()
    return outputs(torch.eye(width, dtype=model.dtype, device=model.device)).float().T


def _embeddings(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Input and output embedding; once where they are tied."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return [inputs] if outputs is None or outputs.weight is inputs.weight else [inputs, outputs]


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
        else:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def is_local(path: str | Path) -> bool:
    """False for a hub id, see `locate`; True for everything on this machine, and for paths that do not exist."""
    return locate(path) != "hub"


def is_adapter(path: str | Path) -> bool:
    """True for a local folder that holds a peft adapter."""
    return is_local(path) and (Path(path).expanduser() / "adapter_config.json").is_file()


def trained_over(path: str | Path) -> str | None:
    """The quantisation of the weights below an adapter that `finetune` wrote: nf4 after QLoRA. None for all else."""
    record = Path(path).expanduser() / "finetune.json"
    if not (is_adapter(path) and record.is_file()):
        return None
    return "nf4" if json.loads(record.read_text(encoding="utf-8"))["method"] == "qlora" else None


def adapter_base(path: str | Path) -> str:
    """Name or folder of the model that an adapter was trained on; InputError for a folder that is not there."""
    return _base_of(path)[0]


def _base_of(adapter: str | Path) -> tuple[str, str | None]:
    """The model that an adapter was trained on, and its revision."""
    config = _adapter_config(adapter)
    base = config["base_model_name_or_path"]
    if is_local(base) and not Path(base).expanduser().exists():
        raise InputError(
            f"{adapter}/adapter_config.json: base_model_name_or_path: "
            + nowhere(base, "the adapter was trained on it: put that model there, or correct the key")
        )
    return base, config.get("revision")


def _adapter_config(adapter: str | Path) -> dict[str, Any]:
    file = Path(adapter).expanduser() / "adapter_config.json"
    config = read_json_object(file)
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise InputError(f"{file}: not the configuration of an adapter: it names no base_model_name_or_path")
    return config


def check_weights(path: str | Path) -> None:
    """Raises InputError for a local model or adapter with files that are missing, cut short or something else."""
    _check_adapter_files(path) if is_adapter(path) else _check_model_files(path)


def _check_model_files(path: str | Path) -> None:
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
    if there:
        return [folder / name for name in there]
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]
    found = f"only {', '.join(pickled)}, which can run code" if pickled else "no weights"
    raise InputError(f"{folder}: no *.safetensors there, {found}; save it again with save_pretrained")


def _check_adapter_files(adapter: str | Path) -> None:
    if not is_adapter(adapter):
        raise InputError(f"{adapter}: no adapter there (adapter_config.json is missing)")
    _adapter_config(adapter)
    check_safetensors([Path(adapter).expanduser() / "adapter_model.safetensors"])


def _check_tokenizer_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    for name in ("vocab.json", "tokenizer.model", "merges.txt", "chat_template.jinja"):
        check_is_itself(folder / name)


def _not_loadable(what: str, path: str | Path, revision: str | None, error: Exception) -> InputError:
    remedy = "" if is_local(path) else f"; {hub_remedy(str(path), 'model', revision, error)}"
    return InputError(f"{path}: {what} not loadable: {one_line(error)}{remedy}")


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(nowhere(path))
    if not folder.is_dir():
        raise InputError(f"{path}: a file; give a model's folder, or a hub id such as 'owner/name'")
    return folder


def _source(path: str | Path) -> str:
    """Absolute where local: it is what an adapter remembers as its base, wherever it is loaded from."""
    return str(Path(path).expanduser().resolve()) if is_local(path) else str(path)


def _template_text(template: str | Path) -> str:
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        return template
    try:
        return read_text(Path(template).expanduser(), "correct the path, or repair the file")
    except InputError as error:
        raise InputError(f"chat template not readable: {error}") from error
