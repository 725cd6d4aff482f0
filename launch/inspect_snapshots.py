"""Show the snapshots in the host memory of this machine, and remove those of dead jobs.

    python launch/inspect_snapshots.py [--job JOB] [--arena /dev/shm] [--no-checksum] [--sweep]

It prints one line per snapshot slot: shard, owner (rank), identity (term-generation-step), state, bytes, age, check.
The check compares the bytes with their checksum; "busy" means that a trainer writes the slot now. A job is dead when no
worker agent holds its lock. Its snapshots stay until they are swept, because the same command can still resume from them.
"""

from __future__ import annotations

import argparse

from gemini_gnn.compose import exit_with
from gemini_gnn.snapshot.store.inspect import inspect, sweep, table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Show the snapshots in the host memory of this machine.")
    parser.add_argument("--job", help="show only this job (the name of its arena folder)")
    parser.add_argument("--arena", default="/dev/shm", help="look at this RAM file system (default: %(default)s)")
    parser.add_argument("--no-checksum", action="store_true", help="do not read the bytes")
    parser.add_argument(
        "--sweep", action="store_true", help="remove the snapshots of dead jobs, which then cannot resume"
    )
    options = parser.parse_args(arguments)
    print(table(inspect(options.arena, options.job, checksum=not options.no_checksum)))
    if options.sweep:
        for line in sweep(options.arena, options.job):
            print(line)
    return 0


if __name__ == "__main__":
    exit_with(main)
