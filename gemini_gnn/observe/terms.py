"""The part of a run directory that outlives a start of its job: ``terms/``.

    terms/<n>.json   a record for each start, claimed by exclusive creation and never changed
    terms/<n>.beat   a counter that changes while the holder of term n lives; then the word "over"
    terms/id         random: tells this run directory from another one at the same path
    terms/token      random, for the owner only: by it the processes of a job know each other

Ownership. The holder of the highest term has the run directory; nobody else writes into it. Nothing is locked: when a
machine loses power its file server keeps its locks for minutes, and some file systems have none.

A start looks at the highest term. That term is free if its beat file says "over", if its process is gone (the kernel knows,
where both have the same boot and pid namespace), or if the beat stays the same for ``PATIENCE`` beats. Then the start
creates the next number. Of several starts one succeeds. The others look again, and find the holder of that number alive. A
start skips no number. It looks at each number it could not create, even if a cached listing of the folder lacks it. So
nobody takes an older term for the highest.

Interruptions. A start may be killed at any instruction:

- before it creates the number: its empty beat file serves the next one that tries;
- before it writes the record, which only a file system without links shows: an empty record names no process. The number
  is used up, and the next one is free when neither record nor beat has come for ``PATIENCE`` beats;
- before its first beat or its "over": its process is gone, or its beat stays the same.

A holder may be slow and look dead: its file system hung, or its machine slept. After each beat it looks for the next number.
If that exists, the holder has lost its term and must end (:func:`beat`). Until it looks, two jobs may run. That takes a beat
from when it wakes, and on NFS up to a minute more, for which a client remembers that a file does not exist. A start does
not count time in which it did not run itself, or waited for the file system.

Agents and slot processes load this module: nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RunDirError, RunDirInUse
from gemini_gnn.files import create, read_record
from gemini_gnn.observe.status import read_status

BEAT_S = 2.0
PATIENCE = 3  # beats without a change after which a holder on another machine counts as dead
OVER = "over"
ID_CHARACTERS, TOKEN_CHARACTERS = 32, 64


def make_run_dir(run_dir: Path) -> None:
    """Make the folders that agents and slot processes write to.

    Raises:
        RunDirError: it cannot be written to.
    """
    try:
        for name in ("logs", "events", "terms"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"run_dir {run_dir} is not writable ({error.strerror}); give another run_dir=...") from None


def claim_term(
    run_dir: Path,
    record: dict[str, Any],
    *,
    ask: Callable[[dict[str, Any]], bool | None] = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
    beat_s: float = BEAT_S,
) -> int:
    """Claim the next term of ``run_dir`` for this process. From then on the process beats (:class:`Beats`).

    Args:
        record: kept with the term. ``owner`` names this process in the message that another start gets; ``address`` and
            ``port`` are where it answers.
        ask: whether the process of a record answers at its address; None: nobody can say.
        say: told when this start has to wait.

    Raises:
        RunDirInUse: the holder of the highest term lives.
        RunDirError: the file system refuses.
    """
    folder, highest = run_dir / "terms", 0
    try:
        while True:
            highest = max(highest, *(int(path.stem) for path in _terms(run_dir)), 0)
            holder = _living_holder(folder, highest, ask, say, beat_s) if highest else None
            if holder is not None:
                raise RunDirInUse(
                    f"run_dir {run_dir} is in use by {_owner(holder)}; stop it there with `python launch/stop.py "
                    f"run_dir={run_dir}`, or give another run_dir=..."
                )
            term = highest + 1
            # Made before the term: a start that sees a term sees its beat, also where "no such file" is cached.
            os.close(os.open(_beat_file(folder, term), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
            if create(folder / f"{term}.json", json.dumps({"term": term, **_this_process(), **record})):
                beat(run_dir, term, 0)
                return term
            highest = term
    except OSError as error:
        raise RunDirError(f"cannot claim a term in {folder}: {error.strerror}; is run_dir writable?") from None


def succeed(run_dir: Path, term: int, record: dict[str, Any], nonce: str) -> bool:
    """Claim the term after ``term`` in place of its holder; False if another process has it.

    The caller knows by other means that the holder, or the job as it was, can do no more work (``recovery/root``).

    Args:
        nonce: names the claim: the same in each attempt, for an attempt that raised may have had it.

    Raises:
        OSError: of the file system.
    """
    folder, path = run_dir / "terms", run_dir / "terms" / f"{term + 1}.json"
    record = {"term": term + 1, **_this_process(), "nonce": nonce, **record}
    os.close(os.open(_beat_file(folder, term + 1), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    # A server may have made the link, lost the answer, and refuse the same request when it is repeated.
    if not create(path, json.dumps(record)) and read_record(path).get("nonce") != nonce:
        return False
    beat(run_dir, term + 1, 0)
    return True


def beat(run_dir: Path, term: int, count: int) -> bool:
    """Show that the holder of ``term`` lives. Returns False if it has lost the term, and must end.

    Raises:
        OSError: of the file system.
    """
    _write_beat(run_dir / "terms", term, str(count))
    return not (run_dir / "terms" / f"{term + 1}.json").exists()


def leave_term(run_dir: Path, term: int) -> None:
    """Give the run directory to the next start; the holder of ``term`` writes nothing any more, and has stopped its beats.

    Raises:
        OSError: of the file system.
    """
    _write_beat(run_dir / "terms", term, OVER)


class Beats:
    """The beats of a term, from a thread: a file system that hangs stops the thread, but not the holder.

    Attributes:
        lost: another process has the run directory; the holder must end. successor: the record of its term.
    """

    def __init__(self, run_dir: Path, term: int, beat_s: float = BEAT_S):
        self.lost = False
        self.successor: dict[str, Any] = {}
        self._run_dir, self._term, self._beat_s = run_dir, term, beat_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
        self._thread.start()

    def stop(self, patience_s: float = 5.0) -> None:
        """Leave the term. If the file system hangs for ``patience_s``, the next start finds out that this process is gone."""
        self._ended.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        count, said = 0, False
        while True:
            ended = self._ended.wait(self._beat_s)
            count += 1
            try:
                if ended:
                    leave_term(self._run_dir, self._term)
                elif not beat(self._run_dir, self._term, count):
                    self.successor = read_record(self._run_dir / "terms" / f"{self._term + 1}.json")
                    self.lost = True
            except OSError as error:
                if not said:
                    print(f"warning: cannot write to {self._run_dir / 'terms'}: {error}", file=sys.stderr, flush=True)
                said = True
            if ended:
                return


class Watch:
    """Looks now and then, from a thread, who holds the newest term: for an agent that has lost its root.

    Attributes:
        record: of the newest term, as last read; empty before. status: of the job.
    """

    def __init__(self, run_dir: Path, pause_s: float = 0.25):
        self.record: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        self._run_dir, self._pause_s, self._ended = run_dir, pause_s, threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Without waiting: the file system may hang."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):  # not to be read now
                self.record, self.status = newest_term(self._run_dir), read_status(self._run_dir)
            self._ended.wait(self._pause_s)


def _living_holder(
    folder: Path,
    term: int,
    ask: Callable[[dict[str, Any]], bool | None],
    say: Callable[[str], None],
    beat_s: float,
) -> dict[str, Any] | None:
    """The record of the process that holds ``term``; None if the term is over or its process dead."""
    before, asked, unchanged_s = _read_beat(folder, term), False, 0.0
    while True:
        looked = time.monotonic()
        now, record = _read_beat(folder, term), read_record(folder / f"{term}.json")
        lives = None if now == OVER else _lives_here(record)
        if now == OVER or lives is False:
            return None
        if now != before:
            return record
        if lives is None and not asked:
            asked, answer = True, ask(record) if record else None
            if answer is not None:
                return record if answer else None
            say(f"checking for {PATIENCE * beat_s:g} s whether {_owner(record)} still lives")
        # A process on this machine lives, but may have been killed a moment ago: it is seen until the kernel is done.
        if unchanged_s > (beat_s / 2 if lives else PATIENCE * beat_s):
            return record if lives else None
        pause_s = beat_s / (100 if lives else 10)
        time.sleep(pause_s)
        unchanged_s += min(time.monotonic() - looked, 2 * pause_s)


def _this_process() -> dict[str, Any]:
    """The names of this process, by which others can tell whether it lives."""
    names = {"machine": os.uname().nodename, "pid": os.getpid(), "started": _start_of(os.getpid()), "boot": ""}
    names |= {"pid_namespace": "", "time": time.time()}
    with contextlib.suppress(OSError):  # some sandboxes hide them: then only the beats say whether it lives
        names["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        names["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    return names


def _lives_here(record: dict[str, Any]) -> bool | None:
    """Whether the process of ``record`` lives; None if this machine, or this container, cannot know."""
    here, pid = _this_process(), record.get("pid")
    if not isinstance(pid, int) or any(not here[k] or here[k] != record.get(k) for k in ("boot", "pid_namespace")):
        return None
    started = _start_of(pid)
    if started is not None:
        return started == record.get("started")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, in a /proc that hides those
        return None
    return False  # a zombie


def _start_of(pid: int) -> int | None:
    """When the process was started, in ticks since boot; None if it is dead or cannot be seen."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _owner(record: dict[str, Any]) -> str:
    return record.get("owner") or f"process {record.get('pid', '?')} on {record.get('machine', 'another machine')}"


def _beat_file(folder: Path, term: int) -> Path:
    return folder / f"{term}.beat"


def _write_beat(folder: Path, term: int, word: str) -> None:
    # In place and opened anew: an NFS client writes a file back when it is closed, and looks again when it is opened.
    descriptor = os.open(_beat_file(folder, term), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, f"{word:<20}\n".encode(), 0)  # one length: a shorter word leaves nothing of a longer one
    finally:
        os.close(descriptor)


def _read_beat(folder: Path, term: int) -> str:
    try:
        return _beat_file(folder, term).read_text(errors="replace").strip()
    except FileNotFoundError:  # of an earlier version, or removed
        return ""


def newest_term(run_dir: Path) -> dict[str, Any]:
    """The record of the newest term; empty where there is none that can be read."""
    newest_first = sorted(_terms(run_dir), key=lambda path: int(path.stem), reverse=True)
    # A file may be empty: without links, an agent can be killed between claim and record.
    return next((record for record in map(read_record, newest_first) if record), {})


def newest_holder(run_dir: Path) -> tuple[dict[str, Any], str, bool | None]:
    """The record of the newest term, its beat, and whether its process lives; None: only a change of the beat can tell.

    Raises:
        OSError: of the file system.
    """
    record = newest_term(run_dir)
    return record, _read_beat(run_dir / "terms", record.get("term", 0)), _lives_here(record)


def _terms(run_dir: Path) -> list[Path]:
    return [path for path in (run_dir / "terms").glob("*.json") if path.stem.isdigit()]


def run_id(run_dir: Path, patience_s: float = 10.0) -> str:
    """The run directory's id; the first process that asks makes it.

    Raises:
        RunDirError: it can be neither made nor read.
    """
    return _made_once(run_dir / "terms" / "id", ID_CHARACTERS, 0o666, patience_s)


def token(run_dir: Path, patience_s: float = 10.0) -> bytes:
    """The secret of the job's processes; the first that asks makes it.

    Raises:
        RunDirError: it can be neither made nor read, or others may read it.
        PermissionError: it is another user's.
    """
    path = run_dir / "terms" / "token"
    text = _made_once(path, TOKEN_CHARACTERS, 0o600, patience_s)
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise RunDirError(f"{path} is damaged; remove the file and start again") from None


def _made_once(path: Path, characters: int, mode: int, patience_s: float) -> str:
    """The random text in ``path``, made by the first process that asks."""
    deadline = time.monotonic() + patience_s
    try:
        if not path.exists():
            create(path, secrets.token_hex(characters // 2), mode)
        while len(found := _read_plain(path, private=mode == 0o600)) < characters:  # another machine is just writing it
            if time.monotonic() > deadline:
                raise RunDirError(f"{path} is incomplete: its writer died; remove the file and start again")
            time.sleep(0.05)
    except OSError as error:
        if isinstance(error, PermissionError) and path.exists():
            raise
        raise RunDirError(f"cannot make or read {path}: {error.strerror}; is run_dir writable?") from None
    return found


def _read_plain(path: Path, private: bool) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        found = os.fstat(file.fileno())
        if private and (found.st_uid != os.getuid() or found.st_mode & 0o077):
            raise RunDirError(
                f"{path}: expected a file of user {os.getuid()} that nobody else may read (mode 0600); got one of user "
                f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; end the job, remove the file and start again"
            )
        return file.read()
