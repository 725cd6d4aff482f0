"""Faults on demand: what fails, on which rank, before which step. Tests and demonstrations of recovery use it.

``GEMINI_GNN_FAULT`` holds faults separated by ``;``, each ``kind:key=value:...``:

    raise:rank=2:step=5            rank 2 raises InjectedFault instead of taking step 5
    kill:rank=1:step=7             rank 1 is killed by SIGKILL: no cleanup, no goodbye, like the OOM killer
    exit:rank=1:step=7             rank 1 exits at once with code 17, without a word
    hang:rank=0:step=3             rank 0 stops making progress, as in a deadlock; SIGTERM still ends it
    raise:rank=2:step=5:generation=1   only in that generation of the job (default 0: not again after a recovery)

Parsing and choosing are pure; only :func:`maybe_fail` does harm. A fault fires once per process: it is bound to one
step of one generation, so a trainer that restarts at an earlier step does not run into it for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemini_gnn.errors import ConfigError

VARIABLE = "GEMINI_GNN_FAULT"
KINDS = ("raise", "kill", "exit", "hang")


class InjectedFault(RuntimeError):
    """Raised by a ``raise`` fault. Not a GeminiError: it stands for a bug in somebody's code."""


@dataclass(frozen=True)
class Fault:
    """One planned failure: ``kind`` on ``rank`` just before ``step`` (0 = the first) of ``generation``."""

    kind: str
    rank: int
    step: int
    generation: int = 0


def parse_faults(text: str) -> list[Fault]:
    """The faults of a ``GEMINI_GNN_FAULT`` text (see the module docstring); empty text, no faults.

    Raises:
        ConfigError: unknown kind or key, a key that is missing or twice, a value that is not a number >= 0.
    """
    faults = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        kind, *pairs = item.split(":")
        if kind not in KINDS:
            raise ConfigError(f"{VARIABLE}: expected one of {', '.join(KINDS)} before the first ':'; got {item!r}")
        values: dict[str, int] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            known = key in ("rank", "step", "generation") and key not in values
            if not (equals and known and value.isascii() and value.isdigit()):
                raise ConfigError(
                    f"{VARIABLE}: expected rank=, step= or generation= once each, with a number >= 0; "
                    f"got {pair!r} in {item!r}"
                )
            values[key] = int(value)
        if not {"rank", "step"} <= values.keys():
            raise ConfigError(f"{VARIABLE}: expected {kind}:rank=R:step=S; got {item!r}")
        faults.append(Fault(kind, **values))
    return faults


def from_environ(environ: Mapping[str, str]) -> list[Fault]:
    """The faults this process was told to commit."""
    return parse_faults(environ.get(VARIABLE, ""))


def due(faults: Sequence[Fault], rank: int, step: int, generation: int = 0) -> Fault | None:
    """The first fault planned for exactly this rank, step and generation."""
    here = (rank, step, generation)
    return next((fault for fault in faults if (fault.rank, fault.step, fault.generation) == here), None)


def maybe_fail(faults: Sequence[Fault], rank: int, step: int, generation: int = 0) -> None:
    """Commit the fault that is due, if any. Called by the training loop before each optimizer step.

    Raises:
        InjectedFault: a ``raise`` fault is due. The other kinds do not return.
    """
    fault = due(faults, rank, step, generation)
    if fault is None:
        return
    if fault.kind == "raise":
        raise InjectedFault(f"injected fault on rank {rank} before step {step}")
    print(f"injected fault: {fault.kind} on rank {rank} before step {step}", file=sys.stderr, flush=True)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "exit":
        os._exit(17)
    threading.Event().wait()  # hang: on purpose the one wait here without a deadline
