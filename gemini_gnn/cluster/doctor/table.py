"""Findings for a person: a line each, the remedy below what is not well. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from gemini_gnn.cluster.doctor.verdicts import BAD, OK, REMARK, Finding

STYLES = {OK: "green", REMARK: "yellow", BAD: "bold red"}


def picture(found: Sequence[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "of", "what", "found, and what to type"):
        table.add_column(title, overflow="fold")
    for one in found:
        text = plain(one.text) + (f"\n-> {plain(one.remedy)}" if one.remedy else "")
        table.add_row(Text(one.verdict, STYLES[one.verdict]), Text(plain(one.subject)), one.check, Text(text))
    return table


def plain(text: str) -> str:
    """Nothing that another machine says is taken for control sequences of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
