"""Try a folder as a job would: is it one and the same on all machines, does exclusive creation hold, does it lock.

    python -m gemini_gnn.cluster.doctor.folder begin RUN_DIR TOKEN
    python -m gemini_gnn.cluster.doctor.folder look FOLDER TOKEN

``begin``, on the first machine: makes a folder beside or in the run directory, writes TOKEN into it, and locks a file;
removes all when its stdin ends. ``look``, on all: waits for TOKEN, creates a file that only one may create, asks for the lock.
Each is a process of its own: a file system that hangs takes the process with it, and not the probe.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from gemini_gnn import files

SEEN_S = 5.0  # a client of NFS may believe for some seconds what it saw before


def main(arguments: list[str]) -> None:
    verb, path, token = arguments
    try:
        if verb == "begin":
            begin(Path(path), token)
        else:
            _say(**look(Path(path), token))
    except OSError as error:
        _say(problem=str(error))


def begin(run_dir: Path, token: str) -> None:
    if run_dir.is_file():
        raise NotADirectoryError(
            errno.ENOTDIR, "expected a folder, or a name that is free; this is a file", str(run_dir)
        )
    base = run_dir
    while not base.is_dir() and base != base.parent:
        base = base.parent
    folder = base / f".gemini-gnn-doctor-{token[:8]}"
    folder.mkdir()
    try:
        with open(folder / "lock", "w") as file:
            lock(file)
            files.create(folder / "word", token)
            _say(folder=str(folder))
            sys.stdin.read()
    finally:
        shutil.rmtree(folder)


def look(folder: Path, token: str) -> dict[str, Any]:
    """As seen from here: ``seen_s`` until the word was there (None: never), ``won`` the creation, the ``lock``, the ``type``.

    ``private``: the run directory was made for this machine alone (``launch/hosts.py private``).
    """
    began, seen_s = time.monotonic(), None
    private = (folder.parent / "terms" / "private").exists()
    while seen_s is None and not private and time.monotonic() - began < SEEN_S:
        if (folder / "word").exists() and (folder / "word").read_text() == token:
            seen_s = time.monotonic() - began
        else:
            time.sleep(0.1)
    kind = files.file_system(folder.resolve(), Path("/proc/self/mountinfo").read_text())
    if seen_s is None:
        return {"seen_s": None, "type": kind, "private": private}
    won = files.create(folder / "one", token)
    with open(folder / "lock", "r+") as file:
        return {"seen_s": seen_s, "type": kind, "won": won, "lock": lock(file)}


def lock(file: Any) -> str:
    """ "taken", "refused" as another process has it, or the error of a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "refused"
    except OSError as error:
        return str(error)
    return "taken"


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
