"""Checks of a chat template: roles of its tokens, contents that it drops, where an answer ends."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from ctxlib.commands.doctor.check import Check
from ctxlib.commands.doctor.talk import TALK, dicts, expressible, forged_marker, gaps, rendered, with_odd_text
from ctxlib.conversations import Message
from ctxlib.roles import ROLES, Role, role_map


def check_no_template(tokenizer: Any) -> list[Check]:
    if tokenizer.chat_template:
        expressible(tokenizer)  # raises the reason
    remedy = "name one: --chat-template FILE, models.chat_template in a params file"
    return [Check("template", "fail", "the tokenizer has no chat template", remedy)]


def _roles(tokenizer: Any) -> list[Check]:
    """Roles partition the tokens, ids equal those of transformers, and a forged answer marker stays the user's."""
    talk = with_odd_text(expressible(tokenizer))
    odd = role_map(tokenizer, talk)
    same = _ids(tokenizer, talk) == tokenizer.apply_chat_template(dicts(talk), return_dict=True)["input_ids"]
    marker, forged = forged_marker(tokenizer, talk)
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
    opening, _, later_opening, *_ = gaps(tokenizer, TALK[1:])
    opening = opening.removeprefix(tokenizer.bos_token or "")
    user_marker = os.path.commonprefix([opening[::-1], later_opening[::-1]])[::-1]  # noqa: RUF071 (it is meant)
    default = opening.removesuffix(user_marker)
    added = f"; without one it writes {_quoted(default)}" if default.strip() else ""
    remedy = "write system texts into the first user message, or drop them"
    if len(expressible(tokenizer)) < len(TALK):
        return [Check("template: system text", "note", f"is refused{added}", remedy)]
    if TALK[0].content not in rendered(tokenizer, TALK):
        return [Check("template: system text", "note", f"is left out{added}", remedy)]
    folded = user_marker.strip() and not gaps(tokenizer, TALK)[1].endswith(user_marker)
    finding = "is folded into the first user's turn, and keeps its role" if folded else "is outside the user's turn"
    return [Check("template: system text", "ok", finding + added)]


def _contents(tokenizer: Any) -> list[Check]:
    """Whether spaces at the edges, earlier turns, and the reasoning in earlier answers are kept."""
    talk = expressible(tokenizer)
    spaced = rendered(tokenizer, [Message(message.role, f"  {message.content}  ") for message in talk])
    thinking = [Message("user", "?"), Message("assistant", "<think>\nIt flew.\n</think>\n\nOff.")]
    shown = rendered(tokenizer, talk)
    dropped = [message.content for message in talk if message.content not in shown]
    trims = [message.role for message in talk if f"  {message.content}  " not in spaced]
    found = [f"trims {', '.join(dict.fromkeys(trims))}" if trims else "keeps spaces at the edges"]
    found.append(f"drops {len(dropped)} of {len(talk)} earlier messages" if dropped else "keeps earlier turns")
    reasoning = "It flew." in rendered(tokenizer, [*thinking, *TALK[1:3]])
    found.append("keeps earlier reasoning" if reasoning else "drops earlier reasoning")
    remedies = ["use a template that keeps them: what is not shown is neither read nor scored"] * bool(dropped)
    remedies += ["the score of an earlier answer is that of what is left of it"] * (not reasoning)
    return [Check("template: contents", "note" if remedies else "ok", ", ".join(found), "; ".join(remedies))]


def _bos(tokenizer: Any) -> list[Check]:
    bos, name = tokenizer.bos_token_id, "template: bos"
    if bos is None:
        return [Check(name, "ok", "the tokenizer has none")]
    talk = expressible(tokenizer)
    ours, theirs = role_map(tokenizer, talk).ids.tolist(), _ids(tokenizer, talk)
    again = tokenizer(rendered(tokenizer, talk)).input_ids
    if ours[:2] == [bos, bos]:
        return [Check(name, "fail", "is written twice at the start", "take one of the two out of the template")]
    if theirs[:1] == [bos]:
        doubled = "; tokenising the rendered text would put a second one in front" if again[:2] == [bos, bos] else ""
        return [Check(name, "ok", f"written once, by the template{doubled}")]
    finding = "not written by the template: ctxlib puts one in front, apply_chat_template does not"
    return [Check(name, "note", finding, "start the template with {{ bos_token }}, so that other tools see the same")]


def _borders(tokenizer: Any) -> list[Check]:
    """Tokens that hold characters of a content and of the template beside it; they have the role of the content."""
    talk = expressible(tokenizer)
    text, contents = rendered(tokenizer, talk), "".join(message.content for message in talk)
    role_of, merged, cut = role_map(tokenizer, talk), [], False
    for n, (start, stop) in enumerate(role_of.chars.tolist()):
        before, upto = (tokenizer.decode(role_of.ids[:end]) for end in (n, n + 1))
        token, piece = upto[len(before) :], contents[start:stop]
        if start >= 0 and piece in token and token != piece and token in text:
            merged.append(token)
            cut = cut or bool(token.replace(piece, "", 1).strip())
    said = f": {', '.join(map(_quoted, dict.fromkeys(merged)))}" if merged else ""
    finding = f"{len(merged)} of {2 * len(talk)} borders lie inside a token{said}"
    remedy = "add the template's markers as tokens, or use this tokenizer's own template"
    return [Check("template: borders", "note" if cut else "ok", finding, remedy if cut else "")]


def _generation_prompt(tokenizer: Any) -> list[Check]:
    """Whether a prompt with its answer continues the prompt alone, token by token, as training and inference need."""
    talk, name = expressible(tokenizer), "template: answers"
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


def _control_ids(tokenizer: Any) -> set[int]:
    """Special tokens except the unknown one, which any text can contain."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def _ids(tokenizer: Any, talk: Sequence[Message]) -> list[int]:
    return role_map(tokenizer, talk, bos=False).ids.tolist()


def _quoted(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:40]} … {shown[-15:]}"
