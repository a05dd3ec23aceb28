"""Record the fraction of attention that falls on each role, without the matrix of the pattern."""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ctxlib.attention.hook import FUSED_WIDTH, Hook, Stop, check_batch, checked, registered, unwrapped
from ctxlib.params import InputError
from ctxlib.roles import ROLES

Rows = Int[Tensor, "batch row"] | Literal["last", "all"]
Precision = Literal["model", "exact"]
_BLOCK_ELEMENTS = 2**21  # float32 scores held at a time: 8 MB
_BLOCK_ELEMENTS_CUDA = 2**23  # 32 MB: there, few large blocks are faster
_ROUNDING = 2**-6  # sums of a row this near to one are one, but for the rounding of half precision


@contextmanager
def record_allocation(
    model: nn.Module,
    roles: Int[Tensor, "batch pos"],
    rows: Rows = "last",
    layers: Sequence[int] | None = None,
    turns: Int[Tensor, "batch pos"] | None = None,
    stop_after: int | None = None,
    names: Sequence[str] = ROLES,
    precision: Precision = "model",
) -> Iterator["Recording"]:
    r"""Record the fraction of attention that chosen query positions pay to each role, as float32.

    $$A_{r,h,q} = \sum_{k : \text{role}(k) = r} p_{h,q,k}, \qquad \sum_r A_{r,h,q} = 1$$

    `roles` holds one `Role` per token, -1 on padding (left or right); for another grouping (`Groups.ids`), `names` are
    its groups. `rows` are the queries: the last token of each example, all of them, or a table of positions, -1 for
    none. Rows of padding are zero, all others sum to one. With `turns` (`RoleBatch.turns`) the recording also splits
    every role by turn. `stop_after` ends the forward pass at that layer's attention pattern: the call then returns an
    output without logits. A new forward pass over the prompt replaces the recording. In `generate` the decoding steps
    follow as more rows (not for a table of positions), their tokens counted as the group "assistant", or as none if no
    group has that name.

    There are two ways to compute it, with one result. A few rows are computed in float32, in addition to the model's
    own attention, whose output stays as it is. If more than half of the rows are wanted, the roles become further
    columns of the values, in the same fused call (`route` says which): the output then agrees with the unrecorded one
    to rounding.

    `precision` matters for the second way and models in half precision only. With "model" the sums are computed in the
    model's dtype, by the fast kernels: in bfloat16 they are off by 2.5e-4 in the mean and by 0.004 at most, and each
    row still sums to one. With "exact" they are computed in a float32 call of their own, off by 1e-6; on a GPU it takes
    about 15 times as long as the attention itself.

    Raises InputError for ill-shaped input and for attention that cannot be attributed to roles: attention sinks,
    position biases, an encoder's that looks ahead, and a sliding window that has dropped keys from the cache; reading
    what was recorded, for layers without attention, as hybrid models have them. Reference: Wang et al. 2024,
    section 2.2.
    """
    if precision not in ("model", "exact"):
        raise InputError(f"precision is {precision!r}; give 'model' or 'exact'")
    recording = Recording(model, roles, rows, layers, turns, stop_after, names, precision)
    with ExitStack() as stack:
        hook = stack.enter_context(registered(model))
        if stop_after is not None:
            stack.enter_context(_stoppable(model))
        stack.enter_context(unwrapped(model).get_decoder().register_forward_pre_hook(recording.model_called))
        hook.recordings.append(recording)
        stack.callback(hook.recordings.remove, recording)
        yield recording


def verify_recording(
    model: nn.Module,
    input_ids: Int[Tensor, "batch pos"],
    roles: Int[Tensor, "batch pos"],
    layers: Sequence[int] | None = None,
    precision: Precision = "exact",
) -> float:
    """The largest absolute difference between the recorder and the model's own eager `output_attentions`.

    Of all layers, or of `layers`: of a hybrid model all those with attention (`Recording.layers_with_attention`), as it
    returns eager patterns of no others. About 1e-6 in float32; in half precision it is the rounding of the eager path.
    Holds the full patterns: short input. Raises InputError as `record_allocation` does, and for a model that returns no
    eager pattern for some of these layers.
    """
    model = unwrapped(model)
    backend = model.config._attn_implementation
    if isinstance(ALL_ATTENTION_FUNCTIONS.get(backend), Hook):
        raise InputError("the model is being recorded or steered; call verify_recording outside that block")
    roles = roles.to(input_ids.device)
    inputs = {"input_ids": input_ids, "attention_mask": (roles >= 0).long(), "use_cache": False}
    with torch.inference_mode():
        with record_allocation(model, roles, rows="all", layers=layers, precision=precision) as recording:
            model(**inputs)
        allocation = recording.allocation
        model.set_attn_implementation("eager")
        try:
            attentions = getattr(model(**inputs, output_attentions=True), "attentions", None) or ()
            patterns = [pattern for pattern in attentions if pattern is not None]
        finally:
            model.set_attn_implementation(backend)
        if len(patterns) != len(allocation):
            returned = f"returns {len(patterns)} eager patterns for {len(allocation)} layers"
            raise InputError(f"this {model.config.model_type} model {returned}; the recording cannot be verified")
        columns = _columns(roles, len(ROLES))
        real = (roles >= 0)[:, None, :, None]
        expected = torch.stack([(p.float() @ columns[:, None]).where(real, 0) for p in patterns])
        return (allocation - expected).abs().max().item()


def route(model: nn.Module, n_groups: int = len(ROLES)) -> str:
    """One line: how `record_allocation` computes all rows of this model, and what that costs.

    n_groups: columns to record, roles times turns.
    """
    model = unwrapped(model)
    config, half = model.config.get_text_config(), model.dtype in (torch.float16, torch.bfloat16)
    head = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    dtype = str(model.dtype).removeprefix("torch.")
    if n_groups > head:
        return f"beside the model's attention, in float32: {n_groups} groups are more than the {head} columns of a head"
    if model.config._attn_implementation == "eager":
        return "through the model's eager attention, which holds tokens × tokens per head: use short prompts"
    wide = head + n_groups + -(head + n_groups) % 8
    ways = f"one fused call in {dtype}, heads of {head} widened to {wide} by {n_groups} groups"
    if wide > FUSED_WIDTH:
        ways = f"two fused calls in {dtype}, as {wide} columns exceed {FUSED_WIDTH}: attention takes twice as long"
    if half or model.device.type == "cpu":
        return ways
    return f"{ways}; no flash kernel takes {dtype}: about 15 times slower than bfloat16 (models.dtype)"


class Recording:
    """Role allocations of one forward pass and of the decoding steps after it, on the device of `roles`."""

    def __init__(self, model, roles, rows, layers, turns, stop_after, names=ROLES, precision="model"):
        if turns is not None and turns.shape != roles.shape:
            raise InputError(f"turns are {tuple(turns.shape)}, roles {tuple(roles.shape)}; give one turn a token")
        depth = model.config.get_text_config().num_hidden_layers
        if stop_after is not None:
            depth = checked("stop_after", [stop_after], depth)[0] + 1
        self.layers = checked("layer", layers, depth)
        self.stop_after = stop_after
        self._model_type = model.config.model_type
        self._called = False
        self._with_attention: set[int] = set()
        self._prompt = roles.shape
        self._real = roles >= 0
        self._n_turns = 1 if turns is None else int(turns.max()) + 1
        turns = torch.zeros_like(roles) if turns is None else turns
        self._n_groups = len(names)
        self._group = torch.where(self._real, turns * self._n_groups + roles, -1)
        last_turn = turns.amax(dim=1, keepdim=True) * self._n_groups
        generated = names.index("assistant") if "assistant" in names else None
        self._generated_group = torch.full_like(last_turn, -1) if generated is None else last_turn + generated
        self._follows = isinstance(rows, str)
        self._every = self._follows and rows == "all"
        self._exact = precision == "exact"
        self._rows, self._reach = self._positions(rows)
        self._call: tuple[tuple, _Call] | None = None
        self._steps: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    @property
    def allocation(self) -> Float32[Tensor, "layer batch head row role"]:
        """Fraction of attention in [0, 1] on each role or group; rows in the order asked for, then decoding steps."""
        return self.by_turn[..., 0, :] if self._n_turns == 1 else self.by_turn.sum(dim=-2)

    @property
    def by_turn(self) -> Float32[Tensor, "layer batch head row turn role"]:
        """The same, split by the turn of the key; a single turn if no `turns` were given."""
        if missing := [layer for layer, steps in self._steps.items() if not steps]:
            raise InputError(self._why_not(missing))
        prompt, *later = (_closed(torch.stack(of_step)) for of_step in zip(*self._steps.values(), strict=True))
        prompt.masked_fill_((self._rows < 0)[:, None, :, None], 0)
        grouped = torch.cat([prompt, *later], dim=3) if later else prompt
        return grouped.unflatten(-1, (self._n_turns, self._n_groups))

    @property
    def layers_with_attention(self) -> list[int]:
        """Those of the layers that were run whose attention can be recorded, asked for or not."""
        return sorted(self._with_attention)

    def model_called(self, *_: Any) -> None:
        self._called = True

    def _why_not(self, missing: list[int]) -> str:
        if not self._called:
            return "nothing was recorded; call the model inside the record_allocation block"
        nothing = f"this {self._model_type} model has no attention that can be recorded"
        if not self._with_attention:
            return f"{nothing}; use another model"
        return f"{nothing} in layers {missing}; choose one of {self.layers_with_attention}"

    def _positions(self, rows) -> tuple[Int[Tensor, "batch row"], list[int]]:
        """The positions, -1 for none and for padding; and the last one of each column, known without asking a GPU."""
        batch, length = self._prompt
        every = torch.arange(length, device=self._real.device).expand(batch, length)
        if isinstance(rows, Tensor):
            if rows.ndim != 2 or len(rows) != batch or (rows >= length).any() or (rows < -1).any():
                raise InputError(f"rows must be a (batch, row) table of positions below {length}, or -1 for none")
            reach, positions = rows.amax(dim=0).tolist(), rows.to(every.device)
        else:
            if not self._real.any(dim=1).all():
                raise InputError("an example has no tokens: all of its roles are -1")
            if rows not in ("last", "all"):
                raise InputError(f"rows is {rows!r}; give 'last', 'all' or a table of positions")
            reach = list(range(length)) if rows == "all" else [length - 1]
            positions = every if rows == "all" else every.where(self._real, -1).amax(dim=1, keepdim=True)
        return positions.where(self._real.gather(1, positions.clamp(min=0)), -1), reach

    def wanted(self, layer: int, query: Tensor, key: Tensor, first_query: int) -> "_Wanted | None":
        """What is to be recorded of this call; None for nothing."""
        self._with_attention.add(layer)
        if layer not in self._steps:
            return None
        batch, length = self._prompt
        queries = query.shape[2]
        check_batch(query, batch)
        if first_query == 0:
            if queries != length:
                raise InputError(f"the model was given {queries} positions, roles have {length}; keep the cache on")
            self._steps[layer].clear()
        elif first_query < length:
            raise InputError("the prompt came in several chunks; record it in one forward pass")
        elif not self._follows:
            return None
        place = first_query, queries, key.shape[2], query.device
        if self._call is None or self._call[0] != place:  # the layers of one pass share it
            self._call = place, self._of_call(*place)
        return _Wanted(self._steps[layer], self._rows.device, self._exact, *self._call[1])

    def _of_call(self, first_query: int, queries: int, keys: int, device: torch.device) -> "_Call":
        length = self._prompt[1]
        later = self._generated_group.expand(-1, max(keys - length, 0))
        columns = _columns(torch.cat([self._group, later], dim=1), self._n_turns * self._n_groups).to(device)
        if first_query == 0:
            index = None if self._every else self._rows.clamp(min=0).to(device)
            return _Call(index, columns, len(self._reach), self._reach)
        return _Call(None, columns, queries, list(range(first_query, first_query + queries)))


class _Call(NamedTuple):
    """What the layers of one pass share: places of the rows among the queries, None for all; the keys' groups."""

    index: Int[Tensor, "batch row"] | None
    columns: Float32[Tensor, "batch key_pos group"]
    n_rows: int
    reach: list[int]


@dataclass(eq=False)
class _Wanted:
    """Rows of one attention call, and where their sums are kept."""

    kept: list[Tensor]
    device: torch.device
    exact: bool
    index: Int[Tensor, "batch row"] | None
    columns: Float32[Tensor, "batch key_pos group"]
    n_rows: int
    reach: list[int]

    def keep_chosen(self, grouped: Float[Tensor, "batch head query_pos group"]) -> None:
        """The sums of all queries, of which the wanted rows are kept."""
        if self.index is not None:
            grouped = torch.take_along_dim(grouped, self.index[:, None, :, None], dim=2)
        self.kept.append(grouped.to(self.device).contiguous())  # of a view, the whole output would be kept

    def compute(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """In addition to the model's own attention."""
        every = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
        index = every if self.index is None else self.index
        grouped = _grouped_pattern(query, key, mask, index, self.columns, scaling, softcap, self.reach)
        self.kept.append(grouped.to(self.device))

    def rides(self, query: Tensor, value: Tensor) -> bool:
        """Many rows and few groups: cheaper as more columns of the values than in addition."""
        many = query.shape[2] > 1 and 2 * self.n_rows > query.shape[2]
        return many and self.columns.shape[2] <= value.shape[3]


def _closed(sums: Float[Tensor, "*axes group"]) -> Float32[Tensor, "*axes group"]:
    """As float32; the largest sum of each row in half precision, which is rounded most, is one minus all others."""
    if sums.dtype == torch.float32:
        return sums
    sums = sums.float()
    missing = 1 - sums.sum(dim=-1, keepdim=True)
    missing.masked_fill_(missing.abs() > _ROUNDING, 0)  # tokens without a group are seen, too
    return sums.scatter_add_(-1, sums.argmax(dim=-1, keepdim=True), missing)


def _columns(groups: Int[Tensor, "batch key_pos"], n: int) -> Float32[Tensor, "batch key_pos group"]:
    """One-hot columns; none for -1."""
    return (groups[..., None] == torch.arange(n, device=groups.device)).float()


@torch.no_grad()
def _grouped_pattern(
    query: Float[Tensor, "batch head query_pos width"],
    key: Float[Tensor, "batch kv_head key_pos width"],
    mask: Bool[Tensor, "#batch #head query_pos key_pos"] | Float[Tensor, "#batch #head query_pos key_pos"] | None,
    rows: Int[Tensor, "batch row"],
    columns: Float32[Tensor, "batch key_pos group"],
    scaling: float,
    softcap: float | None,
    reach: Sequence[int] | None = None,
) -> Float32[Tensor, "batch head row group"]:
    """softmax(scores) @ columns for some rows of the pattern, in float32 and in blocks of rows.

    Rows count from the first query; without a mask the query at i sees keys 0..i, or all of them if it is the only one.
    `reach` holds the last row of each column of `rows`, so that a GPU need not be asked for it.
    """
    batch, heads, queries, _ = query.shape
    keys = key.float().transpose(-1, -2)
    reach = rows.amax(dim=0).tolist() if reach is None else reach
    elements = _BLOCK_ELEMENTS if key.device.type == "cpu" else _BLOCK_ELEMENTS_CUDA
    per_block = max(1, elements // (batch * heads * key.shape[2]))
    causal = mask is None and queries > 1
    blocks = []
    for number, block in enumerate(rows.split(per_block, dim=1)):
        index = block[:, None, :, None]
        last = max(reach[number * per_block : (number + 1) * per_block])
        visible = max(last, 0) + 1 if causal else key.shape[2]
        chosen = torch.take_along_dim(query, index, dim=2).float() * scaling
        scores = chosen.reshape(batch, key.shape[1], -1, chosen.shape[-1]) @ keys[..., :visible]
        scores = scores.view(batch, heads, -1, visible)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            scores.masked_fill_(torch.arange(visible, device=index.device) > index, -math.inf)
        elif mask is not None:
            chosen_mask = torch.take_along_dim(mask.expand(batch, -1, -1, -1), index, dim=2)
            is_bool = mask.dtype == torch.bool
            scores = scores.masked_fill_(~chosen_mask, -math.inf) if is_bool else scores + chosen_mask.float()
        blocks.append(scores.softmax(dim=-1) @ columns[:, None, :visible])
    return torch.cat(blocks, dim=2)


@contextmanager
def _stoppable(model: nn.Module) -> Iterator[None]:
    """The model, or its decoder, returns an empty output if a layer stopped the pass."""
    model = unwrapped(model)
    inside = False

    def returning_early(forward, empty):
        @functools.wraps(forward)
        def stopped(*args, **kwargs):
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            if kwargs.get("past_key_values") is not None:
                raise InputError("stop_after leaves nothing to generate from; use it with a plain forward call")
            inside = True
            try:
                return forward(*args, **kwargs)
            except Stop:
                return empty()
            finally:
                inside = False

        return stopped

    with ExitStack() as stack:
        for module, empty in ((model, CausalLMOutputWithPast), (model.get_decoder(), BaseModelOutputWithPast)):
            had_own, forward = "forward" in vars(module), module.forward
            module.forward = returning_early(forward, empty)
            stack.callback(*(setattr, module, "forward", forward) if had_own else (delattr, module, "forward"))
        yield
