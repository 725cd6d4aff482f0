"""Shared by all benchmarks: the machine and versions, contenders in turns, one JSON per benchmark."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def git(*words: str) -> str | None:
    """What git says about this project; None without git, or of a commit that it does not know."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """The machine, the versions, the commit and the command, for the head of a result file."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("torch", "torch-geometric", "numpy", "numba", "networkx", "deepspeed", "torch-sparse", "pyg-lib")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "load_1min": os.getloadavg()[0],
        "commit": git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def in_turns(
    contenders: Mapping[str, Callable[[int], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[tuple[float, Any]]]:
    """``{name: [(seconds, result of f(round)), ...]}``; the contenders take turns, so that a slow minute of the machine
    hits all of them. For one-threaded work on a busy machine, ``time.process_time`` leaves out the waiting."""
    taken: dict[str, list[tuple[float, Any]]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, call in contenders.items():
            began = clock()
            result = call(turn)
            taken[name].append((clock() - began, result))
    return taken


def pace(events: Sequence[Mapping[str, Any]], begin: int) -> tuple[float, float]:
    """Seconds per step, and steps per snapshot, from the end of step ``begin`` on; of the events of a rank."""
    steps = [event for event in events if event["kind"] == "step" and event["step"] >= begin]
    captured = sum(event["captured"] for event in steps[1:])
    many = len(steps) - 1
    return (steps[-1]["t"] - steps[0]["t"]) / many, many / captured if captured else float("inf")


def cpu_of(pids: Iterable[int]) -> float:
    """Seconds of CPU time that living processes have taken."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def median(values) -> float:
    return float(statistics.median(values))


def write(path: str | Path, results: Mapping[str, Any]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {path}")
