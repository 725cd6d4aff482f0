"""Show the snapshots of a job, or those in the host memory of this machine; remove those of dead jobs.

    python launch/inspect_snapshots.py run_dir=runs/my_run                     a living job, on all its machines
    python launch/inspect_snapshots.py [--job JOB] [--no-checksum] [--sweep]   this machine

With run_dir= the root agent of the job says which snapshots its machines and its storage hold, which of them can be restored,
and from where each shard would come. If no job runs, the job's snapshots on this machine are shown.

For a machine it prints one line per snapshot slot: shard, owner (rank), identity (term-generation-step), state, bytes, age,
check. The check compares the bytes with their checksum; "busy" means that a process writes the slot now. A job is dead when no
worker agent holds its lock. Its snapshots stay until they are swept, because the same command can still resume from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gemini_gnn.compose import exit_with
from gemini_gnn.errors import RecoveryError
from gemini_gnn.recovery import home, messages, visits
from gemini_gnn.snapshot.store.inspect import arenas, inspect, sweep, table

ANSWER_S = 40.0  # storage has 30 s to say which checkpoints there are


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="?", metavar="run_dir=RUN_DIR", help="the run directory of a job")
    parser.add_argument("--job", help="show only this job (the name of its arena folder)")
    parser.add_argument("--arena", default="/dev/shm", help="look at this RAM file system (default: %(default)s)")
    parser.add_argument("--no-checksum", action="store_true", help="do not read the bytes")
    parser.add_argument(
        "--sweep", action="store_true", help="remove the snapshots of dead jobs, which then cannot resume"
    )
    options = parser.parse_args(arguments)
    job = options.job
    if options.run_dir is not None:
        name, _, run_dir = options.run_dir.partition("=")
        if name != "run_dir" or not run_dir:
            parser.error(f"expected run_dir=RUN_DIR; got {options.run_dir!r}")
        try:
            print(_words(visits.ask(Path(run_dir), messages.Inspect(), messages.Catalog, ANSWER_S)))
            return 0
        except RecoveryError as error:
            print(f"{error}\non this machine:")
        job = home.job_id(Path(run_dir))
        if job not in [path.name for path in arenas(options.arena)]:
            print("no snapshots of this job in host memory here")
            return 0
    print(table(inspect(options.arena, job, checksum=not options.no_checksum)))
    if options.sweep:
        for line in sweep(options.arena, job):
            print(line)
    return 0


def _words(catalog: messages.Catalog) -> str:
    lines = [catalog.snapshots]
    if catalog.replicas > 1:
        newest = catalog.recoverable or "none yet"
        lines.append(f"newest snapshot with all {catalog.replicas} copies of every shard: {newest}")
    if catalog.silent:
        lines.append(f"without an answer of {', '.join(catalog.silent)}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
