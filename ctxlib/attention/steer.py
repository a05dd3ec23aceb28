"""Steer attention towards chosen keys, exactly, without the matrix of the pattern."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ctxlib.attention.hook import Head, check_batch, heads_table, listed, registered, widened
from ctxlib.params import InputError, Variant

_FORBIDDEN = -1e3  # of a log weight: its exponential is zero


@contextmanager
def steer_attention(
    model: nn.Module,
    keep: Bool[Tensor, "batch pos"],
    steering_alpha: int | float,
    variant: Variant = "standard",
    heads: Collection[Head] | None = None,
    queries: Bool[Tensor, "batch pos"] | None = None,
    steer_generated: bool | None = None,
) -> Iterator[None]:
    r"""Weight down the attention to all keys but those to `keep`, and renormalise over all keys.

    $$p'_{h,q,k} = \frac{w_k\, p_{h,q,k}}{\sum_j w_j\, p_{h,q,j}}, \qquad
      w_k = 1 \text{ if } k \text{ is kept, else } \alpha$$

    which is $\log\alpha$ added to the scores of the other keys. `steering_alpha` in [0, 1]: 1 changes nothing, 0
    forbids the other keys and changes no query that sees no key to keep. The "standard" variant is the paper's text:
    the same alpha in every layer, generated tokens weighted down. The "authors_code" variant is what the official
    script does: alpha^(l+1) in layer l, the token after each kept stretch kept as well (its span is one too long),
    generated tokens left alone. `steer_generated` overrides the last. `heads`, pairs of layer and head, restrict the
    steering, and so do `queries`, positions of the prompt; the queries of generated tokens are always steered. Works in
    the prompt's pass and in decoding.

    Raises InputError as `record_allocation` does, and for models with soft-capped scores. Reference: Wang et al. 2024,
    section 2.3.
    """
    steering = _Steering(model, keep, steering_alpha, variant, heads, queries, steer_generated)
    if steering_alpha == 1:
        yield
        return
    with registered(model) as hook, listed(hook.steerings, steering):
        yield


class _Steering:
    def __init__(self, model, keep, steering_alpha, variant, heads, queries, steer_generated):
        if not 0 <= steering_alpha <= 1:
            raise InputError(f"steering_alpha is {steering_alpha}; it must be in [0, 1], lower for more emphasis")
        if variant not in ("standard", "authors_code"):
            raise InputError(f"variant is {variant!r}; give 'standard' or 'authors_code'")
        self.keep = keep | F.pad(keep, (1, -1)) if variant == "authors_code" else keep
        self.log_alpha = math.log(steering_alpha) if steering_alpha else _FORBIDDEN
        self.compounds = variant == "authors_code"
        self.steers_head = heads_table(model, heads)
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
        check_batch(query, len(self.keep))
        log_weight = max(self.log_alpha * (layer + 1 if self.compounds else 1), _FORBIDDEN)
        bias = self._bias(key.shape[2], log_weight / scaling, key.dtype, key.device)
        steered = self.steers_head[layer].to(query)[None, :, None, None] * self._steered(query, first_query)
        return (
            widened(query, steered.expand(len(query), -1, query.shape[2], 2)),
            widened(key, bias[:, None].expand(-1, key.shape[1], -1, -1)),
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
