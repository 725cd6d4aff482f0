"""A job as real processes, for the tests of recovery: start it, wait for what it notes, see what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from gemini_gnn.recovery import home, processes
from gemini_gnn.recovery.stop import stop

PATIENCE_S = 60.0  # the machine may be busy; nothing waits that long when all is well


def wait_for(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {patience_s} s"
        time.sleep(0.01)
    return value


class Job:
    """A launch in a run directory, as a user's terminal has it: a session with a launcher and its slot processes."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.arena = home.arena_of(run_dir)
        self.launches: list[subprocess.Popen[bytes]] = []

    def launch(self, world: int, target: str, **payload: Any) -> subprocess.Popen[bytes]:
        """Payload for all targets: preload, resume, recovery (settings), arena, impatient (the agent is), folder (to start in),
        closed (standard input, output and errors are, as of some daemons), late (rank 0's slot, until
        another was refused than these so many).
        """
        self.run_dir.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.recovery.targets", os.fspath(self.run_dir), str(world)]
        if payload.get("closed"):
            command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
        launch = subprocess.Popen(
            [*command, target, json.dumps(payload)],
            # Not measured for coverage: a slot that is done would then still write its data for a while, with the signals
            # its own again, and the launcher's SIGTERM, which follows a Ctrl-C, would meet it there: 1 or 241, not 130.
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")},
                "NOTES": os.fspath(self.run_dir / "notes.jsonl"),
                "MARKER": "from the shim",
            },
            cwd=payload.get("folder"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.launches.append(launch)
        return launch

    def end(self, launch: subprocess.Popen[bytes]) -> tuple[int, str, str]:
        out, err = launch.communicate(timeout=PATIENCE_S)
        return launch.returncode, out.decode(), err.decode()

    def notes(self, kind: str, **fields: Any) -> list[dict]:
        return [n for n in _lines(self.run_dir / "notes.jsonl") if n["kind"] == kind and fields.items() <= n.items()]

    def events(self, kind: str, **fields: Any) -> list[dict]:
        found = [e for path in (self.run_dir / "events").glob("agent-*.jsonl") for e in _lines(path)]
        return [e for e in found if e["kind"] == kind and fields.items() <= e.items()]

    def training(self, world: int, **fields: Any) -> list[dict]:
        wait_for(lambda: len(self.notes("training", **fields)) >= world, f"{world} trainers of {fields}")
        return self.notes("training", **fields)

    def finish(self) -> None:
        (self.run_dir / "finish").touch()

    def processes(self) -> dict[int, str]:
        """Pid and role of every process that belongs to this job."""
        names = {b"gemini_gnn.recovery.worker.agent": "agent", b"gemini_gnn.recovery.worker.warm": "warm"}
        names |= {b"tests.recovery.impatient": "agent", b"tests.recovery.targets": "launch"}
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
                    state = rest.split()[0]
                except OSError:
                    continue
                mine = {os.fsencode(self.run_dir), home.job_id(self.run_dir).encode()} & set(words)
                if mine and state != "Z":
                    role = next((role for word, role in names.items() if word in words), "launch")
                    # A warm parent that took the place of its agent has another name, and its own command line.
                    found[int(folder.name)] = "agent" if name == processes.AGENT_NAME else role
        return found

    def pid_of(self, role: str) -> int:
        """The agent, or the warm parent (what it forks looks like it, but for the name).

        A process that is about to become another program has the command line of its parent for a moment.
        """

        def alone() -> list[int]:
            pids = [pid for pid, kind in self.processes().items() if kind == role]
            with contextlib.suppress(psutil.NoSuchProcess):
                pids = [pid for pid in pids if role != "warm" or psutil.Process(pid).name() == "gnn-warm"]
            return pids if len(pids) == 1 else []

        return int(wait_for(alone, f"one {role}")[0])

    def clean(self) -> None:
        """Whatever a test has left, and only then."""
        for role in ("launch", "agent", "warm"):
            for pid in [pid for pid, kind in self.processes().items() if kind == role]:
                with_no_error(os.kill, pid, signal.SIGKILL)
        wait_for(lambda: not self.processes(), "the end of a job's processes", 10.0)
        for launch in self.launches:
            launch.communicate()
        stop(self.run_dir, keep=False)
        assert not self.arena.exists()

    def assert_nothing_left(self) -> None:
        wait_for(lambda: not self.processes(), f"the end of {self.processes()}", 10.0)
        assert not self.arena.exists(), sorted(self.arena.iterdir())


HOLD = """
import ctypes, sys
libc = ctypes.CDLL(None)
held = libc.ptrace(0x4206, int(sys.argv[1]), None, None) == 0  # PTRACE_SEIZE
print("held" if held else "not permitted", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(pid: int) -> Iterator[None]:
    """As a debugger does: killed, it is not reaped before this ends. The nearest thing to a process stuck in the kernel."""
    command = [sys.executable, "-c", HOLD, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            if holder.stdout.readline().strip() != "held":
                pytest.skip("this machine does not permit ptrace")
            yield
        finally:
            holder.stdin.close()
            holder.wait(PATIENCE_S)


@pytest.fixture
def job(tmp_path):
    jobs: list[Job] = []

    def make(name: str = "run") -> Job:
        jobs.append(Job(tmp_path / name))
        return jobs[-1]

    yield make
    for made in jobs:
        made.clean()


def with_no_error(call: Callable, *arguments: Any) -> None:
    try:
        call(*arguments)
    except ProcessLookupError:
        return


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
