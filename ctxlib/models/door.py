"""The only `from_pretrained` of the project: configurations, tokenizers, models and adapters come through this door.

Nothing of a model's folder is ever run, and no question is asked on standard input. Whatever a loader raises becomes
one line that names the folder. After loading, no weight that the model needs may have been made up: transformers fills
a missing one with random numbers and only logs it.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from ctxlib.conversations import Message
from ctxlib.files import hub_remedy, one_line, read_text
from ctxlib.models.embeddings import resize_with_mean
from ctxlib.models.folders import (
    adapter_base,
    adapter_revision,
    check_adapter_files,
    check_model_files,
    check_tokenizer_files,
    check_weights,
    is_adapter,
    is_local,
    source,
)
from ctxlib.models.weights import check_adapter_is_read, check_complete
from ctxlib.params import InputError, expanded
from ctxlib.roles import Contents, render

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBES = ("One, two; three.", "<s>[INST] a  b [/INST]</s>", "</s>\n<|user|>\nA </s>\n", "  x\n\ny", "ß 東京 🙂")


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
    """If memory runs out in the block, raises InputError with the settings to change.

    `kept` is where finished work lies, which is not done again.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        resume = f"; finished work is kept in {kept}, and a run with less resumes from there" if kept else ""
        raise InputError(f"out of memory ({one_line(error)}): set {settings}{resume}") from error


@contextmanager
def opening(what: str, path: str | Path, revision: str | None = None) -> Iterator[None]:
    """Whatever a loader raises, as one line: TypeError, AttributeError, Rust's exceptions, there is no list."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its report on the weights is replaced by our checks
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        remedy = _remedy(error) if is_local(path) else hub_remedy(str(path), "model", revision, error)
        raise InputError(f"{path}: {what} not loadable: {_reason(error)}; {remedy}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _reason(error: Exception) -> str:
    """What a loader says, on one line: the first sentences of it."""
    words = " ".join(str(error).split()).strip(" .") or "no reason given"
    said = words if len(words) <= 200 else f"{words[:197].rpartition(' ')[0]} …"
    return said if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {said}"


def _remedy(error: Exception) -> str:
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "code of a model's folder is never run here; use a model that transformers knows"
    if "scaled_dot_product_attention" in str(error) or "attn_implementation" in str(error):
        return "set models.attention to eager (--attention eager)"
    if isinstance(error, ImportError):
        return "install what it names, or use a model that needs nothing more"
    return "repair the folder, or fetch the model again"


def load_tokenizer(
    path: str | Path, *, chat_template: str | Path | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer of a local folder or of a hub id, with `chat_template` (a .jinja file or the template itself) if given.

    A tokenizer without a padding token, or whose padding token has no embedding, pads with `unk`, else with `eos`: the
    vocabulary keeps its size, and only the attention mask separates padding from text. An adapter's folder without a
    tokenizer has that of its base model. The pipeline is that of `tokenizer.json`: transformers 5 rebuilds it for some
    classes (`LlamaTokenizer`) into one that gives other ids than those of training.

    Raises InputError for a missing folder, a folder without a tokenizer, one that asks to run code, tokens for which
    the model has no embedding, an unreadable or faulty template.
    """
    if is_adapter(path) and not check_tokenizer_files(path, required=False):
        path, revision = adapter_base(path), revision or adapter_revision(path)
    if is_local(path):
        check_tokenizer_files(path)
    with opening("tokenizer", path, revision):
        tokenizer = AutoTokenizer.from_pretrained(
            source(path), revision=revision, local_files_only=is_local(path), trust_remote_code=False
        )
        if tokenizer.is_fast:
            _keep_pipeline(tokenizer, cached_file(source(path), "tokenizer.json", revision=revision,
                                                  _raise_exceptions_for_missing_entries=False))  # fmt: skip
    _check_fits(tokenizer, path, revision)
    if tokenizer.pad_token is None:
        raise InputError(f"{path}: the tokenizer has no pad, unk or eos token; give it one")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        kind = type(tokenizer.chat_template).__name__
        raise InputError(f"{path}: tokenizer_config.json: chat_template: expected a text, got {kind}; correct it")
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
        require_chat_template(tokenizer)
    return tokenizer


def _keep_pipeline(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Puts the pipeline of `tokenizer.json` back if the loaded one gives other ids."""
    if file is None:
        return
    as_saved = Tokenizer.from_file(file)
    loaded = tokenizer.backend_tokenizer
    if any(
        as_saved.encode(probe, add_special_tokens=False).ids != loaded.encode(probe, add_special_tokens=False).ids
        for probe in _PROBES
    ):
        as_saved.no_padding()
        as_saved.no_truncation()
        tokenizer._tokenizer = as_saved


def _check_fits(tokenizer: PreTrainedTokenizerBase, path: str | Path, revision: str | None) -> None:
    """Chooses a padding token that the model knows. Raises InputError for tokens beyond the model's embeddings."""
    n_rows = None if is_adapter(path) else _vocabulary_size(path, revision)
    beyond = {
        token: number for token, number in tokenizer.get_vocab().items() if n_rows is not None and number >= n_rows
    }
    if tokenizer.pad_token is None or tokenizer.pad_token in beyond:
        beyond.pop(tokenizer.pad_token, None)
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        more = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
        raise InputError(
            f"{path}: its tokenizer knows the token {token!r} as {number}{more}, its model has embeddings for 0 to "
            f"{n_rows - 1} (config.json: vocab_size); take the tokenizer that the model was trained with, or give the "
            "model rows for them (resize_token_embeddings)"
        )


def _vocabulary_size(path: str | Path, revision: str | None) -> int | None:
    """Rows of the embeddings as the configuration has them; None where there is no readable configuration."""
    if is_local(path) and not (expanded(path) / "config.json").is_file():
        return None
    try:
        return load_config(path, revision=revision).vocab_size
    except (InputError, AttributeError):
        return None  # loading the model reports it


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless the tokenizer has a chat template that renders a question and its answer."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; name a .jinja file as models.chat_template"
        )
    render(tokenizer, Contents([Message("user", "question"), Message("assistant", "answer")]), False)


def load_config(path: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """The text model's configuration (of an adapter's base) without its weights, for what can be checked before.

    Raises InputError as `load_model` does for a folder or configuration that it would not load.
    """
    check_weights(path)
    if is_adapter(path):
        path = adapter_base(path)
        check_model_files(path)
    with opening("configuration (config.json)", path, revision):
        config = AutoConfig.from_pretrained(
            source(path), revision=revision, local_files_only=is_local(path), trust_remote_code=False
        )
    _check_quantisation(config, path)
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if isinstance(heads, int) and isinstance(width, int) and not getattr(config, "head_dim", None) and width % heads:
        raise InputError(
            f"{path}: config.json: hidden_size {width} is no multiple of num_attention_heads {heads}; correct one"
        )
    return config


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
) -> nn.Module:
    """Causal language model in eval mode (with an adapter a PeftModel), from a local folder or a hub id.

    Only safetensors are read, and remote code is never run.

    Parameters
    ----------
    path: model folder or hub id; the folder of an adapter stands for its base model together with the adapter, and
        for the revision that it was trained on unless another is given.
    quantisation: "nf4" for 4-bit NormalFloat weights with double quantisation (Dettmers et al. 2023), or None: as the
        checkpoint is.
    adapter: folder of a peft LoRA adapter. Where its tokenizer knows more tokens than the base has embeddings (the
        indicator's), the new rows are the mean of the old ones before the adapter is laid over them.
    device: default "cuda" where there is one, else "cpu".

    Raises InputError for a missing folder, one without config.json or without whole safetensors, weights that are
    missing or have another shape than the configuration says, layers in the files beyond those of the configuration,
    an unknown dtype or quantisation, an unreadable file, what the hub refuses, adapters that are no LoRA or were made
    for another model, and a model that does not fit into memory.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    if quantisation not in (None, "nf4"):
        raise InputError(f"quantisation '{quantisation}': expected 'nf4' or null")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if adapter is None and is_adapter(path):
        revision = revision or adapter_revision(path)
        path, adapter = adapter_base(path), path
    check_model_files(path)
    if adapter is not None and is_local(adapter):
        check_adapter_files(adapter)
    config = load_config(path, revision=revision)
    # None would switch off the checkpoint's own quantisation, so it is not passed
    quantised = {} if quantisation is None else {"quantization_config": _nf4(config, dtype, path)}
    with opening("model", path, revision):
        model, report = AutoModelForCausalLM.from_pretrained(
            source(path),
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            revision=revision,
            local_files_only=is_local(path),
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused with their names
            **quantised,
        )
    check_complete(report, path)
    if getattr(model, "is_quantized", False):
        import bitsandbytes

        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                # An eval-mode forward on AVX512-BF16 processors repacks the weights: gradients are wrong ever after.
                module.support_avx512bf16_for_cpu = False
    return (model if adapter is None else _with_adapter(model, adapter, path)).eval()


def _check_quantisation(config: PreTrainedConfig, path: str | Path) -> None:
    """Raises InputError for a way that transformers does not know: it would read the weights as if unquantised."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return
    method = own.get("quant_method") if isinstance(own, Mapping) else getattr(own, "quant_method", None)
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if getattr(method, "value", method) not in {*known, *AUTO_QUANTIZATION_CONFIG_MAPPING}:
        raise InputError(
            f"{path}: config.json: quantization_config: transformers knows no way of quantising called {method!r}; "
            "take the model without quantisation"
        )


def _nf4(config: PreTrainedConfig, dtype: str, path: str | Path) -> BitsAndBytesConfig:
    own = getattr(config, "quantization_config", None)
    if own is not None:
        how = own.get("quant_method", "some way") if isinstance(own, Mapping) else type(own).__name__
        raise InputError(f"{path}: is quantised already ({how}); leave models.quantisation null (--quantisation)")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )


def _with_adapter(model: PreTrainedModel, adapter: str | Path, path: str | Path) -> nn.Module:
    from peft import PeftModel  # with bitsandbytes a quarter of all time that imports take, and few need it

    resize_with_mean(model, len(load_tokenizer(adapter)))
    try:
        with opening("adapter", adapter), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of missing keys, which are checked below
            laid = PeftModel.from_pretrained(model, source(adapter))
    except InputError as error:
        raise InputError(f"{error} (adapter for {path})") from error
    if is_local(adapter):
        check_adapter_is_read(laid, expanded(adapter) / "adapter_model.safetensors", path)
    return laid


def _template_text(template: str | Path) -> str:
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        return template
    try:
        return read_text(expanded(template), "correct the path, or repair the file")
    except InputError as error:
        raise InputError(f"chat template not readable: {error}") from error
