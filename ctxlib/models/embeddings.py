"""The indicator's token and its rows of the embeddings."""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ctxlib.params import InputError


def add_indicator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indicator: str = "[IND]") -> int:
    """Makes `indicator` one token, in place, and returns its id; its rows are the mean of the embeddings.

    The mean is over the rows of the tokenizer's own tokens, in the input and in the output embedding (paper: "an
    additional special token"; the mean as in the official script). No random number is drawn.

    Raises InputError if the text is a token already.
    """
    n_tokens = len(tokenizer)
    indicator_id = add_indicator_token(tokenizer, indicator)
    set_indicator_row(model, indicator_id, n_tokens)
    return indicator_id


def add_indicator_token(tokenizer: PreTrainedTokenizerBase, indicator: str) -> int:
    """The tokenizer's half of `add_indicator`."""
    if not indicator.strip():
        raise InputError("indicator: expected a text such as '[IND]', got an empty one")
    if indicator in tokenizer.get_vocab():
        where = "was added already" if indicator in tokenizer.get_added_vocab() else "is in the vocabulary"
        raise InputError(
            f"{tokenizer.name_or_path}: '{indicator}' {where} as token {tokenizer.convert_tokens_to_ids(indicator)}; "
            "take the base model's own tokenizer, or another indicator"
        )
    tokenizer.add_tokens([AddedToken(indicator, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(indicator)


def set_indicator_row(model: PreTrainedModel, indicator_id: int, n_tokens: int) -> None:
    """The model's half of `add_indicator`: the indicator's rows become the mean of the first `n_tokens` rows."""
    resize_with_mean(model, indicator_id + 1)
    with torch.no_grad():
        for embedding in _embeddings(model):
            embedding.weight[indicator_id] = embedding.weight[:n_tokens].float().mean(0).to(embedding.weight.dtype)


def resize_with_mean(model: PreTrainedModel, n_tokens: int) -> None:
    n_rows = model.get_input_embeddings().weight.shape[0]
    if n_tokens <= n_rows:
        return
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    with torch.no_grad():
        for embedding in _embeddings(model):
            embedding.weight[n_rows:] = embedding.weight[:n_rows].float().mean(0).to(embedding.weight.dtype)


def embedding_changes(
    before: torch.nn.Module, after: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> pd.DataFrame:
    """What fine-tuning did to the embeddings: embedding ("input", "output"), rows, changed, tokens, distance, typical.

    changed: number of rows that differ between the two models. tokens: the tokens of the first five of them.
    distance: the largest Euclidean distance between a row before and after. typical: the median distance of a row
    from the mean of all rows before. Rows are what the models compute with, so those of an adapter are seen.
    """
    counts = []
    for name in ("input", "output"):
        old, new = (_rows(model, name) for model in (before, after))
        moved = (new - old).norm(dim=1)
        changed = moved.nonzero().flatten().tolist()
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(changed[:5])) + (", …" if len(changed) > 5 else "")
        typical = (old - old.mean(0)).norm(dim=1).median()
        counts.append((name, len(old), len(changed), tokens, moved.max().item(), typical.item()))
    return pd.DataFrame(counts, columns=["embedding", "rows", "changed", "tokens", "distance", "typical"])


@torch.no_grad()
def _rows(model: torch.nn.Module, which: str) -> Float[Tensor, "token width"]:
    """The rows of an embedding as its layer computes with them, adapters included."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    n_tokens, width = inputs.weight.shape
    if which == "input":
        return inputs(torch.arange(n_tokens, device=model.device)).float()
    return outputs(torch.eye(width, dtype=model.dtype, device=model.device)).float().T


def _embeddings(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Input and output embedding; once where they are tied."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return [inputs] if outputs is None or outputs.weight is inputs.weight else [inputs, outputs]
