#!/usr/bin/env python
"""Check the machines of a hostfile, and start a job on them.

    python launch/hosts.py check hostfile
    python launch/hosts.py run hostfile launch/train.py ...

check  the same as `python launch/doctor.py --hostfile hostfile`
run    log in to every host at once, compare environments, then start `deepspeed --hostfile ...`. Its ssh gives up dead
       hosts. It gets a port of its own and the address by which the other machines know the first one. It forwards the
       variables GEMINI_GNN_*, NCCL_*, OMP_* and DS_ACCELERATOR.
"""

from __future__ import annotations

import os
from pathlib import Path

import doctor

from gemini_gnn.cluster import hosts
from gemini_gnn.cluster.doctor import verdicts
from gemini_gnn.cluster.doctor.examine import master_address
from gemini_gnn.compose import exit_with, take
from gemini_gnn.errors import ClusterError


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in ("check", "run") or (arguments[0] == "check") != (len(arguments) == 2):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    verb, path, *command = arguments
    if verb == "check":
        return doctor.main(["--hostfile", path])
    _, settings = take(command, "run_dir")
    found, document = doctor.examined(Path(path), Path(settings.get("run_dir") or "runs/default"), thorough=False)
    doctor.show(found)
    machines = document["machines"]
    if bad := verdicts.refused(found):
        raise ClusterError(f"{len(bad)} of {len(machines)} hosts cannot take part: {', '.join(bad)}; see the table")
    return hosts.run(Path(path), len(machines), master_address(machines), command, os.environ)


if __name__ == "__main__":
    exit_with(main)
