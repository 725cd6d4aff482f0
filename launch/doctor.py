#!/usr/bin/env python
"""Examine the machines before the first job: python launch/doctor.py [--hostfile FILE] [--json FILE] [run_dir=RUN_DIR]

With a hostfile it asks these machines over ssh; else, in an allocation of SLURM, those of it through srun; else this one
alone. It looks at each machine, at the links between them, and at the run directory; then all of them do an all-reduce and
an all_to_all. Beside all that is not well stands what to type.

exit code   0 well, 1 something is bad, 2 the command, the hostfile or SLURM's variables are wrong
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from dataclasses import asdict
from pathlib import Path

from gemini_gnn import files
from gemini_gnn.cluster import hosts
from gemini_gnn.cluster.doctor import verdicts
from gemini_gnn.cluster.doctor.examine import Document, examine
from gemini_gnn.compose import exit_with, take
from gemini_gnn.observe.progress import say

PIPE_COLUMNS = 120  # of a pipe nobody knows the width


def main(arguments: list[str]) -> int:
    rest, settings = take(arguments, "run_dir")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", type=Path, help="lines like `h0 slots=4`; the machines of the job")
    parser.add_argument("--json", metavar="FILE", help="write what was found there; - prints it in place of the table")
    parser.add_argument("settings", nargs="*", metavar="run_dir=RUN_DIR", help="of the job; default: runs/default")
    options = parser.parse_args(rest)
    if options.settings:
        parser.error(f"expected run_dir=RUN_DIR; got {' '.join(options.settings)}")
    if options.json not in (None, "-") and not Path(options.json).parent.is_dir():
        parser.error(f"--json {options.json}: expected a file in a folder that exists")
    found, document = examined(options.hostfile, Path(settings.get("run_dir") or "runs/default"))
    document |= {"verdict": verdicts.worst(found), "findings": [asdict(one) for one in found]}
    if options.json == "-":
        print(json.dumps(document, indent=1))
    else:
        show(found)
    if options.json not in (None, "-"):
        files.write_atomically(Path(options.json), json.dumps(document, indent=1))
    return int(document["verdict"] == verdicts.BAD)


def examined(hostfile: Path | None, run_dir: Path, thorough: bool = True) -> tuple[list[verdicts.Finding], Document]:
    """All verdicts, and what they stand on. Nothing here looks at ``run_dir``: its file system may hang."""
    machines, how = [(socket.gethostname(), 1)], "here"
    if hostfile is not None:
        machines, how = hosts.read_hostfile(hostfile), "ssh"
    elif allocation := hosts.allocated(os.environ):
        machines, how = allocation, "srun"
    document = examine(machines, how, Path.cwd(), run_dir.absolute(), say, thorough)
    return verdicts.findings(document), document


def show(found: list[verdicts.Finding]) -> None:
    from rich.console import Console

    from gemini_gnn.cluster.doctor.table import picture

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPE_COLUMNS)
    console.print(picture(found))
    print(verdicts.summary(found), flush=True)


if __name__ == "__main__":
    exit_with(main)
