#!/usr/bin/env python
"""Check the machines of a hostfile, and start a job on them.

    python launch/hosts.py check hostfile
    python launch/hosts.py run hostfile launch/train.py ...

check  read the hostfile, log in to every host at once, compare environments, print a table
run    do the same, then start `deepspeed --hostfile ...`. Its ssh gives up dead hosts. It gets a port of its own and
       the address by which the other machines know the first one. It forwards the variables GEMINI_GNN_*, NCCL_*,
       OMP_* and DS_ACCELERATOR.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemini_gnn.cluster import hosts
from gemini_gnn.compose import exit_with


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in ("check", "run") or (arguments[0] == "check") != (len(arguments) == 2):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    verb, path, *command = arguments
    answers = hosts.check(Path(path), os.environ, Path.cwd())
    return hosts.run(Path(path), answers, command, os.environ) if verb == "run" else 0


if __name__ == "__main__":
    exit_with(main)
