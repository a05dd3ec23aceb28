"""What the benchmarks share: a random Llama, calls timed in turns, the peak of memory, a table and a line."""

import argparse
import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
    "tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
DTYPES = ("float32", "bfloat16")
HEADS = {"tiny": (4, 2), "small": (12, 4), "tinyllama": (32, 4), "llama-3-8b": (32, 8)}


def arguments(
    description: str, *, dtype: str | tuple[str, ...] | None, repeats: int | None = None, device: str = "cpu"
) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks have in common and these defaults; None: the script has no such option.

    Where the default `dtype` is a tuple, several may be given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    if dtype is not None:
        parser.add_argument("--dtype", choices=DTYPES, default=dtype, nargs="+" if isinstance(dtype, tuple) else None)
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def random_llama(
    shape: str = "small",
    dtype: str = "float32",
    device: str = "cpu",
    heads: tuple[int, int] | None = None,
    attention: str = "sdpa",
) -> LlamaForCausalLM:
    """A Llama of random weights; `heads`: query heads and key-value heads."""
    n_heads, n_kv_heads = heads or HEADS[shape]
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        vocab_size=32000,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    return model.eval()


def in_turns(
    ways: dict[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seconds and peaks of memory (MiB) of every way, one row a repeat, after a first round to warm up.

    The ways take turns, so that what slows the machine slows them all.
    """
    rounds = []
    for _ in range(repeats + 1):
        rounds.append({name: measured(way, device)[1:] for name, way in ways.items()})
    taken = pd.DataFrame(rounds[1:])
    return taken.map(lambda pair: pair[0]), taken.map(lambda pair: pair[1])


def measured(way: Callable[[], object], device: str = "cpu") -> tuple[object, float, float]:
    """What one call returns, its seconds, and the most memory in MiB that it held above what was held before.

    Memory on the CPU is read from /proc, so on Linux only.
    """
    before = _reset_peak(device)
    _wait(device)
    began = time.perf_counter()
    result = way()
    _wait(device)
    took = time.perf_counter() - began
    return result, took, _peak(device) - before


def _reset_peak(device: str) -> float:
    """The memory held now, in MiB, from which on the peak is counted."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") / 1024


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else _status("VmHWM") / 1024


def model_mib(model: torch.nn.Module) -> float:
    """Memory of the weights in MiB."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else f"{_cpu()}, {torch.get_num_threads()} threads"


def report(table: pd.DataFrame, **figures: float) -> None:
    """Print where it ran, the table, and the figures as the last line."""
    print(f"{device_name('cuda' if torch.cuda.is_available() else 'cpu')}; torch {torch.__version__}\n")
    print(table.to_string(index=False, float_format=lambda value: f"{value:,.3f}"), end="\n\n")
    print(" ".join(f"{name}={value:.3g}" for name, value in figures.items()))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
