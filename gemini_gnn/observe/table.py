"""The news of a job for a person: from the document of ``observe.news`` to what ``rich`` prints. Pure.

Nothing in a status is taken for markup or for a terminal's control sequences.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

STYLES = {"running": "green", "done": "green", "failed": "red", "recovering": "yellow", "waiting": "yellow"}
LATE = 3  # heartbeats without a word after which a machine is shown as silent


def picture(document: Mapping[str, Any]) -> Group:
    """The job as lines of text and tables."""
    first, *more = head(document)
    lines = [Text(first, style=f"bold {STYLES.get(document.get('state', ''), '')}".strip()), *map(Text, more)]
    tables = [
        _table(machine_rows(document), ("machine", "ranks", "state", "snapshots")),
        _table(rank_rows(document), ("rank", "machine", "step", "doing", "newest snapshot", "age")),
        _table(failure_rows(document), ("failure", "of", "step", "lost", "took", "of which")),
    ]
    return Group(*lines, *(table for table in tables if table.row_count), *map(Text, foot(document)))


def _table(rows: Sequence[Sequence[str]], titles: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def plain(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)


# --- lines --------------------------------------------------------------------------------------------------------------


def head(document: Mapping[str, Any]) -> list[str]:
    state = document.get("state")
    line = f"{document.get('run_dir', '')}: {state or 'no status has been written yet'}"
    if state and document.get("root") != "ended" and document.get("state_s") is not None:
        line += f" for {span(document['state_s'])}"
    if state == "running" and not document.get("recovers_from") and document.get("healthy") is False:
        line += ", replicating: no snapshot of this generation has all its copies yet"
    lines = [line]
    if document.get("reason") not in (None, state):
        lines.append(f"reason: {document['reason']}")
    if document.get("recovers_from"):
        lines.append(f"recovers from: {document['recovers_from']}")
    if document.get("step"):
        lines.append(_progress(document))
    lines.append(_copies(document))
    where = [f"{name} {document[name]}" for name in ("term", "generation") if document.get(name) is not None]
    if document.get("pid"):
        where.append(f"root: process {document['pid']} on {document.get('machine')}")
    if document.get("address"):
        where.append(f"at {document['address']}")
    lines.append(", ".join(where))
    return [plain(line) for line in [*lines, news(document)] if line]


def _progress(document: Mapping[str, Any]) -> str:
    step, total, step_s = document["step"], document.get("total_steps"), document.get("step_s")
    line = f"step {step}" + (f" of {total}" if total else "")
    if step_s:
        line += f", {span(step_s)} each"
        if total and document.get("root") != "ended":
            line += f", {span((total - step) * step_s)} left"
    return line


def _copies(document: Mapping[str, Any]) -> str:
    parts = []
    if document.get("replicas", 1) > 1:
        newest = document.get("recoverable")
        named = (
            f"the newest with all of them is {'-'.join(map(str, newest))}" if newest else "no snapshot has all of them"
        )
        parts.append(f"{document['replicas']} copies of each shard, {named}")
    if document.get("checkpoint"):
        parts.append(f"newest checkpoint of this start {'-'.join(map(str, document['checkpoint']))}")
    return "; ".join(parts)


def news(document: Mapping[str, Any]) -> str:
    """From when the news is, and whether more is to come."""
    when = "no status yet"
    if "time" in document:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(document["time"]))
        when = f"as of {clock} by the clock of {document.get('machine')}"
        if document.get("age_s") is not None:
            when += f", {span(max(0.0, document['age_s']))} ago"
    newest = document.get("newest_term")
    if newest != document.get("term", newest):
        when += f"; since then term {newest} has begun"
    return when + {
        "ended": "; the job has ended",
        "lives": "; its root writes",
        "silent": f"; its root has not written for the {span(document['unchanged_s'])} of this look",
        "gone": "; its root is gone. If no other takes its place, type the command of the job again",
    }.get(document["root"], "; looking whether its root still writes")


def foot(document: Mapping[str, Any]) -> list[str]:
    count = document.get("failure_count")
    if count is None:
        return []
    goodput = document.get("goodput")
    line = f"failures: {count}"
    if count:
        line += f", {span(document['recovery_total_s'])} of recovery and {span(document['lost_work_s'])} of steps done again"
    lines = [line + (f"; goodput {goodput:.1%}" if goodput is not None and document.get("step") else "")]
    if count > len(document.get("failures", [])):
        lines.append("failures.jsonl has the older ones")
    return lines


# --- rows ---------------------------------------------------------------------------------------------------------------


def machine_rows(document: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            (one.get("machine") or f"machine {number}") + (" (root)" if one.get("root") else ""),
            ", ".join(map(str, one.get("ranks", []))) or ("standby" if one.get("here") else "none"),
            _presence(one, LATE * document.get("heartbeat_s", 0.5)),
            "" if one.get("memory_bytes") is None else decimal(one["memory_bytes"]),
        ]
        for number, one in enumerate(document.get("machines", []), 1)
    ]


def _presence(machine: Mapping[str, Any], late_s: float) -> str:
    if not machine.get("here"):
        return "not here yet" if machine.get("here_s") is None else f"away for {span(machine['here_s'])}"
    silent_s = machine.get("silent_s") or 0.0
    state = "ready" if machine.get("ready") else "not ready"
    return f"silent for {span(silent_s)}" if silent_s > late_s else state


def rank_rows(document: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for one in document.get("ranks", []):
        does = f"{one['phase']} for {span(one['phase_s'])}" if "phase" in one else "not heard of"
        if not one.get("alive"):
            does = f"ended in {one['phase']}" if "phase" in one else "does not run"
        snapshot = "-".join(map(str, one.get("snapshot", [])))
        age = span(one["snapshot_s"]) if "snapshot_s" in one else ""
        rows.append([str(one["rank"]), one.get("machine", ""), str(one.get("step", "")), does, snapshot, age])
    return rows


def failure_rows(document: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for one in document.get("failures", []):
        where = f"rank {one['rank']}" if "rank" in one else one.get("machine", "")
        parts = [f"{name.removesuffix('_s')} {span(s)}" for name, s in one["parts"].items() if s >= 0.0005]
        took = span(one["recovery_s"]) + (" (interrupted)" if one["interrupted"] else "")
        rows.append(
            [one["kind"], where, str(one["step"]), str(one["steps_lost"]), took, ", ".join(parts).replace("_", " ")]
        )
    return rows


# --- words --------------------------------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """A time in words, with two or three digits that matter."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
