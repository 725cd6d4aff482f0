"""``status.json``: the state of a job, for people and scripts. Nothing else writes the file or knows its name.

One process writes: the root agent, about once a second and at every change of `state`; without an agent rank 0's process,
when the state changes. The file is replaced as a whole. The last one stays when the job ends.

    state           starting     the machines join, or the start makes itself ready
                    running      the trainers of `generation` run; `recovers_from`: they have done no new step yet
                    recovering   trainers are killed and reaped, and all machines made ready for the next generation: each
                                 gets the shards that it lacks, also at a start
                    waiting      the same, and a machine is away
                    stopping     the job ends
                    done, stopped, failed     the job has ended; the other fields say how things stood at the end
    state_s         for so long
    reason          why the job ends or has ended. exit_code: of its slot processes; only at the end
    run_dir         as the writer sees it
    time            of this file, on the wall clock of the writer: for people, as no two machines' clocks are compared
    machine, pid    of the writer
    address         where agents of other machines reach the root; null for a job on one machine
    since           wall time at which this root began. heartbeat_s: each machine beats so often
    term, generation     of the newest trainers
    step            the newest that a trainer was in. total_steps: of the run, null: unknown. step_s: median time of one
    world_size      number of ranks
    healthy         the trainers run, and a snapshot of `generation` has all its copies: what was lost is made up for
    seats           by seat the place of its machine in `machines`; a machine without a seat is a standby, or was replaced
    machines        list of machine (null: it never came), ranks (none without a seat), root (it is the root's), here
                    (connected), here_s (here or away for so long), ready (to fork), silent_s (since its last word),
                    memory_bytes (of snapshots), address, port (where it answers if it becomes root)
    ranks           list of rank, machine, alive, step, phase, phase_s (in that phase), snapshot ([term, generation, step] of
                    the newest), snapshot_s (its age); what is not known is left out
    replicas        copies of each shard. recoverable: of several copies, the newest snapshot that has all; null: none has.
                    checkpoint: the newest complete one that this root had written
    recovers_from   the cause of the failure that the job recovers from, in words; null: of none
    failures        the newest; failures.jsonl has all, docs/recovery.md says what their fields are
    failure_count, recovery_total_s, lost_work_s, goodput     of all of them
    began_s         so long ago the first step began; null: it has not

All but `state`, `run_dir`, `time`, `machine` and `pid` may be absent. Ages (`_s`) are as of `time`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from gemini_gnn.files import read_record, write_atomically

STATUS = "status.json"
ENDED = ("done", "stopped", "failed")


def write_status(run_dir: Path, state: str, **fields: Any) -> None:
    """Replace the file.

    Args:
        state, fields: see the module docstring.

    Raises:
        OSError: of the file system.
    """
    writer = {"time": time.time(), "machine": os.uname().nodename, "pid": os.getpid()}
    record = {"state": state, "run_dir": os.fspath(run_dir), **writer, **fields}
    write_atomically(run_dir / STATUS, json.dumps(record, indent=1), durable=False)


def read_status(run_dir: Path) -> dict[str, Any]:
    """The record; empty where there is none."""
    return read_record(run_dir / STATUS)
