"""Findings for a person: a line per verdict, the remedy below what is not well. Pure."""

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
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for one in found:  # what is the same on several machines is one line
        rows.setdefault((one.verdict, one.check, one.text, one.remedy), []).append(one.subject)
    for (verdict, check, text, remedy), subjects in rows.items():
        words = plain(text) + (f"\n-> {plain(remedy)}" if remedy else "")
        table.add_row(Text(verdict, STYLES[verdict]), Text(plain(", ".join(subjects))), check, Text(words))
    return table


def plain(text: str) -> str:
    """Nothing that another machine says is taken for control sequences of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
