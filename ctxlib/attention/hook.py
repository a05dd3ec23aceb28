"""The one attention function that is registered with transformers while a recording, steering or patch is open.

It sees recordings, steerings and patches through protocols only: their modules import this one, and it imports none of
them.
"""

import functools
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ctxlib.params import InputError

Head = tuple[int, int]  # layer, head
FUSED_WIDTH = 256  # the widest head that a fused kernel takes; natively grouped queries end there, too
_numbers = count()


class Stop(Exception):
    """Ends a forward pass early."""


@runtime_checkable
class Wanted(Protocol):
    """Rows of one attention call that are to be recorded."""

    columns: Float32[Tensor, "batch key_pos group"]
    exact: bool

    def rides(self, query: Tensor, value: Tensor) -> bool: ...

    def compute(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> None: ...

    def keep_chosen(self, grouped: Float[Tensor, "batch head query_pos group"]) -> None: ...


@runtime_checkable
class Records(Protocol):
    """A recording, as the hook knows it."""

    stop_after: int | None

    def wanted(self, layer: int, query: Tensor, key: Tensor, first_query: int) -> Wanted | None: ...


@runtime_checkable
class Steers(Protocol):
    """A steering, as the hook knows it."""

    def steer(
        self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, first_query: int
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...


@runtime_checkable
class ChangesOutputs(Protocol):
    """Outputs of heads that are recorded or replaced, as the hook knows them."""

    def head_outputs(
        self, layer: int, own: Float[Tensor, "batch query_pos head width"], first_query: int
    ) -> Float[Tensor, "batch query_pos head width"]: ...


class Hook:
    """The registered function: steer, then record, then compute as the model's own backend does, then patch."""

    def __init__(self, model):
        self.model_type = model.config.model_type
        backend = model.config._attn_implementation
        self.backend = "sdpa" if "flash" in backend or "flex" in backend else backend
        if self.backend not in AttentionMaskInterface():
            raise InputError(f"attention {backend!r} has no mask function; register one with AttentionMaskInterface")
        self.own_mask = AttentionMaskInterface()[self.backend]
        self.steerings: list[Steers] = []
        self.recordings: list[Records] = []
        self.outputs: list[ChangesOutputs] = []
        self.first_query: int | None = None

    def mask(self, *args: Any, q_offset: Any = 0, kv_offset: Any = 0, **kwargs: Any) -> Tensor | None:
        if kv_offset:
            raise InputError(
                f"{self.model_type}: its sliding window has dropped keys from the cache; use a shorter prompt"
            )
        self.first_query = int(q_offset)
        return self.own_mask(*args, q_offset=q_offset, kv_offset=kv_offset, **kwargs)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        self._refuse_unknown(module, kwargs)
        layer = module.layer_idx
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        for steering in self.steerings:
            query, key, attention_mask = steering.steer(layer, query, key, attention_mask, scaling, self.first_query)
        wanted = [w for r in self.recordings if (w := r.wanted(layer, query, key, self.first_query)) is not None]
        riders = [w for w in wanted if w.rides(query, value)]
        for beside in (w for w in wanted if w not in riders):
            beside.compute(query, key, attention_mask, scaling, kwargs.get("softcap"))
        stops = [r.stop_after is not None and r.stop_after <= layer for r in self.recordings]
        stopping = bool(stops) and all(stops)
        if stopping and not riders:
            raise Stop
        kwargs |= {"scaling": scaling}
        own, pattern = self._attend(
            module, query, key, value[..., :0] if stopping else value, riders, attention_mask, kwargs
        )
        if stopping:
            raise Stop
        for outputs in self.outputs:
            own = outputs.head_outputs(layer, own, self.first_query)
        return own, pattern

    def _attend(self, module, query, key, value, riders: list[Wanted], mask, kwargs):
        """The model's own output and pattern, and to each rider the sums of its groups.

        values   v v v v v v v v b s u a t . . .    one call; queries and keys get zeros up to this width, too
                 v v v v v v v v  |  b s u a t . . .    two: if that is too wide, or only the sums are to be exact
        """
        call = functools.partial(self._own_call, module, query, key, mask, kwargs)
        if not riders:
            return call(value)
        width, dtype = value.shape[-1], value.dtype
        precision = torch.float32 if any(rider.exact for rider in riders) else dtype
        columns = [rider.columns.to(precision)[:, None].expand(-1, key.shape[1], -1, -1) for rider in riders]
        sizes = [of_one.shape[-1] for of_one in columns]
        too_wide = max(query.shape[-1], width + sum(sizes)) > FUSED_WIDTH
        if width and self.backend != "eager" and (too_wide or precision != dtype):
            own, pattern = call(value)
            sums, _ = call(widened(*columns))
        else:
            output, pattern = call(widened(value.to(precision), *columns))
            own, sums = output[..., :width].to(dtype), output[..., width:]
        for rider, of_one in zip(riders, sums.detach()[..., : sum(sizes)].split(sizes, dim=-1), strict=True):
            rider.keep_chosen(of_one.transpose(1, 2))
        return own, pattern

    def _own_call(self, module, query, key, mask, kwargs, value):
        """The model's own attention function, all of its inputs in one width and in the values' dtype."""
        width = max(query.shape[-1], value.shape[-1])
        query, key, widest = (at_width(tensor, width, value.dtype) for tensor in (query, key, value))
        output, pattern = self._own_function(module)(module, query, key, widest, mask, **kwargs)
        return output[..., : value.shape[-1]], pattern

    def _own_function(self, module):
        if self.backend == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.backend]

    def _refuse_unknown(self, module, kwargs):
        if not getattr(module, "is_causal", True):
            raise InputError(f"{self.model_type} attends to later tokens and is no causal model; use another model")
        if self.first_query is None:
            raise InputError(f"{self.model_type}: give a (batch, pos) attention mask, not a prepared one")
        for name, what in (("s_aux", "attention sinks"), ("position_bias", "a position bias")):
            if kwargs.get(name) is not None:
                raise InputError(
                    f"{self.model_type} has {what}, which cannot be attributed to roles; use another model"
                )
        if kwargs.get("softcap") is not None and self.steerings:
            raise InputError(f"{self.model_type} caps its attention scores and cannot be steered; use another model")


def at_width(tensor: Float[Tensor, "*axes _"], width: int, dtype: torch.dtype) -> Float[Tensor, "*axes {width}"]:
    """Zeros on the right: fused kernels want queries, keys and values of one width."""
    return F.pad(tensor.to(dtype), (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor.to(dtype)


def widened(tensor: Float[Tensor, "*axes width"], *more: Float[Tensor, "*axes _"]) -> Float[Tensor, "*axes wider"]:
    """More columns on the right, and zeros up to a multiple of 8, the widths that fused kernels take."""
    width = tensor.shape[-1] + sum(columns.shape[-1] for columns in more)
    zeros = tensor.new_zeros(1).expand(*tensor.shape[:-1], -width % 8)
    return torch.cat([tensor, *more, zeros], dim=-1)


def unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def registered(model: nn.Module) -> Iterator[Hook]:
    """The model with our attention function: that of the enclosing block if there is one."""
    model = unwrapped(model)
    backend = model.config._attn_implementation
    enclosing = ALL_ATTENTION_FUNCTIONS.get(backend)
    if isinstance(enclosing, Hook):
        yield enclosing
        return
    hook = Hook(model)
    name = f"ctxlib_{next(_numbers)}"
    AttentionInterface.register(name, hook)
    AttentionMaskInterface.register(name, hook.mask)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise InputError(f"{hook.model_type} does not take a registered attention function; use another model")
        yield hook
    finally:
        model.set_attn_implementation(backend)
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


@contextmanager
def listed(those: list, one: Any) -> Iterator[None]:
    """Keeps one thing in the list while the block runs."""
    those.append(one)
    try:
        yield
    finally:
        those.remove(one)


def checked(what: str, chosen: Sequence[int] | None, n: int) -> list[int]:
    """The chosen indices in order; all if none were chosen."""
    for index in chosen or ():
        if not 0 <= index < n:
            raise InputError(f"{what} {index} does not exist here; give 0 to {n - 1}")
    return list(range(n)) if chosen is None else sorted(set(chosen))


def heads_table(model: nn.Module, chosen: Collection[Head] | None) -> Bool[Tensor, "layer head"]:
    """True for the chosen heads; for all of them if none were chosen."""
    config = model.config.get_text_config()
    table = torch.full((config.num_hidden_layers, config.num_attention_heads), chosen is None)
    for layer, head in chosen or ():
        checked("layer", [layer], len(table))
        checked("head", [head], table.shape[1])
        table[layer, head] = True
    return table


def check_batch(query: Tensor, batch: int) -> None:
    if query.shape[0] != batch:
        raise InputError(f"the model was given {query.shape[0]} examples instead of {batch}; generate without beams")
