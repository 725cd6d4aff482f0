"""The harm: a trainer asks at every mark on its board whether a fault is due, and commits it.

A fault of the schedule fires once per job. Whoever commits it first creates ``<run_dir>/faults/<name>`` exclusively, and
only then does harm: the file is there when the next trainer of this rank, or agent of this machine, looks. A process that
is killed in between has lost the fault, never doubled it. ``resume=never`` puts the folder aside with the old results.

The seconds of ``@ S s`` count from ``<run_dir>/faults/begun``, on the clock on the wall: the job has no other that outlives
its processes. A clock that jumps, or that of another machine, shifts faults by as much, and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from gemini_gnn import cgroups
from gemini_gnn.errors import ConfigError
from gemini_gnn.faults.schedule import OF_RANK, Fault, due
from gemini_gnn.files import create, read_record

FOLDER, BEGUN = "faults", "begun"
CHUNK_BYTES = 1 << 24

armed: list[tuple[Fault, Path | None]] = []  # of this process; with the file that claims it, None: no claim
_begun_s, _step = 0.0, 0


class InjectedFault(RuntimeError):
    """Raised by a ``raise-rank`` fault. Not a GeminiError: it stands for a bug in somebody's code."""


def install(faults: Mapping[str, Fault], rank: int, run_dir: Path, steps_done: int) -> None:
    """Arm what is left of a job's faults for the trainer of ``rank``, which starts now. ``faults``: see ``schedule.planned``.

    Raises:
        ConfigError: a fault of this rank would take the machine's memory.
    """
    global _begun_s, _step
    armed.clear()  # of a run before this one in the same process
    if not faults:
        return
    _begun_s, _step = begun(run_dir), steps_done
    fired = committed(run_dir)
    for name, fault in faults.items():
        if fault.kind in OF_RANK and fault.target == str(rank) and name not in fired:
            arm(fault, run_dir / FOLDER / name)
    at("start-up")


def arm(fault: Fault, claim: Path | None = None) -> None:
    """Commit ``fault`` of this rank at the first mark at which it is due.

    Raises:
        ConfigError: see :func:`memory_to_fill`.
    """
    if fault.kind == "oom-rank":
        memory_to_fill()
    armed.append((fault, claim))


def order(fault: Fault) -> None:
    """Commit the fault of an ``inject`` command: at the next mark of its phase, else at once.

    Raises:
        InjectedFault: see :func:`commit`.
    """
    if fault.phase is None:
        commit(fault, "as ordered")
    else:
        arm(fault)


def at(phase: str, step: int | None = None) -> None:
    """This trainer is in ``phase`` of ``step`` (None: of the same). Only called where something is armed."""
    global _step
    if step is not None:  # the training thread's alone: the one that prepares batches names none
        _step = step
    for one in tuple(armed):
        fault, file = one
        if due(fault, _step, time.time() - _begun_s, phase):
            armed.remove(one)
            if file is None or claim(file, step=_step, phase=phase):
                commit(fault, f"in {phase} of step {_step}")


def commit(fault: Fault, where: str) -> None:
    """Do the harm of ``fault`` to this process.

    Raises:
        InjectedFault: a ``raise-rank`` fault. No other returns, unless it is stopped and goes on.
        ConfigError: see :func:`memory_to_fill`.
    """
    if fault.kind == "raise-rank":
        raise InjectedFault(f"injected fault: {fault}, {where}")
    print(f"injected fault: {fault}, {where}", file=sys.stderr, flush=True)
    if fault.kind == "kill-rank":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop-rank":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "hang-collective":
        threading.Event().wait()  # on purpose the one wait here without a deadline
    else:
        held = [b"\1" * CHUNK_BYTES for _ in range(memory_to_fill() // CHUNK_BYTES)]
        raise InjectedFault(f"injected fault: oom-rank took {len(held) * CHUNK_BYTES >> 20} MiB and was not killed")


def memory_to_fill() -> int:
    """Bytes after which the kernel kills this process, and none outside its memory cgroup: what is left to that, and half
    of what the machine has free besides. Where swap hides the limit, they end before the machine does.

    Raises:
        ConfigError: no limit would be met before the machine has no memory left.
    """
    left = min((left for _, left in cgroups.left()), default=None)
    free = cgroups.machine_left()
    if left is None or free is None or left >= free:
        limit = "no limit" if left is None else f"{left >> 20} MiB left to it"
        raise ConfigError(
            "oom-rank: expected a memory cgroup with less left to it than the machine has free, else the whole machine "
            f"runs out of memory; got {limit}, {(free or 0) >> 20} MiB free. Start the job within one: "
            "systemd-run --scope -p MemoryMax=8G COMMAND, docker run --memory=8g, or sbatch --mem=8G"
        )
    return (left + free) // 2


def committed(run_dir: Path) -> set[str]:
    """The names of the faults that were committed, by any process of the job."""
    folder = run_dir / FOLDER
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def claim(file: Path, **details: object) -> bool:
    """Whether this process is the one that commits the fault of ``file``: it then has until the end of the job."""
    file.parent.mkdir(exist_ok=True)
    record = {"time": time.time(), "pid": os.getpid(), "machine": os.uname().nodename, **details}
    return create(file, json.dumps(record))


def begun(run_dir: Path) -> float:
    """When the job first began, on the clock on the wall; the first process that asks writes it down."""
    file = run_dir / FOLDER / BEGUN
    if not file.exists():
        claim(file)
    return float(read_record(file).get("time", time.time()))
