"""The log of a rank: everything it prints, C++ libraries and crashes included, start after start.

A line that the disk has no room for is dropped: training does not die of it. The last lines before a SIGKILL or a
segmentation fault are in the file, since nothing stands between.
"""

from __future__ import annotations

import faulthandler
import io
import os
import re
import sys
from pathlib import Path
from typing import Any


class _Tolerant(io.FileIO):
    """A raw file that drops what cannot be written (disk full, file system gone) instead of raising."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def header(rank: int, machine: str, pid: int, when: str) -> str:
    """The line that begins a start in a log."""
    return f"--- rank {rank} on {machine}, pid {pid}, {when} ---\n"


ENDED = "[gemini_gnn] ended by "  # how a line begins that an agent adds about a consequence


def without_headers(output: bytes) -> bytes:
    """The output of the program alone: a person who watches one rank needs neither lines between starts nor consequences."""
    added = rb"--- rank \d+ on \S+, pid \d+, [^\n]* ---\n|" + re.escape(ENDED.encode()) + rb"[^\n]*\n"
    return re.sub(rb"(?m)^(?:" + added + rb")", b"", output)


def redirect(log: Path) -> None:
    """Standard input from nowhere, output and errors of this process to the end of ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, number in ((nowhere, 0), (output, 1), (output, 2)):
        os.dup2(source, number)
    os.close(nowhere)
    os.close(output)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(  # a line, or a progress bar's \r, at once
            io.BufferedWriter(_Tolerant(number, "w", closefd=False)), errors="backslashreplace", line_buffering=True
        )
        for number in (1, 2)
    )
    faulthandler.enable(2)
