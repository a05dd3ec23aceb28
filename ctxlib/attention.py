r"""Record and steer the attention of an unchanged causal language model, and what its heads hand on.

The context managers register one attention function with transformers for as long as they are open:

    with steer_attention(model, keep, steering_alpha=0.95), record_allocation(model, roles) as recording:
        model(input_ids, attention_mask=attention_mask)
    recording.allocation  # layer batch head row role

They may be nested in any order; what is recorded is always the steered attention.
"""

import math
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import count
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ctxlib.params import InputError
from ctxlib.roles import ROLES, Role

Rows = Int[Tensor, "batch row"] | Literal["last", "all"]
Head = tuple[int, int]  # layer, head
_BLOCK_ELEMENTS = 2**21  # float32 scores held at a time: 8 MB
_FORBIDDEN = -1e3  # of a log weight: its exponential is zero
_numbers = count()


@contextmanager
def record_allocation(
    model: nn.Module,
    roles: Int[Tensor, "batch pos"],
    rows: Rows = "last",
    layers: Sequence[int] | None = None,
    turns: Int[Tensor, "batch pos"] | None = None,
    stop_after: int | None = None,
) -> Iterator["Recording"]:
    r"""Record the fraction of attention that chosen query positions pay to each role, in float32.

    $$A_{r,h,q} = \sum_{k : \text{role}(k) = r} p_{h,q,k}, \qquad \sum_r A_{r,h,q} = 1$$

    `roles` holds a `Role` a token, -1 on padding (left or right). `rows` are the queries: the last token of each
    example, all of them, or a table of positions, -1 for none. Rows of padding are zero, all others sum to one. With
    `turns` (`RoleBatch.turns`) the recording also splits every role by turn. `stop_after` ends the forward pass at
    that layer's attention pattern: the call then returns an output without logits. A new forward pass over the prompt
    replaces what was recorded. In `generate` the decoding steps follow as more rows (not for a table of positions),
    their tokens counted as the assistant's.

    Two ways, one result. A few rows are computed beside the model's own attention, whose output stays as it is. Where
    more than half of the rows are wanted, the roles ride along as further columns of the values, in one float32 call:
    the output then agrees with the unrecorded one to rounding (of half precision, in half precision).

    Raises InputError for ill-shaped input and for attention that cannot be told by role: attention sinks, position
    biases, an encoder's that looks ahead, and a sliding window that has dropped keys from the cache; reading what was
    recorded, for layers without attention, as hybrid models have them. Reference: Wang et al. 2024, section 2.2.
    """
    recording = Recording(model, roles, rows, layers, turns, stop_after)
    with ExitStack() as stack:
        hook = stack.enter_context(_registered(model))
        if stop_after is not None:
            stack.enter_context(_stoppable(model))
        stack.enter_context(_unwrapped(model).get_decoder().register_forward_pre_hook(recording.model_called))
        hook.recordings.append(recording)
        stack.callback(hook.recordings.remove, recording)
        yield recording


@contextmanager
def steer_attention(
    model: nn.Module,
    keep: Bool[Tensor, "batch pos"],
    steering_alpha: int | float,
    reading: Literal["clean", "paper"] = "clean",
    heads: Collection[Head] | None = None,
    queries: Bool[Tensor, "batch pos"] | None = None,
    steer_generated: bool | None = None,
) -> Iterator[None]:
    r"""Weight down the attention to all keys but those to `keep`, and renormalise over all keys.

    $$p'_{h,q,k} = \frac{w_k\, p_{h,q,k}}{\sum_j w_j\, p_{h,q,j}}, \qquad
      w_k = 1 \text{ if } k \text{ is kept, else } \alpha$$

    which is $\log\alpha$ added to the scores of the other keys. `steering_alpha` in [0, 1]: 1 changes nothing, 0
    forbids the other keys and changes no query that sees no key to keep. The "clean" reading is the paper's text: the
    same alpha in every layer, generated tokens weighted down. The "paper" reading is what the official script does:
    alpha^(l+1) in layer l, generated tokens left alone. `steer_generated` overrides the latter. `heads`, pairs of layer
    and head, restrict the steering, and so do `queries`, positions of the prompt; the queries of generated tokens are
    always steered. Works in the prompt's pass and in decoding.

    Raises InputError as `record_allocation` does, and for models with soft-capped scores. Reference: Wang et al. 2024,
    section 2.3.
    """
    steering = _Steering(model, keep, steering_alpha, reading, heads, queries, steer_generated)
    if steering_alpha == 1:
        yield
        return
    with _registered(model) as hook, _listed(hook.steerings, steering):
        yield


@contextmanager
def record_outputs(model: nn.Module, rows: Int[Tensor, "batch row"]) -> Iterator["HeadOutputs"]:
    r"""Record what every head hands on at chosen positions: $z_{h,q} = \sum_k p_{h,q,k} v_{h,k}$.

    Before the output projection, which sums the heads up. `rows` is a table of positions, -1 for none, whose outputs
    are zero. One pass over the prompt, not `generate` (InputError); another pass replaces what was recorded. What is
    recorded is what `steer_attention` and `patch_outputs` make of it, where they were opened before.
    """
    outputs = HeadOutputs(model, rows)
    with _registered(model) as hook, _listed(hook.outputs, outputs):
        yield outputs


@contextmanager
def patch_outputs(
    model: nn.Module,
    outputs: Float[Tensor, "layer batch row head width"],
    rows: Int[Tensor, "batch row"],
    heads: Collection[Head],
) -> Iterator[None]:
    """Let `heads`, pairs of layer and head, hand on `outputs` at `rows` instead of their own, and all else as it was.

    Both as `record_outputs` has them, of the same model in another condition or of another model of this shape: then
    the n-th row here stands for the n-th row there. One pass over the prompt, not `generate` (InputError). This is
    activation patching (Vig et al. 2020; Meng et al. 2022, causal tracing).
    """
    patch = HeadOutputs(model, rows, outputs, heads)
    with _registered(model) as hook, _listed(hook.outputs, patch):
        yield


def verify_recording(
    model: nn.Module,
    input_ids: Int[Tensor, "batch pos"],
    roles: Int[Tensor, "batch pos"],
    layers: Sequence[int] | None = None,
) -> float:
    """The largest absolute difference between the recorder and the model's own eager `output_attentions`.

    Of all layers, or of `layers`: of a hybrid model all those with attention (`Recording.layers_with_attention`), as it
    returns eager patterns of no others. About 1e-6 in float32; in half precision it is the rounding of the eager path.
    Holds the full patterns: short input. Raises InputError as `record_allocation` does, and for a model that returns no
    eager pattern for some of these layers.
    """
    model = _unwrapped(model)
    backend = model.config._attn_implementation
    if isinstance(ALL_ATTENTION_FUNCTIONS.get(backend), _Attention):
        raise InputError("the model is being recorded or steered; call verify_recording outside that block")
    roles = roles.to(input_ids.device)
    inputs = {"input_ids": input_ids, "attention_mask": (roles >= 0).long(), "use_cache": False}
    with torch.inference_mode():
        with record_allocation(model, roles, rows="all", layers=layers) as recording:
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


class Recording:
    """Role allocations of one forward pass and of the decoding steps after it, on the device of `roles`."""

    def __init__(self, model, roles, rows, layers, turns, stop_after):
        if turns is not None and turns.shape != roles.shape:
            raise InputError(f"turns are {tuple(turns.shape)}, roles {tuple(roles.shape)}; give one turn a token")
        depth = model.config.num_hidden_layers
        if stop_after is not None:
            depth = _checked("stop_after", [stop_after], depth)[0] + 1
        self.layers = _checked("layer", layers, depth)
        self.stop_after = stop_after
        self._model_type = model.config.model_type
        self._called = False
        self._with_attention: set[int] = set()
        self._prompt = roles.shape
        self._real = roles >= 0
        self._n_turns = 1 if turns is None else int(turns.max()) + 1
        turns = torch.zeros_like(roles) if turns is None else turns
        self._group = torch.where(self._real, turns * len(ROLES) + roles, -1)
        self._generated_group = turns.amax(dim=1, keepdim=True) * len(ROLES) + Role.ASSISTANT
        self._follows = isinstance(rows, str)
        self._rows = self._positions(rows)
        self._steps: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    @property
    def allocation(self) -> Float32[Tensor, "layer batch head row role"]:
        """Fraction of attention in [0, 1] on each of `ROLES`; rows in the order asked for, then decoding steps."""
        return self.by_turn.sum(dim=-2)

    @property
    def by_turn(self) -> Float32[Tensor, "layer batch head row turn role"]:
        """The same, split by the turn of the key; a single turn where no `turns` were given."""
        if missing := [layer for layer, steps in self._steps.items() if not steps]:
            raise InputError(self._why_not(missing))
        grouped = torch.stack([torch.cat(steps, dim=2) for steps in self._steps.values()])
        return grouped.unflatten(-1, (self._n_turns, len(ROLES)))

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

    def _positions(self, rows) -> Int[Tensor, "batch row"]:
        batch, length = self._prompt
        every = torch.arange(length, device=self._real.device).expand(batch, length)
        if isinstance(rows, Tensor):
            if rows.ndim != 2 or len(rows) != batch or (rows >= length).any() or (rows < -1).any():
                raise InputError(f"rows must be a (batch, row) table of positions below {length}, or -1 for none")
            return rows.to(every.device)
        if not self._real.any(dim=1).all():
            raise InputError("an example has no tokens: all of its roles are -1")
        if rows not in ("last", "all"):
            raise InputError(f"rows is {rows!r}; give 'last', 'all' or a table of positions")
        return every if rows == "all" else every.where(self._real, -1).amax(dim=1, keepdim=True)

    def wanted(self, layer: int, query: Tensor, key: Tensor, first_query: int) -> "_Wanted | None":
        """What is to be recorded of this call; None for nothing."""
        self._with_attention.add(layer)
        if layer not in self._steps:
            return None
        batch, length = self._prompt
        queries = query.shape[2]
        _check_batch(query, batch)
        if first_query == 0:
            if queries != length:
                raise InputError(f"the model was given {queries} positions, roles have {length}; keep the cache on")
            self._steps[layer].clear()
            rows = self._rows.where(self._real.gather(1, self._rows.clamp(min=0)), -1)
        elif first_query < length:
            raise InputError("the prompt came in several chunks; record it in one forward pass")
        elif self._follows:
            rows = torch.arange(first_query, first_query + queries, device=self._real.device).expand(batch, -1)
        else:
            return None
        later = self._generated_group.expand(-1, max(key.shape[2] - length, 0))
        columns = _columns(torch.cat([self._group, later], dim=1), self._n_turns * len(ROLES))
        index = (rows - first_query).clamp(min=0)
        return _Wanted(self._steps[layer], rows, index.to(query.device), columns.to(query.device))


@dataclass(eq=False)
class _Wanted:
    """Rows of one attention call, -1 for none; their places among its queries; the groups of its keys, one-hot."""

    kept: list[Tensor]
    rows: Int[Tensor, "batch row"]
    index: Int[Tensor, "batch row"]
    columns: Float32[Tensor, "batch key_pos group"]

    def keep(self, grouped: Float32[Tensor, "batch head row group"]) -> None:
        self.kept.append(grouped.to(self.rows.device).where((self.rows >= 0)[:, None, :, None], 0))

    def rides(self, query: Tensor, value: Tensor) -> bool:
        """Many rows and few groups: cheaper as more columns of the values than beside them."""
        many = query.shape[2] > 1 and 2 * self.rows.shape[1] > query.shape[2]
        return many and self.columns.shape[2] <= value.shape[3]


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
) -> Float32[Tensor, "batch head row group"]:
    """softmax(scores) @ columns for some rows of the pattern, in float32 and in blocks of rows.

    Rows count from the first query; without a mask the query at i sees keys 0..i, or all of them if it is the only one.
    """
    batch, heads, queries, _ = query.shape
    keys = key.float().transpose(-1, -2)
    blocks = []
    for block in rows.split(max(1, _BLOCK_ELEMENTS // (batch * heads * key.shape[2])), dim=1):
        index = block[:, None, :, None]
        causal = mask is None and queries > 1
        visible = int(block.max()) + 1 if causal else key.shape[2]
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


class _Steering:
    def __init__(self, model, keep, steering_alpha, reading, heads, queries, steer_generated):
        if not 0 <= steering_alpha <= 1:
            raise InputError(f"steering_alpha is {steering_alpha}; it must be in [0, 1], lower for more emphasis")
        if reading not in ("clean", "paper"):
            raise InputError(f"reading is {reading!r}; give 'clean' or 'paper'")
        self.keep = keep
        self.log_alpha = math.log(steering_alpha) if steering_alpha else _FORBIDDEN
        self.compounds = reading == "paper"
        self.steers_head = _heads(model, heads)
        if queries is not None and queries.shape != keep.shape:
            raise InputError(f"queries are {tuple(queries.shape)}, keep {tuple(keep.shape)}; give both a place a token")
        self.queries = queries
        self.steer_generated = not self.compounds if steer_generated is None else steer_generated
        self._shared: tuple = (None, None)

    def steer(
        self,
        layer: int,
        query: Float[Tensor, "batch head query_pos width"],
        key: Float[Tensor, "batch kv_head key_pos width"],
        scaling: float,
        first_query: int,
    ) -> tuple[Float[Tensor, "batch head query_pos wider"], Float[Tensor, "batch kv_head key_pos wider"]]:
        """Two more dimensions, whose product is the bias: causal kernels and grouped queries stay as they are.

        The bias is split in two, so that half precision holds it to twice its digits.
        """
        if not self.steers_head[layer].any():
            return query, key
        _check_batch(query, len(self.keep))
        log_weight = max(self.log_alpha * (layer + 1 if self.compounds else 1), _FORBIDDEN)
        bias = self._bias(key.shape[2], log_weight / scaling, key.dtype, key.device)
        steered = self.steers_head[layer].to(query)[None, :, None, None] * self._steered(query, first_query)
        return (
            _widened(query, steered.expand(len(query), -1, query.shape[2], 2)),
            _widened(key, bias[:, None].expand(-1, key.shape[1], -1, -1)),
        )

    def _steered(self, query: Tensor, first_query: int) -> Float[Tensor, "#batch 1 #query_pos 1"]:
        """1 for the queries that are steered, else 0."""
        if self.queries is None:
            return query.new_ones(1, 1, 1, 1)
        chosen = self.queries[:, first_query : first_query + query.shape[2]].to(query)
        return F.pad(chosen, (0, query.shape[2] - chosen.shape[1]), value=1)[:, None, :, None]

    def _bias(self, keys: int, log_weight: float, dtype, device) -> Float[Tensor, "batch key_pos 2"]:
        """The bias, split in two; the layers of one pass mostly share it."""
        if self._shared[0] != (keys, log_weight, dtype):
            generated = keys - self.keep.shape[1]
            if generated < 0:
                raise InputError(f"keep has {self.keep.shape[1]} positions, but the model saw only {keys}")
            keep = F.pad(self.keep.to(device), (0, generated), value=not self.steer_generated)
            bias = torch.where(keep, 0.0, log_weight)
            high = bias.to(dtype)
            low = (bias - high).to(dtype)
            self._shared = (keys, log_weight, dtype), torch.stack([high, low], dim=-1)
        return self._shared[1].to(device)


class HeadOutputs:
    """What the heads hand on at chosen rows of one forward pass; with a `source`, what some of them hand on instead."""

    def __init__(self, model, rows, source=None, heads=()):
        self._rows = rows
        self._patched = _heads(model, heads)
        self._source = source
        self._found: dict[int, Tensor] = {}
        if source is not None and (len(source) != len(self._patched) or source.shape[1:3] != rows.shape):
            shape, layers = tuple(source.shape), len(self._patched)
            raise InputError(f"outputs are {shape}; for {layers} layers and these rows they start with {layers}, "
                             f"{', '.join(map(str, rows.shape))}: record both alike")  # fmt: skip

    @property
    def outputs(self) -> Float[Tensor, "layer batch row head width"]:
        """In the order of the rows asked for; zero where there was none."""
        if not self._found:
            raise InputError("nothing was recorded; call the model inside the record_outputs block")
        return torch.stack([self._found[layer] for layer in sorted(self._found)])

    def hand_on(
        self, layer: int, own: Float[Tensor, "batch query_pos head width"], first_query: int
    ) -> Float[Tensor, "batch query_pos head width"]:
        """The heads' outputs, patched where there is a source, else noted and as they are."""
        _check_batch(own, len(self._rows))
        if first_query or own.shape[1] <= self._rows.max():
            raise InputError("head outputs are recorded and patched in one pass over the whole prompt; do not generate")
        rows = self._rows.to(own.device)
        if self._source is None:
            taken = torch.take_along_dim(own.detach(), rows.clamp(min=0)[..., None, None], dim=1)
            self._found[layer] = taken.where((rows >= 0)[..., None, None], 0)
            return own
        example, row = torch.nonzero(rows >= 0, as_tuple=True)
        heads = torch.nonzero(self._patched[layer])[:, 0].to(own.device)
        place = example[:, None], rows[example, row][:, None], heads[None]
        own = own.clone()
        own[place] = self._source[layer].to(own)[example[:, None], row[:, None], heads[None]]
        return own


class _Attention:
    """The registered function: steer, then record, then compute as the model's own backend does, then hand on."""

    def __init__(self, model):
        self.model_type = model.config.model_type
        backend = model.config._attn_implementation
        self.backend = "sdpa" if "flash" in backend or "flex" in backend else backend
        if self.backend not in AttentionMaskInterface():
            raise InputError(f"attention {backend!r} has no mask function; register one with AttentionMaskInterface")
        self.own_mask = AttentionMaskInterface()[self.backend]
        self.steerings: list[_Steering] = []
        self.recordings: list[Recording] = []
        self.outputs: list[HeadOutputs] = []
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
        layer, width = module.layer_idx, value.shape[-1]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        for steering in self.steerings:
            query, key = steering.steer(layer, query, key, scaling, self.first_query)
        wanted = [w for r in self.recordings if (w := r.wanted(layer, query, key, self.first_query)) is not None]
        riders = [w for w in wanted if w.rides(query, value)]
        for beside in (w for w in wanted if w not in riders):
            softcap = kwargs.get("softcap")
            of_rows = _grouped_pattern(query, key, attention_mask, beside.index, beside.columns, scaling, softcap)
            beside.keep(of_rows)
        stops = [r.stop_after is not None and r.stop_after <= layer for r in self.recordings]
        if stops and all(stops):
            value, width = value[..., :0], 0
            if not riders:
                raise _Stop

        dtype = value.dtype
        if riders:
            ridden = [rider.columns[:, None].expand(-1, key.shape[1], -1, -1) for rider in riders]
            value = _widened(value.float(), *ridden)
        tensors = [
            _at_width(tensor, max(query.shape[-1], value.shape[-1]), value.dtype) for tensor in (query, key, value)
        ]
        output, pattern = self._own_function(module)(module, *tensors, attention_mask, scaling=scaling, **kwargs)
        sizes = [rider.columns.shape[2] for rider in riders]
        own, *grouped, _ = output.split([width, *sizes, output.shape[-1] - width - sum(sizes)], dim=-1)
        for rider, groups in zip(riders, grouped, strict=True):
            groups = groups.detach().transpose(1, 2)
            rider.keep(torch.take_along_dim(groups, rider.index[:, None, :, None], dim=2))
        if not width:
            raise _Stop
        own = own.to(dtype)
        for outputs in self.outputs:
            own = outputs.hand_on(layer, own, self.first_query)
        return own, pattern

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
                raise InputError(f"{self.model_type} has {what}, which cannot be told by role; use another model")
        if kwargs.get("softcap") is not None and self.steerings:
            raise InputError(f"{self.model_type} caps its attention scores and cannot be steered; use another model")


def _at_width(tensor: Float[Tensor, "*axes _"], width: int, dtype: torch.dtype) -> Float[Tensor, "*axes {width}"]:
    """Zeros on the right: fused kernels want queries, keys and values of one width."""
    return F.pad(tensor.to(dtype), (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor.to(dtype)


def _widened(tensor: Float[Tensor, "*axes width"], *more: Float[Tensor, "*axes _"]) -> Float[Tensor, "*axes wider"]:
    """More columns on the right, and zeros up to a multiple of 8, as fused kernels like it."""
    width = tensor.shape[-1] + sum(columns.shape[-1] for columns in more)
    zeros = tensor.new_zeros(1).expand(*tensor.shape[:-1], -width % 8)
    return torch.cat([tensor, *more, zeros], dim=-1)


class _Stop(Exception):
    """Ends a forward pass early."""


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _registered(model: nn.Module) -> Iterator[_Attention]:
    """The model with our attention function, the one of the enclosing block where there is one."""
    model = _unwrapped(model)
    backend = model.config._attn_implementation
    enclosing = ALL_ATTENTION_FUNCTIONS.get(backend)
    if isinstance(enclosing, _Attention):
        yield enclosing
        return
    hook = _Attention(model)
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
def _listed(those: list, one: Any) -> Iterator[None]:
    """In the list for as long as the block runs."""
    those.append(one)
    try:
        yield
    finally:
        those.remove(one)


@contextmanager
def _stoppable(model: nn.Module) -> Iterator[None]:
    """The model, or its decoder, returns an empty output where a layer stopped the pass."""
    model = _unwrapped(model)
    inside = False

    def returning_early(forward, empty):
        @wraps(forward)
        def stopped(*args, **kwargs):
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            if kwargs.get("past_key_values") is not None:
                raise InputError("stop_after leaves nothing to generate from; use it with a plain forward call")
            inside = True
            try:
                return forward(*args, **kwargs)
            except _Stop:
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


def _checked(what: str, chosen: Sequence[int] | None, n: int) -> list[int]:
    """The chosen indices in order, all where none were chosen."""
    for index in chosen or ():
        if not 0 <= index < n:
            raise InputError(f"{what} {index} does not exist here; give 0 to {n - 1}")
    return list(range(n)) if chosen is None else sorted(set(chosen))


def _heads(model: nn.Module, chosen: Collection[Head] | None) -> Bool[Tensor, "layer head"]:
    """True for the chosen heads; for all of them where none were chosen."""
    config = model.config
    table = torch.full((config.num_hidden_layers, config.num_attention_heads), chosen is None)
    for layer, head in chosen or ():
        _checked("layer", [layer], len(table))
        _checked("head", [head], table.shape[1])
        table[layer, head] = True
    return table


def _check_batch(query: Tensor, batch: int) -> None:
    if query.shape[0] != batch:
        raise InputError(f"the model was given {query.shape[0]} examples instead of {batch}; do without beams")
