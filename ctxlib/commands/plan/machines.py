"""A few GPUs, and how long a step takes on one: peak numbers from the makers, with the assumed fraction of each."""

from dataclasses import dataclass

from ctxlib.commands.network import Network
from ctxlib.commands.plan.workload import Step
from ctxlib.params import InputError

UTILISATION = 0.35  # of the peak, in passes over whole texts
BANDWIDTH_USED = 0.6  # of the peak, when answers are generated token by token
SECONDS_PER_LAYER = 0.001  # minimum per generated token: launching a layer's kernels from Python
RESERVED_GIB = 1.5  # for CUDA itself and fragmentation
GIB = 2**30
ASSUMPTIONS = (
    f"{UTILISATION:.0%} of dense peak in passes over texts, {BANDWIDTH_USED:.0%} of the bandwidth and at least "
    f"{1000 * SECONDS_PER_LAYER:g} ms per layer for each generated token, answers of maximum length"
)


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB, dense peak in TFLOP/s (float32 without tensor cores), bandwidth in GB/s."""

    name: str
    memory: int
    bfloat16: int | float
    float32: int | float
    bandwidth: int | float

    @property
    def usable(self) -> float:
        """Bytes."""
        return (self.memory - RESERVED_GIB) * GIB


GPUS = {
    "rtx3090": Gpu("RTX 3090 24 GB", 24, 71, 35.6, 936),
    "rtx4090": Gpu("RTX 4090 24 GB", 24, 165, 82.6, 1008),
    "a100-40": Gpu("A100 40 GB", 40, 312, 19.5, 1555),
    "a6000": Gpu("A6000 48 GB", 48, 155, 38.7, 768),  # the paper's, four of them
    "a100-80": Gpu("A100 80 GB", 80, 312, 19.5, 2039),
    "h100": Gpu("H100 80 GB", 80, 989, 67, 3350),
}


def find_gpu(name: str) -> Gpu:
    """Raises InputError for a GPU that is not in the table."""
    if name.lower() not in GPUS:
        raise InputError(f"--gpu: '{name}' is not in the table; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def seconds(
    step: Step, network: Network, gpu: Gpu, *, weights: int, batch_size: int, dtype: str, passes: int
) -> int | float:
    """Duration of a step; nan if its size is not known.

    Training takes `passes` times the operations of a forward pass. An answer is one pass over its prompt, then for
    each new token of the batch one read of all weights and of the cache.
    """
    peak = UTILISATION * 1e12 * (gpu.float32 if dtype == "float32" and step.what != "training" else gpu.bfloat16)
    if step.what == "training":
        computed = step.padding * step.tokens
        return passes * network.forward_operations(computed, step.attended or step.length, logits=computed) / peak
    operations = network.forward_operations(step.tokens, step.length, logits=step.rows if step.new_tokens else 0)
    cache = network.kv_cache(batch_size, dtype) * step.length
    per_token = max((weights + cache) / (BANDWIDTH_USED * 1e9 * gpu.bandwidth), SECONDS_PER_LAYER * network.layers)
    return operations / peak + step.rows / batch_size * step.new_tokens * per_token
