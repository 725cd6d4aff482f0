#!/usr/bin/env python
"""Check the machines of a hostfile, and start a job on them.

    python launch/hosts.py check hostfile
    python launch/hosts.py run hostfile launch/train.py ...
    python launch/hosts.py private hostfile run_dir=RUN_DIR

check  the same as `python launch/doctor.py --hostfile hostfile`
run    log in to every host at once, compare environments, then start `deepspeed --hostfile ...`. Its ssh gives up dead
       hosts. It gets a port of its own and the address by which the other machines know the first one. It forwards the
       variables GEMINI_GNN_*, NCCL_*, OMP_* and DS_ACCELERATOR.
private  for machines without a shared file system: make RUN_DIR on the disk of each, before the first start, and on a new
       machine before it joins. More than half of these machines must live for a job to survive a lost one
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
from gemini_gnn.observe.progress import say
from gemini_gnn.observe.spread import spread


def main(arguments: list[str]) -> int:
    known = {"check": 2, "private": 3, "run": len(arguments)}
    if len(arguments) != known.get(arguments[0] if arguments else "") or len(arguments) < 2 + (arguments[0] == "run"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    verb, path, *command = arguments
    if verb == "check":
        return doctor.main(["--hostfile", path])
    rest, settings = take(command, "run_dir")
    if verb == "private":
        if rest or not settings.get("run_dir"):
            raise ClusterError(f"private: expected run_dir=RUN_DIR, a folder on each machine's own disk; got {command}")
        for line in spread(hosts.read_hostfile(Path(path)), Path.cwd(), Path(settings["run_dir"]).absolute(), say):
            print(line)
        return 0
    found, document = doctor.examined(Path(path), Path(settings.get("run_dir") or "runs/default"), thorough=False)
    doctor.show(found)
    machines = document["machines"]
    if bad := verdicts.refused(found):
        raise ClusterError(f"{len(bad)} of {len(machines)} hosts cannot take part: {', '.join(bad)}; see the table")
    return hosts.run(Path(path), len(machines), master_address(machines), command, os.environ)


if __name__ == "__main__":
    exit_with(main)
