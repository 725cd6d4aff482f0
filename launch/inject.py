"""Commit a fault in a living job: ``python launch/inject.py run_dir=runs/my_run kill-rank 2``.

    kill-rank 2 | stop-rank 1 | oom-rank 0 | hang-collective 1 | raise-rank 3      [in PHASE]
    kill-agent h1 | kill-warm h1 | kill-root                  rank:3 is the machine of rank 3
    cut-link h3 --for 20s | split h0,h1 from h2,h3 --for 20s | split h0 from others
    power-off h2 (the lab's hosts only) | corrupt-replica 3 | fill-shm h1 --for 5s | hang-filesystem [h1] --for 20s

Works from every machine that sees the run directory; a job on one machine is asked on that machine. All but kills need a
job that was started with faults.allow=true.
"""

import sys
from pathlib import Path

from gemini_gnn.compose import exit_with
from gemini_gnn.recovery.inject import inject

USAGE = "usage: python launch/inject.py run_dir=RUN_DIR FAULT [TARGET] [--for Ss] [in PHASE] [snapshot.arena=/dev/shm]"


def main(arguments: list[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, USAGE, sep="\n")
        return 0
    settings = dict(a.split("=", 1) for a in arguments if "=" in a)
    words = [a for a in arguments if "=" not in a]
    if not words or "run_dir" not in settings or not settings.keys() <= {"run_dir", "snapshot.arena"}:
        print(USAGE, file=sys.stderr)
        return 2
    print(inject(Path(settings["run_dir"]), words, arena_root=settings.get("snapshot.arena")))
    return 0


if __name__ == "__main__":
    exit_with(main)
