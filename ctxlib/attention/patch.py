"""Record the output of single heads, or replace it: activation patching."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ctxlib.attention.hook import Head, check_batch, heads_table, listed, registered
from ctxlib.params import InputError


@contextmanager
def record_outputs(model: nn.Module, rows: Int[Tensor, "batch row"]) -> Iterator["HeadOutputs"]:
    r"""Record the output of every head at chosen positions: $z_{h,q} = \sum_k p_{h,q,k} v_{h,k}$.

    This is before the output projection, which sums the heads up. `rows` is a table of positions, -1 for none, whose
    outputs are zero. One pass over the prompt, not `generate` (InputError); another pass replaces the recording. A
    steering or a patch that was opened before has changed the recorded outputs already.
    """
    outputs = HeadOutputs(model, rows)
    with registered(model) as hook, listed(hook.outputs, outputs):
        yield outputs


@contextmanager
def patch_outputs(
    model: nn.Module,
    outputs: Float[Tensor, "layer batch row head width"],
    rows: Int[Tensor, "batch row"],
    heads: Collection[Head],
) -> Iterator[None]:
    """Replace the outputs of `heads`, pairs of layer and head, by `outputs` at `rows`; all else stays as it was.

    Both are in the layout of `record_outputs`, recorded from the same model in another condition or from another model
    of this shape, the n-th row here for the n-th row there. One pass over the prompt, not `generate` (InputError).
    This is activation patching (Vig et al. 2020; Meng et al. 2022, causal tracing).
    """
    patch = HeadOutputs(model, rows, outputs, heads)
    with registered(model) as hook, listed(hook.outputs, patch):
        yield


class HeadOutputs:
    """Outputs of the heads at chosen rows of one forward pass; with a `source`, some of them are replaced by it."""

    def __init__(self, model, rows, source=None, heads=()):
        self._rows = rows
        self._patched = heads_table(model, heads)
        self._source = source
        self._found: dict[int, Tensor] = {}
        if source is not None and (len(source) != len(self._patched) or source.shape[1:3] != rows.shape):
            shape, layers = tuple(source.shape), len(self._patched)
            raise InputError(f"outputs are {shape}; for {layers} layers and these rows they start with {layers}, "
                             f"{', '.join(map(str, rows.shape))}: record both alike")  # fmt: skip

    @property
    def outputs(self) -> Float[Tensor, "layer batch row head width"]:
        """In the order of the rows asked for; zero for a row of -1."""
        if not self._found:
            raise InputError("nothing was recorded; call the model inside the record_outputs block")
        return torch.stack([self._found[layer] for layer in sorted(self._found)])

    def head_outputs(
        self, layer: int, own: Float[Tensor, "batch query_pos head width"], first_query: int
    ) -> Float[Tensor, "batch query_pos head width"]:
        """The heads' outputs: patched if there is a source, else recorded and unchanged."""
        check_batch(own, len(self._rows))
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
