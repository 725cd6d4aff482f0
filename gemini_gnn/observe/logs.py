"""Output of a rank: all of it in a file of its own; the terminal gets rank 0's, and the first error of any rank.

Who owns what
    After :func:`redirect` file descriptors 1 and 2 *are* ``logs/rank-<r>.log``, so the words of C++ libraries and of
    crashes land there too, and nothing the training thread writes can meet the terminal. What the terminal gets is
    copied from that file by a daemon thread, which alone may block on it (Ctrl-S, a full ssh pipe) or find it gone
    (EPIPE, EIO: it then ends). SIGHUP, which a vanishing terminal sends, is ignored.

What may be lost
    The last lines before a SIGKILL or a segmentation fault reach the file but perhaps not the terminal. A log line that
    the disk has no room for is dropped: training does not die of it.

Which error the user reads
    When one rank fails the others lose their connection to it, and fail with errors that only say so. Each rank writes
    ``errors/rank-<r>.json`` and marks such *consequences*; they wait a moment for the cause and are silent when
    another rank has named it. Where nobody has, the lowest rank that can still speak names the silent ones: their
    machines have lost power or network, or they were killed. Times are of different clocks, so an error that is no
    consequence counts before one that is, whatever its time.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from gemini_gnn.errors import GeminiError

SETTLE_S = 3.0  # how long a consequence waits for its cause to be written down

# What torch, gloo and NCCL say when it is the other side, or the way to it, that is gone.
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|connectfullmesh|timed? ?out|broken pipe|socket error"
    r"|failed while preparing|an earlier exchange failed|did not stop within|nccl communicator was aborted"
    r"|remote process exit|rank 0 (could not|did not) finish|failed to (connect|recv|send)|no route to host",
    re.IGNORECASE,
)


# --- output -----------------------------------------------------------------------------------------------------------


class _Tolerant(io.FileIO):
    """A raw file that drops what cannot be written (disk full, file system gone) instead of raising."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


class _Terminal:
    """The terminal as it was before :func:`redirect`, and the thread that copies the log to it."""

    def __init__(self, log: Path, copy: bool):
        self.out, self.err = os.dup(1), os.dup(2)
        self._log = os.open(log, os.O_RDONLY)
        self._offset = os.fstat(self._log).st_size  # how far the terminal has seen it
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._patience_s = 2.0  # how long to wait for the terminal at a time; nothing once it proved stuck
        self._thread = threading.Thread(target=self._follow, name="terminal", daemon=True)
        if copy:
            self._thread.start()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(0.1)  # once more after the end: what was written last
            with self._turn:
                while chunk := os.pread(self._log, 1 << 16, self._offset):
                    self._offset += len(chunk)
                    if not _write_all(self.out, chunk):
                        return

    def say(self, text: str, terminal: bool) -> None:
        """``text`` to the log, and to the terminal's stderr or not at all."""
        data = text.encode(errors="replace")
        self.flush()
        mine = self._turn.acquire(timeout=self._patience_s)  # not when the copying thread is stuck in a write
        try:
            before = os.fstat(2).st_size
            _write_all(2, data)
            if mine and self._offset == before:
                self._offset = os.fstat(2).st_size  # the terminal is not to see it a second time
        finally:
            if mine:
                self._turn.release()
        if terminal:
            writer = threading.Thread(target=_write_all, args=(self.err, data), daemon=True)
            writer.start()
            writer.join(self._patience_s)

    def flush(self) -> None:
        """Wait until the copying thread has caught up, or has given up, or proves stuck."""
        deadline = time.monotonic() + self._patience_s
        while self._thread.is_alive() and self._offset < os.fstat(2).st_size:
            if time.monotonic() > deadline:
                self._patience_s = 0.0
                return
            time.sleep(0.02)

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._patience_s)


_terminal: _Terminal | None = None


def _write_all(descriptor: int, data: bytes) -> bool:
    """False when whatever is at the other end has gone."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody made the terminal non-blocking: wait until it takes more
            import select

            select.select([], [descriptor], [], 1.0)
        except OSError:
            return False
    return True


def header(rank: int, machine: str, pid: int, when: str) -> str:
    """The line that begins a start in a log; :func:`machine_of` reads it."""
    return f"--- rank {rank} on {machine}, pid {pid}, {when} ---\n"


def redirect(run_dir: Path, rank: int, terminal: bool) -> None:
    """Send stdout and stderr of this process, C++ included, to ``run_dir/logs/rank-<rank>.log`` (appended).

    Args:
        terminal: copy everything to the old stdout as well (rank 0). Errors go to the old stderr from any rank, by
            :func:`last_words`.
    """
    global _terminal
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    path = run_dir / "logs" / f"rank-{rank}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    _write_all(log, header(rank, socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")).encode())
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the terminal has gone already
            continue
    _terminal = _Terminal(path, terminal)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(_Tolerant(number, "w", closefd=False)), errors="backslashreplace", line_buffering=True
        )
        for number in (1, 2)
    )
    faulthandler.enable(2)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda *_: None)  # a handler, not SIG_IGN: that would be inherited by programs
    import atexit

    atexit.register(_terminal.close)


# --- errors -----------------------------------------------------------------------------------------------------------


def is_consequence(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that another rank or the way to it is gone."""
    seen: BaseException | None = error
    while seen is not None:
        kind = type(seen)
        foreign = kind.__module__.startswith("torch") or kind is RuntimeError or isinstance(seen, GeminiError)
        if foreign and _PEER_LOST.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _record(rank: int, error: BaseException) -> dict[str, Any]:
    return {
        "time": time.time(),
        "rank": rank,
        "machine": socket.gethostname(),
        "type": type(error).__name__,
        "message": str(error),
        "consequence": is_consequence(error),
        "expected": isinstance(error, GeminiError),
        "traceback": "".join(traceback.format_exception(error)),
    }


def record_error(run_dir: Path, rank: int, error: BaseException) -> None:
    """Write ``errors/rank-<rank>.json``: time, machine, type, message, traceback, and whether it is a consequence."""
    folder = run_dir / "errors"
    temporary = folder / f".rank-{rank}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_record(rank, error), indent=1))
        os.replace(temporary, folder / f"rank-{rank}.json")
    except OSError as problem:  # the run directory may be what failed; the error itself still goes to stderr
        print(f"warning: cannot write {folder / f'rank-{rank}.json'}: {problem.strerror}", file=sys.stderr)


def forget_errors(run_dir: Path) -> None:
    """Remove the records of an earlier start. By rank 0, before any rank of this one may fail."""
    for path in (run_dir / "errors").glob("rank-*.json"):
        path.unlink(missing_ok=True)


def read_errors(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all ranks that have one, by rank."""
    records = []
    for path in (run_dir / "errors").glob("rank-*.json"):
        try:
            records.append(json.loads(path.read_text()))
        except (OSError, ValueError):  # being replaced, or cut off by a full disk: as good as not there
            continue
    return sorted(records, key=lambda record: record["rank"])


def choose_first(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of the error that began it: the earliest that is no consequence, else the earliest. Pure."""
    return min(records, key=lambda record: (record["consequence"], record["time"]), default=None)


def first_error(run_dir: Path) -> str | None:
    """``rank 2 on h2: ValueError: ...`` of the error that began it, or None when no rank wrote one."""
    record = choose_first(read_errors(run_dir))
    if record is None:
        return None
    return f"rank {record['rank']} on {record['machine']}: {record['type']}: {record['message']}"


def nobody_knows_why(run_dir: Path) -> bool:
    """Whether all ranks that wrote down an error have only lost others: a machine without power says nothing."""
    record = choose_first(read_errors(run_dir))
    return record is not None and record["consequence"]


def without_headers(output: bytes) -> bytes:
    """What the program wrote: for a person who watches one rank, the lines between starts are noise."""
    return re.sub(rb"(?m)^--- rank \d+ on \S+, pid \d+, [^\n]* ---\n", b"", output)


def machine_of(log_text: str) -> str | None:
    """The machine in the last header of a log."""
    found = re.findall(r"^--- rank \d+ on (\S+), pid \d+, ", log_text, re.MULTILINE)
    return found[-1] if found else None


def verdict(records: list[dict[str, Any]], rank: int, world_size: int, machines: dict[int, str]) -> str | None:
    """What rank ``rank``, which has failed, should say on the terminal; None: another one says it. Pure.

    Args:
        records: of all ranks so far, that of ``rank`` among them.
        machines: rank -> machine, as far as known.
    """
    own = next(record for record in records if record["rank"] == rank)
    if not own["consequence"]:
        return own["message"] if own["expected"] else f"{own['type']}: {own['message']}\n{own['traceback'].rstrip()}"
    first = choose_first(records)
    assert first is not None
    if not first["consequence"]:
        if rank != 0:
            return None
        return (
            f"stopped, because rank {first['rank']} on {first['machine']} failed: {first['type']}: {first['message']}"
        )
    if rank != min(record["rank"] for record in records):
        return None
    silent = [r for r in range(world_size) if r not in {record["rank"] for record in records}]
    if not silent:
        return f"{own['message']}\nevery rank lost its peers and none names another cause: is the network cut?"
    speaking = {record["machine"] for record in records}
    lost = [r for r in silent if machines.get(r) not in speaking]
    saw = f"What rank {rank} saw: {own['message'].splitlines()[0] if own['message'] else own['type']}"
    names = ", ".join(f"rank {r} on {machines.get(r, 'an unknown machine')}" for r in lost or silent)
    if not lost:
        return (
            f"{names} ended without a word, or hangs; other ranks of the machine are well. Killed, out of memory "
            f"(`dmesg`)? See logs/rank-{silent[0]}.log. {saw}"
        )
    tries = "; ".join(f"ssh {name} true" for name in dict.fromkeys(machines[r] for r in lost if r in machines))
    return (
        f"lost {names}: no answer and no last words. The machine has no power or no network, or the process was killed "
        f"(out of memory?). Try: {tries or 'the hostfile, with `python launch/hosts.py check hostfile`'}. If the launcher "
        f"does not come back, its ssh waits for that machine: Ctrl-C, and next time `launch/hosts.py run`. {saw}"
    )


def last_words(run_dir: Path, rank: int, world_size: int, error: BaseException, settle_s: float = SETTLE_S) -> int:
    """Record ``error`` and say it, or its cause, where the user reads it. Called once, when this rank gives up.

    Without :func:`redirect` (a worker agent has its own, a notebook has none) it goes to stderr as it is.

    Returns:
        The exit code of the job, the same on every rank, whichever of them the launcher sees first: 2 if the job's first
        error is one the user can mend, else 1.
    """
    trace = "".join(traceback.format_exception(error))
    if _terminal is None:
        print(f"error: {error}" if isinstance(error, GeminiError) else trace, file=sys.stderr, flush=True)
        understood(run_dir, rank, world_size, error, settle_s)
        return _exit_code(run_dir, rank, error)
    if threading.current_thread() is threading.main_thread():
        # DeepSpeed's launcher sends SIGTERM to all its ranks when one has ended, and gives them 30 s.
        signal.signal(signal.SIGTERM, lambda *_: None)
    said = understood(run_dir, rank, world_size, error, settle_s)
    sys.stderr.flush()
    _terminal.say(trace, terminal=False)
    if said is not None:
        _terminal.say(f"error: {said}\n", terminal=True)
    return _exit_code(run_dir, rank, error)


def _exit_code(run_dir: Path, rank: int, error: BaseException) -> int:
    first = choose_first([*read_errors(run_dir), _record(rank, error)])
    return 2 if first is not None and first["expected"] else 1


def understood(
    run_dir: Path, rank: int, world_size: int, error: BaseException, settle_s: float = SETTLE_S
) -> str | None:
    """Record ``error``; what rank ``rank`` should say of it, or None when another rank says it.

    Where it only says that others are gone, this waits up to ``settle_s`` for one of them to have written down the cause.
    """
    record_error(run_dir, rank, error)
    deadline = time.monotonic() + settle_s
    records = read_errors(run_dir)
    while all(r["consequence"] for r in records) and len(records) < world_size and time.monotonic() < deadline:
        time.sleep(0.05)
        records = read_errors(run_dir)
    if all(r["rank"] != rank for r in records):  # the run directory cannot be written
        records.append(_record(rank, error))
    said = verdict(records, rank, world_size, _machines(run_dir, world_size))
    place = f"rank {rank} on {socket.gethostname()}: " if world_size > 1 else ""
    return None if said is None else place + said


def leave(code: int) -> NoReturn:
    """Exit at once after :func:`last_words`, with what is written shown.

    The interpreter's own way out waits for threads and process groups, which wait for ranks that are gone: another
    ``distributed.timeout_s``, during which nobody knows whether the job has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if _terminal is not None:
        _terminal.close()
    os._exit(code)


def _machines(run_dir: Path, world_size: int) -> dict[int, str]:
    found = {}
    for rank in range(world_size):
        try:
            text = (run_dir / "logs" / f"rank-{rank}.log").read_text(errors="replace")
        except OSError:
            continue
        if (machine := machine_of(text)) is not None:
            found[rank] = machine
    return found
