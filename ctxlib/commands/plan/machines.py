"""Classes of GPUs, and how long a step would take on one: peak numbers of their maker, and what is assumed of them."""

from dataclasses import dataclass

from ctxlib.commands.plan.network import Network
from ctxlib.commands.plan.steps import Step

UTILISATION = 0.35  # of the peak, in passes over whole texts
BANDWIDTH_USED = 0.6  # of the peak, when answers are written token by token
SECONDS_PER_LAYER = 0.001  # at least, for each token that is written: the time to launch a layer's kernels from Python
RESERVED_GIB = 1.5  # for CUDA itself and fragmentation
GIB = 2**30


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

    def operations_per_second(self, dtype: str) -> float:
        return UTILISATION * 1e12 * (self.float32 if dtype == "float32" else self.bfloat16)


GPUS = (
    Gpu("RTX 3090 24 GB", 24, 71, 35.6, 936),
    Gpu("RTX 4090 24 GB", 24, 165, 82.6, 1008),
    Gpu("A100 40 GB", 40, 312, 19.5, 1555),
    Gpu("A6000 48 GB", 48, 155, 38.7, 768),  # the paper's, four of them
    Gpu("A100 80 GB", 80, 312, 19.5, 2039),
    Gpu("H100 80 GB", 80, 989, 67, 3350),
)
ASSUMPTIONS = (
    f"one GPU; {UTILISATION:.0%} of its dense peak in passes over texts, {BANDWIDTH_USED:.0%} of its bandwidth and at "
    f"least {1000 * SECONDS_PER_LAYER:g} ms a layer for each token written, answers as long as allowed; "
    f"{RESERVED_GIB:g} GiB reserved"
)


def seconds(
    step: Step, network: Network, gpu: Gpu, *, weights: int, batch_size: int, dtype: str, passes: int
) -> int | float:
    """How long a step takes; nan where its size is not known.

    Training takes so many `passes`, each with the operations of a forward one. An answer is a pass over its prompt,
    then for each new token of the batch one reading of all weights and of the cache.
    """
    if step.kind == "train":
        computed = step.padding * step.tokens
        operations = network.forward_operations(computed, step.attended or step.length, logits=computed)
        return passes * operations / gpu.operations_per_second("bfloat16")
    operations = network.forward_operations(step.tokens, step.length, logits=step.rows if step.new_tokens else 0)
    reading = operations / gpu.operations_per_second(dtype)
    if not step.new_tokens:
        return reading
    cache = network.kv_cache(batch_size, dtype) * step.length
    read = (weights + cache) / (BANDWIDTH_USED * 1e9 * gpu.bandwidth)
    batches = step.rows / batch_size
    return reading + batches * step.new_tokens * max(read, SECONDS_PER_LAYER * network.layers)
