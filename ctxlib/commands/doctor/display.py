"""An examination as printed in a terminal."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctxlib.commands.doctor.check import VERDICTS
from ctxlib.commands.doctor.talk import expressible, forged_marker, renders, with_odd_text
from ctxlib.conversations import Message
from ctxlib.figures import ROLE_COLOURS
from ctxlib.roles import ROLES, RoleMap, role_map


def print_examination(frame: pd.DataFrame, tokenizer: Any, console: Console) -> None:
    """The checks, one line each with its remedy below, and a conversation in the colours of its roles.

    Text from a model, a template or a conversation is never read as markup.
    """
    colours = {"fail": "bold red", "note": "yellow", "ok": "green"}
    table = Table.grid(padding=(0, 2))
    for row in frame.itertuples():
        said = Text(_printable(row.finding)).append(f"\n→ {_printable(row.remedy)}" if row.remedy else "", style="bold")
        table.add_row(Text(row.verdict, style=colours[row.verdict]), Text(row.check), said)
    console.print(table)
    counted = frame["verdict"].value_counts()
    console.print(Text("\n" + ", ".join(f"{counted.get(verdict, 0)} {verdict}" for verdict in VERDICTS)))
    if renders(tokenizer):
        _, talk = forged_marker(tokenizer, with_odd_text(expressible(tokenizer)))
        console.print(role_strip(tokenizer, talk, role_map(tokenizer, talk), console.color_system is not None))


def role_strip(tokenizer: Any, talk: Sequence[Message], role_of: RoleMap, coloured: bool) -> Text:
    """The tokens of a conversation, each run of one role in its colour, or in brackets after the role's name."""
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
    """Line breaks as a visible sign, control characters escaped."""
    return "".join(c if c.isprintable() or c == "\u200d" else "↵" if c == "\n" else repr(c)[1:-1] for c in text)
