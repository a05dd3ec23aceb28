"""The loss without the logits of all tokens at once: the model's head in chunks, only where there is a label."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctxlib.finetune.labels import IGNORED, TrainingExample

CHUNK_ELEMENTS = 2**25  # logits that are held at a time: 128 MiB in float32, a few times over in the backward pass


@contextmanager
def chunked_loss(model: nn.Module, most_tokens: int, example: TrainingExample) -> Iterator[None]:
    r"""Within the block, `model(..., labels=...)` computes its loss in chunks, and returns hidden states as `logits`.

    $$L = -\frac{1}{N} \sum_{t : y_{t+1} \ne -100} \log p(y_{t+1} \mid x_{\le t})$$

    is a sum over supervised positions, so the head, whose logits are tokens × vocabulary, is applied to as many of them
    as make `CHUNK_ELEMENTS` logits, and once more in the backward pass. Loss and gradients are exact, up to rounding;
    the memory for logits no longer grows with vocabulary × length.

    Has no effect if all logits of a batch of `most_tokens` tokens fit into one chunk: then nothing changes by a bit.
    Nor for a model that changes its logits after the head (soft caps, scales) or computes its loss in another way,
    which the loss of `example` shows.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    vocabulary = base.config.get_text_config().vocab_size
    if most_tokens * vocabulary <= CHUNK_ELEMENTS or not _agrees(model, base, example):
        yield
        return
    with _head_in_the_loss(base):
        yield


@contextmanager
def _head_in_the_loss(base: nn.Module) -> Iterator[None]:
    """The head lets hidden states through, and the loss function applies it."""
    head, loss_function = base.get_output_embeddings(), base.loss_function
    apply, had_own_forward, had_own_loss = head.forward, "forward" in vars(head), "_loss_function" in vars(base)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **options) -> Tensor:
        if logits.shape[:-1].numel() * vocab_size <= CHUNK_ELEMENTS:
            return loss_function(logits=apply(logits), labels=labels, vocab_size=vocab_size, **options)
        return _chunked_cross_entropy(apply, logits, labels, vocab_size, **options)

    head.forward, base.loss_function = (lambda hidden: hidden), loss
    try:
        yield
    finally:
        if had_own_forward:
            head.forward = apply
        else:
            del head.forward
        if had_own_loss:
            base.loss_function = loss_function
        else:
            del base._loss_function


def _chunked_cross_entropy(
    apply_head,
    hidden: Float[Tensor, "*axes width"],
    labels: Int[Tensor, "*axes"],
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Int[Tensor, "*axes"] | None = None,
    **_,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the supervised tokens, or their sum over `num_items_in_batch`, as transformers has it."""

    def of_chunk(hidden: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(apply_head(hidden).float(), following, reduction="sum")

    following = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shift_labels is None else shift_labels
    following = following.reshape(-1).to(hidden.device)
    supervised = (following != IGNORED).nonzero()[:, 0]
    hidden, following = hidden.reshape(-1, hidden.shape[-1])[supervised], following[supervised]
    total = hidden.sum() * 0.0 if not len(supervised) else 0.0
    per_chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    for chunk, targets in zip(hidden.split(per_chunk), following.split(per_chunk), strict=True):
        if len(targets):
            total = total + checkpoint(of_chunk, chunk, targets, use_reentrant=False)
    n = len(supervised) if num_items_in_batch is None else num_items_in_batch
    return total / (n.to(hidden.device) if isinstance(n, Tensor) else n)


@torch.no_grad()
def _agrees(model: nn.Module, base: nn.Module, example: TrainingExample) -> bool:
    """Whether the loss of an example, cut at 64 tokens, is the same with the head in the loss function."""
    if base.get_output_embeddings() is None or getattr(base.config.get_text_config(), "final_logit_softcapping", None):
        return False
    ids = labels = example.input_ids[:64][None].to(base.device)
    training = model.training
    model.eval()  # no dropout, so that no random number is drawn
    try:
        plain = model(input_ids=ids, labels=labels, use_cache=False).loss
        with _head_in_the_loss(base):
            other = model(input_ids=ids, labels=labels, use_cache=False).loss
    finally:
        model.train(training)
    return bool((plain - other).abs() <= 1e-4 * plain.abs())
