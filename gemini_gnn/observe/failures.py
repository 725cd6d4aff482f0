"""``failures.jsonl``: what each failure of a run cost, one line each; and the same in ``result.json`` when the run is complete.

The worker agent that decides for the job writes both: a line when the job goes on, the result after rank 0 has written it.
A line says how the parts of recovery_s add up: ``recovery.root.accounting``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemini_gnn.files import read_record, write_atomically

FAILURES = "failures.jsonl"


def read_failures(run_dir: Path) -> list[dict[str, Any]]:
    """The failures of all terms so far; a line that a loss of power has cut is left out.

    Raises:
        OSError: of the file system.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / FAILURES).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [failure for failure in found if isinstance(failure, dict)]


def add_to_result(run_dir: Path, failures: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> bool:
    """Write ``failures`` and what they cost together into ``result.json``. False: there is no whole one, nothing is done.

    Doing it again changes nothing: an agent may be killed before it has noted that it did.

    Raises:
        OSError: of the file system.
    """
    result = read_record(run_dir / "result.json")
    if not result:
        return False
    result |= {"failures": list(failures)}
    result |= {name: totals[name] for name in ("goodput", "recovery_total_s", "lost_work_s")}
    write_atomically(run_dir / "result.json", json.dumps(result, indent=1))
    return True
