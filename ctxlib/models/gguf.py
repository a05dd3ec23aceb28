"""From a GGUF file (llama.cpp's format) to a model folder, once: dequantised, with its tokenizer and chat template."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ctxlib.files import AGAIN, check_is_itself, disk_space, file_digest, make_folder, one_line, write
from ctxlib.models.door import opening
from ctxlib.params import InputError, expanded

MAGIC = b"GGUF"
_PLAIN = ("F32", "F16", "BF16", "F64")


def convert_gguf(file: str | Path, folder: str | Path, *, sha256: str | None = None) -> list[str]:
    """Writes the model of a GGUF file to `folder` in transformers' format, in float32; the lines of a short report.

    The folder holds safetensors, configuration, tokenizer and chat template as in the file, and a README.md with the
    file's sha256, its licence as it states it, and what the quantisation has lost. It appears whole or not at all.

    sha256: refuse a file with another one.

    Raises InputError for a file that is absent, cut short, damaged, no GGUF or another one than expected, for an
    architecture that transformers does not read, for weights that cannot be dequantised, and for a folder in use.
    """
    file, folder = expanded(file), expanded(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; remove it, or name another folder")
    digest = _checked_digest(file, sha256)
    facts, kinds = _read_facts(file)
    with opening("GGUF file", file), disk_space(folder):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32
        )
    _forget_quantiser(model)
    make_folder(folder.parent)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with disk_space(folder):
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            write(beside / "README.md", _card(file, digest, facts, kinds))
            if folder.is_dir():
                folder.rmdir()
            beside.chmod(0o755)  # temporary folders are private, and so are files of safetensors
            for made in beside.iterdir():
                made.chmod(0o644)
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [
        f"{file.name}: sha256 {digest}",
        f"{model.config.model_type}, {model.num_parameters():,} parameters, of which {_in_words(kinds)}",
        f"written to {folder}, in float32; see its README.md",
    ]


def _checked_digest(file: Path, sha256: str | None) -> str:
    if not file.is_file():
        raise InputError(f"{file}: no such file; name a .gguf file")
    check_is_itself(file)
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise InputError(f"{file}: not a GGUF file (it does not begin with 'GGUF'); name a .gguf file")
    digest = file_digest(file)
    if sha256 is not None and digest != sha256.lower():
        raise InputError(f"{file}: its sha256 is {digest}, expected {sha256}; {AGAIN}")
    return digest


def _read_facts(file: Path) -> tuple[dict[str, str], Counter[str]]:
    """What the file says of itself, and how many weights it holds of each type.

    Raises InputError for a file that is cut short, and for weights or an architecture that cannot be read.
    """
    import gguf  # takes long to import, and few need it
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("general.")}
    except Exception as error:  # numpy's, of reading behind the end: there is no list
        raise InputError(f"{file}: cut short or damaged ({one_line(error)}); {AGAIN}") from error
    architecture = str(fields.get("general.architecture"))
    known = {name.replace("_", "").replace("-", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("_", "").replace("-", "") not in known:
        raise InputError(
            f"{file}: transformers does not read the architecture '{architecture}' from GGUF, only "
            f"{', '.join(GGUF_SUPPORTED_ARCHITECTURES)}; fetch the model's safetensors"
        )
    kinds: Counter[str] = Counter()
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in kinds:
            _check_dequantised(file, tensor)
        kinds[kind] += int(tensor.n_elements)
    return {name.removeprefix("general."): str(value) for name, value in fields.items()}, kinds


def _check_dequantised(file: Path, tensor) -> None:
    import gguf

    try:
        gguf.quants.dequantize(np.asarray(tensor.data[:1]), tensor.tensor_type)
    except (NotImplementedError, KeyError, ValueError) as error:
        raise InputError(
            f"{file}: {tensor.name}: weights of type {tensor.tensor_type.name} cannot be dequantised; take a file of "
            "another quantisation (Q8_0, Q4_K, F16, …)"
        ) from error


def _forget_quantiser(model) -> None:
    """Transformers refuses to save what it believes to be quantised; the weights are plain float32 by now."""
    model.hf_quantizer = None
    model.is_quantized = False
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def _in_words(kinds: Counter[str]) -> str:
    total = sum(kinds.values())
    return ", ".join(f"{n / total:.1%} were stored as {kind}" for kind, n in kinds.most_common())


def _card(file: Path, digest: str, facts: dict[str, str], kinds: Counter[str]) -> str:
    import gguf

    def bits(kind: str) -> str:
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        return f"{8 * size / weights:.2f}"

    rows = [f"| {kind} | {n:,} | {bits(kind)} |" for kind, n in kinds.most_common()]
    quantised = [kind for kind in kinds if kind not in _PLAIN]
    lost = (
        f"**What was lost.** The file holds most weights rounded ({', '.join(quantised)}): of each block of weights, a "
        "few evenly or unevenly spaced values. The original weights are not in it and cannot be had back: this folder "
        "holds the rounded values, in float32. Its answers are those of the quantised model, not of the published one."
        if quantised
        else "The file's weights are not quantised: nothing was lost."
    )
    lines = [
        f"# {facts.get('name', file.stem)}",
        "",
        f"Made by `ctxlib gguf` from `{file.name}`, {file.stat().st_size:,} bytes, sha256 `{digest}`.",
        "",
        f"Architecture: {facts['architecture']}. Licence, as the file states it: {facts.get('license', 'not stated')}. "
        "Tokenizer and chat template are those of the file.",
        "",
        lost,
        "",
        "| stored as | weights | bits per weight |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"
