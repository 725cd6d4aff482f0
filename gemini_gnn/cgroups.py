"""The memory cgroups above this process (v1 and v2), and what they and the machine have left. Reads files only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

NO_LIMIT = 1 << 62  # v1 has a number for it, and rounds it to pages; v2 has the word "max"


def groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Their folders, innermost first, with the names of limit, usage and reclaimable cache."""
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    v2 = ("memory.max", "memory.current", "inactive_file")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = Path("/sys/fs/cgroup"), v2
        elif "memory" in controllers.split(","):
            base, names = Path("/sys/fs/cgroup/memory"), v1
        else:
            continue
        # Inside a container the path may be the host's: the folders that exist are the ones that count.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / names[0]).is_file():
                yield folder, names
            if folder == base:
                break


def left() -> Iterator[tuple[Path, int]]:
    """Bytes that each of them may still take; without those that have no limit."""
    for folder, (limit_name, used_name, cache_name) in groups():
        limit, used, cache = _number(folder / limit_name), _number(folder / used_name), 0
        with suppress(OSError, ValueError):
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.startswith(cache_name + " "):
                    cache = int(line.split()[1])
        if limit is not None and used is not None and limit < NO_LIMIT:
            yield folder, max(0, limit - used + cache)


def machine_left() -> int | None:
    """Bytes that the machine has free for new processes; None where it does not say."""
    with suppress(OSError, ValueError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
