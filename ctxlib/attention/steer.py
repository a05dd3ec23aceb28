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
        self.heads = heads_table(model, heads).tolist()
        if queries is not None and queries.shape != keep.shape:
            raise InputError(f"queries are {tuple(queries.shape)}, keep {tuple(keep.shape)}; give both a place a token")
        self.queries = queries
        self.steer_generated = not self.compounds if steer_generated is None else steer_generated
        self._made: dict[tuple, Tensor] = {}  # what layers and steps share
        self._of_step: tuple[Tensor | None, int] = (None, 0)
        self._masks: dict[tuple, Tensor] = {}  # of this decoding step

    def steer(
        self,
        layer: int,
        query: Float[Tensor, "batch head query_pos width"],
        key: Float[Tensor, "batch kv_head key_pos width"],
        mask: Tensor | None,
        scaling: float,
        first_query: int,
    ) -> tuple[
        Float[Tensor, "batch head query_pos wider"], Float[Tensor, "batch kv_head key_pos wider"], Tensor | None
    ]:
        """The prompt: two more dimensions, whose product is the bias; decoding: the bias as a mask.

        So causal kernels and grouped queries stay as they are for the prompt, and no cached key is copied in decoding.
        The bias is split in two in either case, so that half precision holds it to twice its digits.
        """
        heads = tuple(self.heads[layer])
        if not any(heads):
            return query, key, mask
        check_batch(query, len(self.keep))
        log_weight = max(self.log_alpha * (layer + 1 if self.compounds else 1), _FORBIDDEN)
        decoding = query.shape[2] == 1 and first_query >= self.keep.shape[1]
        if decoding and (mask is None or mask.dtype == torch.bool):
            return query, key, self._as_mask(mask, key.shape[2], log_weight, heads, key.dtype, key.device)
        bias = self._bias(key.shape[2], log_weight / scaling, key.dtype, key.device)
        steered = self._head_column(heads, query) * self._steered(query, first_query)
        return (
            widened(query, steered.expand(len(query), -1, query.shape[2], 2)),
            widened(key, bias[:, None].expand(-1, key.shape[1], -1, -1)),
            mask,
        )

    def _head_column(self, heads: tuple[bool, ...], like: Tensor) -> Float[Tensor, "1 head 1 1"]:
        """1 for the heads that are steered, else 0."""
        place = heads, like.dtype, like.device
        if place not in self._made:
            self._made[place] = torch.tensor(heads).to(like)[None, :, None, None]
        return self._made[place]

    def _steered(self, query: Tensor, first_query: int) -> Float[Tensor, "#batch 1 #query_pos 1"]:
        """1 for the queries that are steered, else 0."""
        if self.queries is None:
            return query.new_ones(1, 1, 1, 1)
        chosen = self.queries[:, first_query : first_query + query.shape[2]].to(query)
        return F.pad(chosen, (0, query.shape[2] - chosen.shape[1]), value=1)[:, None, :, None]

    def _kept(self, keys: int, device: torch.device) -> Bool[Tensor, "batch key_pos"]:
        generated = keys - self.keep.shape[1]
        if generated < 0:
            raise InputError(f"keep has {self.keep.shape[1]} positions, but the model saw only {keys}")
        return F.pad(self.keep.to(device), (0, generated), value=not self.steer_generated)

    def _bias(self, keys: int, log_weight: float, dtype, device) -> Float[Tensor, "batch key_pos 2"]:
        """The bias as a sum of two, which the layers of one pass mostly share."""
        place = "two", keys, log_weight, dtype, device
        if place not in self._made:
            bias = torch.where(self._kept(keys, device), 0.0, log_weight)
            high = bias.to(dtype)
            low = (bias - high).to(dtype)
            self._made = {of: made for of, made in self._made.items() if of[0] != "two"}
            self._made[place] = torch.stack([high, low], dim=-1)
        return self._made[place]

    def _as_mask(
        self, mask: Bool[Tensor, "batch _ 1 key_pos"] | None, keys: int, log_weight: float, heads: tuple, dtype, device
    ) -> Float[Tensor, "batch _ 1 key_pos"]:
        """What is added to the scores of one decoding step, made once for all of its layers.

        A softmax does not change if all scores do by the same amount: so the keys to keep get what the dtype cannot
        hold of the bias, and the other keys the rest, of the opposite sign.
        """
        place = "one", log_weight, dtype, device
        if place not in self._made or self._made[place].shape[-1] < keys:
            high = float(torch.tensor(log_weight, dtype=dtype))
            spare = keys + 256  # for the next steps
            kept = self._kept(spare, device)[:, None, None]
            self._made[place] = torch.where(kept, high - log_weight, high).to(dtype)
        bias = self._made[place][..., :keys]
        if mask is None and all(heads):
            return bias
        if self._of_step[0] is not mask or self._of_step[1] != keys:
            self._of_step, self._masks = (mask, keys), {}
        if (log_weight, heads) not in self._masks:
            if not all(heads):
                bias = torch.where(self._head_column(heads, bias).bool(), bias, 0.0)
            self._masks[log_weight, heads] = bias if mask is None else torch.where(mask, bias, -math.inf)
        return self._masks[log_weight, heads]
