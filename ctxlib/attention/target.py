"""Steer attention to a target share: the bias is solved for every row, without the matrix of the pattern."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ctxlib.attention.hook import Head, check_batch, heads_table, listed, registered, widened
from ctxlib.params import InputError


@contextmanager
def steer_to_share(
    model: nn.Module, keep: Bool[Tensor, "batch pos"], share: float, heads: Collection[Head] | None = None
) -> Iterator[None]:
    r"""Every query that pays the keys to `keep` less than `share` of its attention pays them exactly that share.

    With $\psi$ what a row pays them, the bias on their scores and the pattern that results are

    $$b = \max\left(0, \operatorname{logit}(\tau) - \operatorname{logit}(\psi)\right), \qquad
      \psi' = \frac{\psi e^b}{\psi e^b + 1 - \psi} = \max(\tau, \psi)$$

    share: $\tau$ in [0, 1); 0 changes nothing. Rows that see no key to keep are unchanged. In every layer and for
    generated tokens, too, which are not kept; `heads`, pairs of layer and head, restrict it. One more attention call a
    layer, whose values are one column.

    Raises InputError as `steer_attention` does, and for a share outside [0, 1).
    """
    steering = _ToShare(model, keep, share, heads)
    with registered(model) as hook, listed(hook.steerings, steering):
        yield


class _ToShare:
    def __init__(self, model, keep, share, heads):
        if not 0 <= share < 1:
            raise InputError(f"share is {share}; a target share of attention lies in [0, 1)")
        self.keep, self.share = keep, share
        self.heads = heads_table(model, heads)

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
        """One more dimension of queries and keys, whose product is the row's bias on the keys to keep."""
        check_batch(query, len(self.keep))
        kept = F.pad(self.keep.to(key.device), (0, key.shape[2] - self.keep.shape[1])).float()[:, None, :, None]
        paid = F.scaled_dot_product_attention(
            query.float(),
            key.float(),
            kept.expand(-1, key.shape[1], -1, -1),
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=True,
        ).clamp(0, 1)
        target = torch.full_like(paid, self.share)
        bias = (target.logit() - paid.logit()).clamp(min=0)
        seen = (paid > 0) & (paid < self.share) & self.heads[layer].to(paid.device)[None, :, None, None]
        bias = torch.where(seen, bias, 0.0).to(query.dtype)
        own = (kept / scaling).to(key.dtype).expand(-1, key.shape[1], -1, -1)
        return widened(query, bias), widened(key, own), mask
