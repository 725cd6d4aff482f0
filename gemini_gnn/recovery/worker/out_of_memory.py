"""Whether the kernel killed for want of memory, as the counter of this agent's memory cgroup says. Where there is none: no claim.

The trainers are in the agent's own cgroup, and ``oom_kill`` counts every process in it that the kernel ended, whichever limit
above it was reached. The kernel counts first and kills then, so who has seen the death reads the new number.
"""

from __future__ import annotations

from pathlib import Path

from gemini_gnn import cgroups

FILES = ("memory.events", "memory.oom_control")  # of cgroup v2, v1


def kills(text: str) -> int | None:
    """The number after ``oom_kill`` in one of ``FILES``; None where there is none (v1 before Linux 4.13)."""
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        if name == "oom_kill" and number.isdigit():
            return int(number)
    return None


def own_cgroup() -> Path | None:
    """The memory cgroup of this process; None where it cannot be seen."""
    return next((folder for folder, _ in cgroups.groups()), None)


class Counter:
    """Kills since the last look."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._before = self._read()

    def why(self) -> str:
        """Why a process of ours was killed just now, where the kernel did it for want of memory since the last look; else ""."""
        before, self._before = self._before, self._read()
        if before is None or self._before is None or self._before <= before:
            return ""
        return f"out of memory (memory cgroup {self.folder})"

    def _read(self) -> int | None:
        if self.folder is None:
            return None
        for name in FILES:
            try:
                return kills((self.folder / name).read_text())
            except OSError:
                continue
        return None
