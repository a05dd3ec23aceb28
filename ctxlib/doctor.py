"""What to know about a model before GPU hours go into it: can it be measured, and does it look where we look?

Each check is a line: a verdict (`ok`, `note` or `fail`), a finding in numbers, a remedy in words. What is measured is
compared with something that is computed in another way: the model's own eager attention, a closed form, transformers'
own rendering. The thresholds of the verdicts are ours; the paper has none.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import bootstrap, rankdata
from torch import Tensor

from ctxlib.attention import record_allocation, steer_attention, verify_recording
from ctxlib.conversations import Corpus, Message, load_conversations
from ctxlib.figures import ROLE_COLOURS
from ctxlib.metrics import auc
from ctxlib.miniature import MODELS, texts
from ctxlib.miniature.town import Town
from ctxlib.models import load_model, load_tokenizer
from ctxlib.paper import paper_layer
from ctxlib.params import InputError
from ctxlib.roles import ROLES, Role, RoleBatch, RoleMap, pad_batch, role_map
from ctxlib.scoring import answered_turns, reduce_heads

VERDICTS = ("fail", "note", "ok")
STEERING_ALPHA = 0.3
# Allowed between two passes: in shares of attention, or in logits relative to the largest. Half precision rounds a
# score to 8 (bfloat16) or 11 bits: one of 16 is then off by up to 0.03 or 0.004, a share by as much of itself, and
# layers add up. In float32 rounding gives 1e-6 to 1e-5; a fault, such as a missing mask, 0.01 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
EXACT = 1e-4  # allowed where both sides are float32 computations on the same queries and keys, whatever the dtype
REPRESENTATIVE = 0.7  # rank correlation from which on a layer, or a head, stands for the others
DOMINANT = 0.5  # share of the answer's tokens from which on one busiest head is the whole layer's score
UNKNOWN = 0.01  # share of unknown tokens from which on a text is not the tokenizer's

CONVERSATIONS = Path(__file__).with_suffix(".json")  # 12 passages, each with a question about it and one that is not
TALK = (
    Message("system", "Speak like a sailor."),
    Message("user", "Where is the kestrel?"),
    Message("assistant", "On the roof."),
    Message("user", "And the wren?"),
    Message("assistant", "In the hedge."),
)


class Check(NamedTuple):
    """One line of the examination."""

    check: str
    verdict: str
    finding: str
    remedy: str = ""


def open_patient(
    name: str,
    *,
    dtype: str = "float32",
    quantisation: str | None = None,
    chat_template: str | Path | None = None,
    revision: str | None = None,
) -> tuple[Any, Any, Corpus]:
    """Model, tokenizer and conversations to examine them with: plain English, or the town's for `miniature:<name>`.

    A model whose class does not take sdpa attention is loaded with eager. Raises InputError as `load_model` does.
    """
    source, _, embedded = name.partition(":")
    corpus = load_conversations(CONVERSATIONS)
    if source == "miniature":
        name = str(MODELS / embedded)
        made = texts.chat_dataset(Town(), 48, {"contradicting_passage": 0.5, "dependent_passage": 0.5}, seed=0)
        corpus = Corpus(tuple(made), corpus.dropped, source)
    tokenizer = load_tokenizer(name, chat_template=chat_template, revision=revision)
    options = {"dtype": dtype, "quantisation": quantisation, "revision": revision}
    try:
        return load_model(name, **options), tokenizer, corpus
    except InputError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return load_model(name, attention="eager", **options), tokenizer, corpus


def examine(
    model: Any,
    tokenizer: Any,
    *,
    layer: int | None = None,
    indicator: str = "[IND]",
    corpus: Corpus | None = None,
) -> pd.DataFrame:
    """All checks of a causal language model as a tidy frame: check, verdict, finding, remedy; what fails stands first.

    layer: whose attention is to give the scores (from 0); by default the one at the paper's depth.
    corpus: conversations of which it is known whether an answer depends on its context, by default 24 built-in ones.

    What goes wrong inside the model or its template is a finding. Raises InputError for a layer that does not exist.
    """
    depth = model.config.get_text_config().num_hidden_layers
    layer = paper_layer(depth) if layer is None else layer
    if not 0 <= layer < depth:
        raise InputError(f"layer {layer} does not exist: the model has layers 0 to {depth - 1}")
    corpus = load_conversations(CONVERSATIONS) if corpus is None else corpus
    rows = _examined("model", _model, model)
    rows += _examined("tokenizer", _tokenizer, model, tokenizer, corpus)
    recording = _examined("recording", _recording, model, tokenizer)
    rows += recording
    for name, examination, *inputs in (
        ("steering", _steering, model, tokenizer),
        ("padding", _padding, model, tokenizer),
        (f"layer {layer}", _layer, model, tokenizer, corpus, layer),
    ):
        if recording[0].verdict == "fail":
            rows.append(Check(name, "note", "not examined, as the recording fails"))
        else:
            rows += _examined(name, examination, *inputs)
    if _renders(tokenizer):
        for part, examination in TEMPLATE_CHECKS.items():
            rows += _examined(f"template: {part}", examination, tokenizer)
    else:
        rows += _examined("template", _no_template, tokenizer)
    rows += _examined("indicator", _indicator, model, tokenizer, indicator)
    frame = pd.DataFrame(rows, columns=list(Check._fields))
    return frame.sort_values("verdict", key=lambda v: v.map(VERDICTS.index), kind="stable", ignore_index=True)


def _examined(name: str, examination: Callable[..., list[Check]], *inputs: Any) -> list[Check]:
    try:
        return examination(*inputs)
    except InputError as error:
        finding, _, remedy = str(error).partition("; ")
        return [Check(name, "fail", finding, remedy)]
    except Exception as error:  # models and templates are foreign code: they can raise anything
        said = " ".join(str(error).split())[:200]
        return [Check(name, "fail", f"{type(error).__name__}: {said}", "use another model or template")]


# The model


def _model(model: Any) -> list[Check]:
    config = model.config.get_text_config()
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    positions = getattr(config, "max_position_embeddings", None)
    dtype = str(model.dtype).removeprefix("torch.") + " over 4-bit weights" * _is_four_bit(model)
    shape = f"{config.model_type}: {depth} layers of {heads} heads ({kv_heads} kv), {positions or 'any'} positions"
    finding, remedies = f"{shape}, {dtype}, {config._attn_implementation}", []
    if config._attn_implementation == "eager":
        remedies.append(
            "it runs on eager attention, whole patterns in memory: attention: eager in params files, short prompts"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and positions and window < positions:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * depth
        finding += f"; {sum('sliding' in kind for kind in kinds)} layers see {window} tokens back"
        remedies.append(f"keep prompts under {window} tokens: such layers see no further, and decoding is not recorded")
    return [Check("model", "note" if remedies else "ok", finding, "; ".join(remedies))]


def _is_four_bit(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False))


def _tokenizer(model: Any, tokenizer: Any, corpus: Corpus) -> list[Check]:
    rows = model.get_input_embeddings().weight.shape[0]
    kind = "fast" if tokenizer.is_fast else "slow"
    named = [f"{name} {getattr(tokenizer, f'{name}_token')!r}" for name in ("bos", "eos", "pad")]
    finding = f"{kind}, {len(tokenizer)} tokens for {rows} embedding rows, {', '.join(named)}"
    fails, notes = [], []
    if len(tokenizer) > rows:
        fails.append("take the model's own tokenizer: ids without an embedding end in an index error")
    if tokenizer.eos_token_id is None:
        notes.append("give the tokenizer an eos token: nothing ends an answer")
    if not tokenizer.is_fast:
        notes.append("save it as tokenizer.json: a slow tokenizer that normalises text is refused")
    if tokenizer.unk_token_id is not None:
        messages = [message.content for conversation in corpus.conversations for message in conversation.messages]
        ids = np.concatenate([tokenizer(text, add_special_tokens=False).input_ids for text in messages])
        unknown = float((ids == tokenizer.unk_token_id).mean())
        if unknown > UNKNOWN:
            finding += f"; {unknown:.0%} of the conversations' tokens are unknown to it"
            notes.append("examine it with conversations in its own language: the layer's numbers mean little")
    verdict = "fail" if fails else "note" if notes else "ok"
    return [Check("tokenizer", verdict, finding, "; ".join(fails + notes))]


# Recording and steering


def _recording(model: Any, tokenizer: Any) -> list[Check]:
    """Against the model's own eager patterns, every layer, head and role; padded left and right.

    In one and the same pass, where both see the same queries and keys: no rounding, whatever the dtype. And in passes
    of their own, through the backend in use, where half precision lets the roundings of all layers add up.
    """
    same, apart = [], []
    for side in ("left", "right"):
        batch = _batch(tokenizer, model, side)
        try:
            apart.append(verify_recording(model, batch.input_ids, batch.roles))
            same.append(_same_pass(model, batch))
        except (AttributeError, InputError) as error:
            if isinstance(error, InputError) and "nothing was recorded" not in str(error):
                raise
            finding = "not every layer has attention that goes through transformers' registered functions"
            raise InputError(f"{finding}; use another model") from error
    same, apart = float(np.max(same)), float(np.max(apart))  # NaN where there is one
    plain, _ = _forward(model, batch)
    changed = _relative(_forward(model, batch, rows="last")[0], plain)
    tolerance, half = _tolerance(model), model.dtype != torch.float32
    finding = (
        f"differs from eager by {same:.0e} in the same pass (allowed: {EXACT:.0e}), by {apart:.0e} in passes of their "
        f"own ({tolerance:.0e}); padded left and right; {_logits_said(changed)}"
    )
    if not (same <= EXACT and changed <= tolerance) or not (apart <= tolerance or half):
        return [Check("recording", "fail", finding, "do not trust it: report this model, and use another one")]
    if not apart <= tolerance:
        remedy = "its layers multiply rounding: compare only what was recorded in the same dtype and backend"
        return [Check("recording", "note", finding, remedy)]
    return [Check("recording", "ok", finding)]


@torch.inference_mode()
def _same_pass(model: Any, batch: RoleBatch) -> float:
    """Largest difference to the patterns that the eager attention yields in the pass that is recorded.

    All rows and the last ones are recorded, as these are computed in different ways.
    """
    backend, ids = model.config._attn_implementation, batch.input_ids
    model.set_attn_implementation("eager")
    try:
        with record_allocation(model, batch.roles, rows="all") as every, record_allocation(model, batch.roles) as last:
            options = {"attention_mask": batch.attention_mask, "use_cache": False, "output_attentions": True}
            patterns = torch.stack(model(ids, **options).attentions).float()
    finally:
        model.set_attn_implementation(backend)
    columns = torch.stack([batch.roles == role for role in Role], dim=-1).float()
    real = batch.roles >= 0
    expected = (patterns @ columns[:, None]).where(real[:, None, :, None], 0)
    places = torch.where(real, torch.arange(ids.shape[1], device=ids.device), -1).amax(dim=1)
    of_last = expected[:, range(len(ids)), :, places].movedim(0, 1)[..., None, :]
    return max((every.allocation - expected).abs().max(), (last.allocation - of_last).abs().max()).item()


def _steering(model: Any, tokenizer: Any) -> list[Check]:
    """The first layer, whose input steering does not change, against the unsteered shares reweighted by role."""
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        finding = f"attention scores are capped at {cap:g}: they can be recorded, not steered"
        return [Check("steering", "note", finding, "leave steering out, or use another model")]
    batch = _batch(tokenizer, model, "left")
    user, everything = batch.roles == Role.USER, batch.roles >= 0
    plain, _ = _forward(model, batch)
    _, shares = _forward(model, batch, rows="all")
    _, steered = _forward(model, batch, steer_attention(model, user, STEERING_ALPHA), rows="all")
    weights = torch.tensor([1 if role == Role.USER else STEERING_ALPHA for role in Role], device=shares.device)
    weighted = shares[0] * weights
    expected = weighted / weighted.sum(-1, keepdim=True).where(everything[:, None, :, None], 1)
    exact = (steered[0] - expected).abs().max().item()
    changes = [
        _relative(_forward(model, batch, steer_attention(model, keep, steering_alpha))[0], plain)
        for keep, steering_alpha in ((user, 1.0), (everything, STEERING_ALPHA))
    ]
    finding = (
        f"differs from the closed form by {exact:.0e} in layer 0 (allowed: {EXACT:.0e}); alpha 1, or "
        f"to keep every token: {_logits_said(np.max(changes))}"
    )
    fine = exact <= EXACT and np.max(changes) <= _tolerance(model)
    return [Check("steering", "ok" if fine else "fail", finding, "" if fine else "do not steer this model")]


def _padding(model: Any, tokenizer: Any) -> list[Check]:
    """The same tokens, padded left and right, without position ids: rotary positions do not care, absolute ones do.

    In the first layer, where no rounding has added up.
    """
    shares = []
    for side in ("left", "right"):
        batch = _batch(tokenizer, model, side)
        _, recorded = _forward(model, batch, rows="all")
        shares.append(recorded[0].transpose(1, 2)[batch.roles >= 0])
    left, right = shares
    difference = (left - right).abs().max().item()
    finding = f"shares in layer 0 differ by {difference:.0e} between left and right padding"
    if difference <= _tolerance(model):
        return [Check("padding", "ok", finding)]
    remedy = "pad right, as scoring and allocation do; code of your own that pads left must pass position_ids"
    return [Check("padding", "note", finding, remedy)]


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])


def _relative(ours: Float[Tensor, "token vocab"], theirs: Float[Tensor, "token vocab"]) -> float:
    """Largest difference as a fraction of the largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)).item()


def _logits_said(changed: float) -> str:
    return f"logits change by {changed:.0e} of the largest" if changed else "logits stay bit for bit"


def _batch(tokenizer: Any, model: Any, side: str) -> RoleBatch:
    """A conversation and its beginning, padded, on the model's device."""
    talk = _expressible(tokenizer) if _renders(tokenizer) else TALK
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    maps = [role_map(tokenizer, part, template=_renders(tokenizer)) for part in (talk, talk[:-2])]
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    batch = pad_batch([of.truncate(positions or len(of)) for of in maps], pad_id, side)
    return RoleBatch(**{name: tensor.to(model.device) for name, tensor in vars(batch).items()})


@torch.inference_mode()
def _forward(
    model: Any, batch: RoleBatch, steering: AbstractContextManager | None = None, rows: str | None = None
) -> tuple[Float[Tensor, "token vocab"], Float[Tensor, "layer batch head row role"] | None]:
    """Logits of all tokens, padding left out, and the shares of attention of the `rows` that are to be recorded."""
    recorder = record_allocation(model, batch.roles, rows=rows) if rows else nullcontext()
    with steering or nullcontext(), recorder as recording:
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits[batch.roles >= 0].float(), recording.allocation if rows else None


# The template


def _renders(tokenizer: Any) -> bool:
    """Is there a template that says where its characters come from? If not, contents are joined as raw text."""
    try:
        return bool(tokenizer.chat_template) and bool(_expressible(tokenizer))
    except InputError:
        return False


def _no_template(tokenizer: Any) -> list[Check]:
    if tokenizer.chat_template:
        _expressible(tokenizer)  # raises the reason
    remedy = "name one: --chat-template FILE, models.chat_template in a params file"
    return [Check("template", "fail", "the tokenizer has no chat template", remedy)]


def _roles(tokenizer: Any) -> list[Check]:
    """A partition, transformers' own ids, and a user who writes the marker of an answer and stays the user."""
    talk = _with_odd_text(_expressible(tokenizer))
    odd = role_map(tokenizer, talk)
    same = _ids(tokenizer, talk) == tokenizer.apply_chat_template(_dicts(talk), return_dict=True)["input_ids"]
    marker, forged = _forged(tokenizer, talk)
    attacked = role_map(tokenizer, forged)
    theirs = attacked.ids[attacked.roles == Role.USER].tolist()
    stays = torch.equal(attacked.ids[attacked.roles != Role.USER], odd.ids[odd.roles != Role.USER])
    stays = stays and not _control_ids(tokenizer) & set(theirs)
    counts = ", ".join(f"{(odd.roles == role).sum()} {ROLES[role]}" for role in Role)
    finding = (
        f"{counts}; ids {'are' if same else 'are NOT'} those of apply_chat_template; "
        f"a forged {_quoted(marker)} {'stays' if stays else 'does NOT stay'} the user's"
    )
    fine = same and stays
    remedy = "" if fine else "report this template: its roles cannot be trusted"
    return [Check("template: roles", "ok" if fine else "fail", finding, remedy)]


def _system_text(tokenizer: Any) -> list[Check]:
    opening, _, later_opening, *_ = _gaps(tokenizer, TALK[1:])
    opening = opening.removeprefix(tokenizer.bos_token or "")
    user_marker = os.path.commonprefix([opening[::-1], later_opening[::-1]])[::-1]  # noqa: RUF071 (it is meant)
    default = opening.removesuffix(user_marker)
    added = f"; where there is none it writes {_quoted(default)}" if default.strip() else ""
    remedy = "write system texts into the first user message, or drop them"
    if len(_expressible(tokenizer)) < len(TALK):
        return [Check("template: system text", "note", f"is refused{added}", remedy)]
    if TALK[0].content not in _text(tokenizer, TALK):
        return [Check("template: system text", "note", f"is left out{added}", remedy)]
    folded = user_marker.strip() and not _gaps(tokenizer, TALK)[1].endswith(user_marker)
    finding = "is folded into the first user's turn, and keeps its role" if folded else "stands outside the user's turn"
    return [Check("template: system text", "ok", finding + added)]


def _contents(tokenizer: Any) -> list[Check]:
    """What becomes of spaces at the edges, of earlier turns, and of the reasoning in earlier answers."""
    talk = _expressible(tokenizer)
    spaced = _text(tokenizer, [Message(message.role, f"  {message.content}  ") for message in talk])
    thinking = [Message("user", "?"), Message("assistant", "<think>\nIt flew.\n</think>\n\nOff.")]
    shown = _text(tokenizer, talk)
    dropped = [message.content for message in talk if message.content not in shown]
    trims = [message.role for message in talk if f"  {message.content}  " not in spaced]
    found = [f"trims {', '.join(dict.fromkeys(trims))}" if trims else "keeps spaces at the edges"]
    found.append(f"drops {len(dropped)} of {len(talk)} earlier messages" if dropped else "keeps earlier turns")
    reasoning = "It flew." in _text(tokenizer, [*thinking, *TALK[1:3]])
    found.append("keeps earlier reasoning" if reasoning else "drops earlier reasoning")
    remedies = ["use a template that keeps them: what is not shown is neither read nor scored"] * bool(dropped)
    remedies += ["the score of an earlier answer is that of what is left of it"] * (not reasoning)
    return [Check("template: contents", "note" if remedies else "ok", ", ".join(found), "; ".join(remedies))]


def _bos(tokenizer: Any) -> list[Check]:
    bos, name = tokenizer.bos_token_id, "template: bos"
    if bos is None:
        return [Check(name, "ok", "the tokenizer has none")]
    talk = _expressible(tokenizer)
    ours, theirs = role_map(tokenizer, talk).ids.tolist(), _ids(tokenizer, talk)
    again = tokenizer(_text(tokenizer, talk)).input_ids
    if ours[:2] == [bos, bos]:
        return [Check(name, "fail", "stands twice at the start", "take one of the two out of the template")]
    if theirs[:1] == [bos]:
        doubled = "; tokenising the rendered text would put a second one in front" if again[:2] == [bos, bos] else ""
        return [Check(name, "ok", f"written once, by the template{doubled}")]
    finding = "not written by the template: ctxlib puts one in front, apply_chat_template does not"
    return [Check(name, "note", finding, "start the template with {{ bos_token }}, so that other tools see the same")]


def _borders(tokenizer: Any) -> list[Check]:
    """Tokens that hold characters of a content and of the template beside it; they have the role of the content."""
    talk = _expressible(tokenizer)
    rendered, contents = _text(tokenizer, talk), "".join(message.content for message in talk)
    role_of, merged, cut = role_map(tokenizer, talk), [], False
    for n, (start, stop) in enumerate(role_of.chars.tolist()):
        before, upto = (tokenizer.decode(role_of.ids[:end]) for end in (n, n + 1))
        token, piece = upto[len(before) :], contents[start:stop]
        if start >= 0 and piece in token and token != piece and token in rendered:
            merged.append(token)
            cut = cut or bool(token.replace(piece, "", 1).strip())
    said = f": {', '.join(map(_quoted, dict.fromkeys(merged)))}" if merged else ""
    finding = f"{len(merged)} of {2 * len(talk)} borders lie inside a token{said}"
    remedy = "add the template's markers as tokens, or use this tokenizer's own template"
    return [Check("template: borders", "note" if cut else "ok", finding, remedy if cut else "")]


def _generation_prompt(tokenizer: Any) -> list[Check]:
    """Is a prompt with its answer what follows the prompt alone, token by token, as training and inference need it?"""
    talk, name = _expressible(tokenizer), "template: answers"
    first = len(talk) - 3
    for n in (first, first + 2):
        prompt = role_map(tokenizer, talk[:n], generation_prompt=True)
        whole = role_map(tokenizer, talk[: n + 1])
        same = (prompt.ids[: len(whole)] == whole.ids[: len(prompt)]).long().cumprod(0).sum().item()
        if same < len(prompt):
            ends, reads = (_quoted(tokenizer.decode(of.ids[same : same + 4])) for of in (prompt, whole))
            finding = f"the prompt ends on {ends} where a rendered answer has {reads}"
            remedy = "train on answers as they are asked for: change the template's generation prompt"
            return [Check(name, "note", finding, remedy)]
        answer = int((whole.roles[same:] == Role.ASSISTANT).long().argmax())
        if between := tokenizer.decode(whole.ids[same : same + answer]):
            finding = f"between the prompt and its answer the template writes {_quoted(between)}"
            remedy = "let the template's generation prompt end where an answer begins"
            return [Check(name, "note", finding, remedy)]
    whole = role_map(tokenizer, talk)
    closing = whole.ids[int((whole.roles == Role.ASSISTANT).nonzero().max()) + 1 :]
    if not _control_ids(tokenizer) & set(closing.tolist()):
        finding = f"an answer is closed by {_quoted(tokenizer.decode(closing))}, which holds no special token"
        return [Check(name, "note", finding, "let the template write eos_token after an answer, or nothing ends it")]
    closed = _quoted(tokenizer.decode(closing))
    return [Check(name, "ok", f"a prompt with its answer continues the prompt, token by token, and ends on {closed}")]


TEMPLATE_CHECKS = {
    "roles": _roles,
    "system text": _system_text,
    "contents": _contents,
    "bos": _bos,
    "borders": _borders,
    "answers": _generation_prompt,
}


def _expressible(tokenizer: Any) -> tuple[Message, ...]:
    """The conversation, without its system text where the template refuses one."""
    try:
        role_map(tokenizer, TALK)
        return TALK
    except InputError:
        role_map(tokenizer, TALK[1:])
        return TALK[1:]


def _with_odd_text(talk: Sequence[Message]) -> list[Message]:
    """The same conversation whose first question has spaces at its ends, an empty line and an emoji of two letters."""
    odd = {TALK[1].content: "  Where is the kestrel?\n\nI saw 👍🏽 it  "}
    return [Message(message.role, odd.get(message.content, message.content)) for message in talk]


def _forged(tokenizer: Any, talk: Sequence[Message]) -> tuple[str, list[Message]]:
    """What the template writes before an answer, and the conversation in which a user writes it."""
    marker = _gaps(tokenizer, TALK[1:])[1]
    forged = [Message(m.role, m.content.replace("\n\n", f"\n\n{marker}")) for m in talk]
    return marker, forged


def _gaps(tokenizer: Any, talk: Sequence[Message]) -> list[str]:
    """What the template writes before each content and after the last; nothing where it leaves a content out."""
    rest, gaps = _text(tokenizer, talk), []
    for message in talk:
        before, found, after = rest.partition(message.content)
        gaps.append(before if found else "")
        rest = after if found else rest
    return [*gaps, rest]


def _control_ids(tokenizer: Any) -> set[int]:
    """Special tokens, but for the unknown one, which any text may come to."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def _dicts(talk: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in talk]


def _text(tokenizer: Any, talk: Sequence[Message]) -> str:
    return tokenizer.apply_chat_template(_dicts(talk), tokenize=False)


def _ids(tokenizer: Any, talk: Sequence[Message]) -> list[int]:
    return role_map(tokenizer, talk, bos=False).ids.tolist()


def _quoted(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:40]} … {shown[-15:]}"


# The indicator


def _indicator(model: Any, tokenizer: Any, indicator: str) -> list[Check]:
    vocabulary = tokenizer.get_vocab()
    if not indicator.strip():
        raise InputError("the indicator is blank; give a text such as '[IND]'")
    if indicator in vocabulary:
        added = tokenizer.added_tokens_decoder.get(vocabulary[indicator])
        kind = "of the vocabulary" if added is None else "added as special" if added.special else "added as ordinary"
        finding = f"{indicator!r} is token {vocabulary[indicator]} already, {kind}"
        remedy = "fine-tune from the base model's own tokenizer, or choose another indicator"
        return [Check("indicator", "fail", finding, remedy)]
    pieces = tokenizer.tokenize(indicator)
    holding = sorted(token for token in vocabulary if indicator in token)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    rows, new_id = inputs.shape[0], max(vocabulary.values()) + 1
    room = f"row {new_id} of {rows} is free" if new_id < rows else f"embeddings grow from {rows} to {new_id + 1} rows"
    tied = "tied" if outputs is None or outputs.weight is inputs else "not tied"
    finding = f"{indicator!r} is {len(pieces)} tokens now ({' '.join(pieces)}), will be token {new_id}: {room}, {tied}"
    if not holding:
        return [Check("indicator", "ok", finding)]
    finding += f"; {len(holding)} tokens contain it, such as {holding[0]!r}"
    remedy = "choose another indicator: once it is a token, it cuts through these wherever it is written"
    return [Check("indicator", "note", finding, remedy)]


# The chosen layer


def _layer(model: Any, tokenizer: Any, corpus: Corpus, layer: int) -> list[Check]:
    """Does it rank answers as other layers do, do its heads agree, does it find the answers that need their context?"""
    answers = answer_attention(model, tokenizer, corpus)
    scores = np.stack([reduce_heads(answer.to_user, "max_then_mean").double().numpy() for answer in answers])
    return [
        _beside_other_layers(scores, layer),
        _heads([answer.to_user[layer] for answer in answers], layer),
        _separation(scores, answers, layer),
    ]


class Answer(NamedTuple):
    """What the tokens of an answer pay to the user's: by layer and head, and if all tokens before were paid alike."""

    to_user: Float[Tensor, "layer head answer_pos"]
    uniform: Float[Tensor, " answer_pos"]
    depends_on_context: bool


def answer_attention(model: Any, tokenizer: Any, corpus: Corpus) -> list[Answer]:
    """The share of attention, in [0, 1], that each token of an answer pays to the user's tokens, turn by turn.

    The maximum over heads and then the mean over tokens is the turn's context-dependency score (`clean` reading).
    Answers that the template leaves out are left out. Raises InputError where the truth of an answer is not known.
    """
    answers, rendered = [], _renders(tokenizer)
    for conversation in corpus.conversations:
        role_of = role_map(tokenizer, conversation.messages, template=rendered)
        roles = role_of.roles[None].to(model.device)
        with torch.inference_mode(), record_allocation(model, roles, rows="all") as recording:
            model(role_of.ids[None].to(model.device), use_cache=False)
        to_user = recording.allocation[:, 0, :, :, Role.USER].cpu()
        uniform = (role_of.roles == Role.USER).float().cumsum(0) / torch.arange(1, len(role_of) + 1)
        for turn, _, answer in answered_turns(conversation):
            depends = conversation.messages[answer].depends_on_context
            if depends is None:
                raise InputError(f"conversation {conversation.id!r}, turn {turn}: no truth; give depends_on_context")
            rows = (role_of.roles == Role.ASSISTANT) & (role_of.turns == turn)
            if rows.any():
                answers.append(Answer(to_user[:, :, rows], uniform[rows], depends))
    return answers


def _beside_other_layers(scores: Float[np.ndarray, "turn layer"], layer: int) -> Check:
    name, (turns, depth) = f"layer {layer}: others", scores.shape
    others = [other for other in range(depth) if other != layer]
    if not others:
        return Check(name, "ok", "it is the only layer")
    middle = [other for other in others if depth // 3 <= other < depth - depth // 3] or others
    ours, theirs = scores[:, layer], scores[:, middle].mean(axis=1)
    value, each = rank_correlation(ours, theirs), rank_correlation(ours[:, None], scores[:, others], axis=0)
    interval = bootstrap((ours, theirs), rank_correlation, paired=True, method="percentile", n_resamples=2000, rng=0)
    low, high = interval.confidence_interval
    finding = (
        f"its scores rank {turns} answers as {_mean_of(middle, layer)}: {value:.2f} "
        f"({low:.2f} to {high:.2f}); least like layer {others[int(np.nanargmin(each))]}: {np.nanmin(each):.2f}"
    )
    if value >= REPRESENTATIVE:
        return Check(name, "ok", finding)
    fitting = others[int(np.nanargmax([rank_correlation(scores[:, o], theirs) for o in others]))]
    remedy = f"score some of your own conversations at all layers before you choose; nearest to the middle: {fitting}"
    return Check(name, "note", finding, remedy)


def _mean_of(layers: Sequence[int], without: int) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    inside = f" but {without}" if layers[0] < without < layers[-1] else ""
    return f"the mean of layers {layers[0]} to {layers[-1]}{inside}"


def _heads(attention: Sequence[Float[Tensor, "head _"]], layer: int) -> Check:
    name, heads = f"layer {layer}: heads", attention[0].shape[0]
    by_head = torch.stack([of_one.mean(dim=1) for of_one in attention]).double().numpy()
    agreement = rank_correlation(by_head, by_head.mean(axis=1, keepdims=True), axis=0)
    tokens = torch.cat(list(attention), dim=1)
    busiest = torch.bincount(tokens.argmax(dim=0), minlength=heads) / tokens.shape[1]
    share, head = busiest.max().item(), int(busiest.argmax())
    median = float(np.median(agreement))
    finding = (
        f"head {head} is the busiest at {share:.0%} of {tokens.shape[1]} answer tokens (by chance {1 / heads:.0%}); a "
        f"head ranks answers as the mean of {heads} heads: median {median:.2f}, lowest {agreement.min():.2f}"
    )
    remedies = []
    if heads > 1 and share > DOMINANT:
        remedies.append("its score is mostly that of one head: compare head_reduction: mean")
    if median < REPRESENTATIVE:
        remedies.append("its heads disagree: compare head_reduction: mean, or another layer")
    return Check(name, "note" if remedies else "ok", finding, "; ".join(remedies))


def _separation(scores: Float[np.ndarray, "turn layer"], answers: Sequence[Answer], layer: int) -> Check:
    """Lengths alone separate a little, too: so equal attention to all tokens stands beside the layer's."""
    truth = [answer.depends_on_context for answer in answers]
    value, low, high = auc(truth, scores[:, layer])
    others = {
        "mean over heads": [answer.to_user[layer].mean().item() for answer in answers],
        "equal attention": [answer.uniform.mean().item() for answer in answers],
    }
    beside = [f"{name} {auc(truth, of_it, samples=1)[0]:.2f}" for name, of_it in others.items()]
    areas = [auc(truth, scores[:, other], samples=1)[0] for other in range(scores.shape[1])]
    best = int(np.argmax(areas))
    finding = (
        f"AUC {value:.2f} ({low:.2f} to {high:.2f}), {sum(truth)} of {len(truth)} answers need their passage; "
        f"{', '.join(beside)}, best layer {best}: {areas[best]:.2f}"
    )
    if low > 0.5:
        return Check(f"layer {layer}: separation", "ok", finding)
    remedy = "these answers do not show that it finds them: score a sample of your own conversations at all layers"
    if auc(truth, others["mean over heads"])[1] > 0.5:
        remedy += ", also with head_reduction: mean"
    return Check(f"layer {layer}: separation", "note", finding, remedy)


def rank_correlation(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray | np.float64:
    """Spearman's rank correlation along an axis, the others broadcast, in [-1, 1]; 0 where all of one side is equal."""
    a, b = (rankdata(side, axis=axis) for side in np.broadcast_arrays(a, b))
    a, b = (side - side.mean(axis=axis, keepdims=True) for side in (a, b))
    spread = np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))
    return (a * b).sum(axis=axis) / np.where(spread > 0, spread, np.inf)


# What a reader sees


def show(frame: pd.DataFrame, tokenizer: Any, console: Console) -> None:
    """The checks, one line each with its remedy below, and a conversation in the colours of its roles.

    Nothing that comes from a model, a template or a text is read as markup.
    """
    colours = {"fail": "bold red", "note": "yellow", "ok": "green"}
    table = Table.grid(padding=(0, 2))
    for row in frame.itertuples():
        said = Text(_printable(row.finding)).append(f"\n→ {_printable(row.remedy)}" if row.remedy else "", style="bold")
        table.add_row(Text(row.verdict, style=colours[row.verdict]), Text(row.check), said)
    console.print(table)
    counted = frame["verdict"].value_counts()
    console.print(Text("\n" + ", ".join(f"{counted.get(verdict, 0)} {verdict}" for verdict in VERDICTS)))
    if _renders(tokenizer):
        _, talk = _forged(tokenizer, _with_odd_text(_expressible(tokenizer)))
        console.print(role_strip(tokenizer, talk, role_map(tokenizer, talk), console.color_system is not None))


def role_strip(tokenizer: Any, talk: Sequence[Message], role_of: RoleMap, coloured: bool) -> Text:
    """The tokens of a conversation, each run of a role in its colour, or in brackets behind its name."""
    contents, strip = "".join(message.content for message in talk), Text("\n")
    styles = {role: f"{'white' if role in ('bos', 'user') else 'black'} on {ROLE_COLOURS[role]}" for role in ROLES}
    if coloured:
        for role in ROLES:
            strip.append(f" {role} ", style=styles[role]).append(" ")
        strip.append("\n\n")
    borders = (role_of.roles.diff(prepend=role_of.roles.new_tensor([-1])) != 0).nonzero().flatten().tolist()
    for start, stop in zip(borders, [*borders[1:], len(role_of)], strict=True):
        role, chars = ROLES[role_of.roles[start]], role_of.chars[start:stop]
        of_template = chars[0, 0] < 0
        text = tokenizer.decode(role_of.ids[start:stop]) if of_template else contents[chars[0, 0] : chars[-1, 1]]
        shown = _printable(text)
        strip.append(*(shown, styles[role]) if coloured else (f"{role}‹{shown}› ",))
    return strip


def _printable(text: str) -> str:
    """A line break as a sign, and nothing that steers a terminal."""
    return "".join(c if c.isprintable() or c == "\u200d" else "↵" if c == "\n" else repr(c)[1:-1] for c in text)
