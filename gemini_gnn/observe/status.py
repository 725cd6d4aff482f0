"""``status.json``: the state of a job, for people and scripts. Nothing else reads or writes the file.

One process writes at a time: rank 0's trainer while it lives, otherwise the worker agent of its machine.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from gemini_gnn.files import read_record, write_atomically

STATUS = "status.json"


def write_status(run_dir: Path, state: str, **fields: Any) -> None:
    """Replace the file.

    Args:
        state: starting, running, done, failed or stopped.
        fields: step, reason and the like.

    Raises:
        OSError: of the file system.
    """
    record = {"state": state, "time": time.time(), "pid": os.getpid(), "machine": os.uname().nodename, **fields}
    write_atomically(run_dir / STATUS, json.dumps(record, indent=1), durable=False)


def read_status(run_dir: Path) -> dict[str, Any]:
    """The record; empty where there is none."""
    return read_record(run_dir / STATUS)
