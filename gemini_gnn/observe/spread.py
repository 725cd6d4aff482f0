"""Make a run directory on each machine, for machines that share none: one job's id and token, a name and the voters of its own.

    python -m gemini_gnn.observe.spread        on each machine, started over ssh as the doctor's probe is: orders from stdin
    {"number": 1, "run_dir": ...}                  ->  PREFIX {"number": 1, "answer": {"disk": ..., "files": ...}}
    {"number": 2, "files": ..., "voters": ...}     ->  PREFIX {"number": 2, "answer": {}}

A folder that is there keeps its name and its votes. A machine that is new, or knows less, gets the newest term and the settings
too, so that it can join. The token travels inside ssh. The same command may be repeated; while a job lives, the voters of
that job stay who they are.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.doctor.probe import PREFIX
from gemini_gnn.cluster.doctor.reach import ask, probes
from gemini_gnn.errors import ClusterError, GeminiError, RunDirError
from gemini_gnn.files import create, write_atomically
from gemini_gnn.observe import terms, votes
from gemini_gnn.observe.status import STATUS

ANSWER_S = 60.0  # login, the start of Python, and a disk
STALL_S = 120
SECRET = "terms/token"
SETTINGS = ("config.yaml", "model.json", STATUS)  # by which a machine joins

Files = dict[str, str]  # by name in the run directory, the text


def spread(hosts: Sequence[tuple[str, int]], project: Path, run_dir: Path, say: Callable[[str], None]) -> list[str]:
    """Make ``run_dir`` on each of ``hosts``; what was done there, a line each.

    Raises:
        ClusterError: a machine cannot be reached, or refuses; nothing has changed on any.
        RunDirError: the folders are of different runs, or one folder that machines share.
    """
    names = [host for host, _ in hosts]
    with probes(hosts, "ssh", project, "gemini_gnn.observe.spread") as there:
        found = ask(there, [{"run_dir": str(run_dir)}] * len(there), ANSWER_S, say)
        _expect_done(names, found)
        disks = [str(one["disk"]) for one in found]
        orders = [order | {"voters": disks} for order in plan(run_dir, names, found)]
        _expect_done(names, ask(there, orders, ANSWER_S, say))
    return [
        f"{name}: {'made' if order['files'].get('terms/id') else 'has it already'}"
        for name, order in zip(names, orders, strict=True)
    ]


def plan(run_dir: Path, names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By machine, the files that it is to get. Pure but for a new id and token, where no machine has one.

    Raises:
        RunDirError: as :func:`spread`.
    """
    for number, one in enumerate(found):
        for other in range(number):
            if one["disk"] == found[other]["disk"]:
                raise RunDirError(
                    f"{names[other]} and {names[number]} see the same folder {run_dir}: expected one on each machine's own "
                    "disk. A shared folder needs nothing: leave this command out"
                )
    runs = {one["files"]["terms/id"]: name for name, one in zip(names, found, strict=True) if one["files"]}
    if len(runs) > 1:
        raise RunDirError(
            f"{run_dir} holds different runs on {' and '.join(runs.values())}; name another folder, or remove the wrong one"
        )
    best = max(found, key=lambda one: (bool(one["files"]), one["newest"]))
    files: Files = dict(best["files"])
    if not files:
        files = {"terms/id": secrets.token_hex(16), SECRET: secrets.token_hex(32)}
    orders: list[dict[str, Any]] = []
    for one in found:
        lacks = {} if one["files"] and one["newest"] >= best["newest"] else files
        orders.append({"files": {k: v for k, v in lacks.items() if k not in ("terms/id", SECRET) or not one["files"]}})
    return orders


def _expect_done(names: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> None:
    bad = [f"{name}: {one['problem']}" for name, one in zip(names, answers, strict=True) if "problem" in one]
    if bad:
        raise ClusterError("; ".join(bad))


# --- on each machine --------------------------------------------------------------------------------------------------


def look(run_dir: Path) -> dict[str, Any]:
    """The name of the folder here, made now if it has none, and the files of the run in it."""
    terms.make_run_dir(run_dir)
    private = votes.private(run_dir)
    if private is None:
        private = votes.Private(secrets.token_hex(8), ())
        if not create(run_dir / "terms" / votes.PRIVATE, json.dumps({"disk": private.disk, "voters": []})):
            private = votes.private(run_dir)  # of another machine that sees the same folder
            assert private is not None
    files: Files = {}
    if (run_dir / "terms" / "id").exists():
        newest = terms.newest_term(run_dir).get("term", 0)
        files = {"terms/id": terms.run_id(run_dir), SECRET: terms.token(run_dir).hex()}
        for name in (*SETTINGS, *([f"terms/{newest}.json"] if newest else [])):
            if (run_dir / name).is_file():
                files[name] = (run_dir / name).read_text()
    return {"disk": private.disk, "files": files, "newest": terms.newest_term(run_dir).get("term", 0)}


def take(run_dir: Path, files: Mapping[str, str], voters: Sequence[str]) -> None:
    for name, text in files.items():
        write_atomically(run_dir / name, text, 0o600 if name == SECRET else 0o666)
    private = votes.private(run_dir)
    assert private is not None
    write_atomically(run_dir / "terms" / votes.PRIVATE, json.dumps({"disk": private.disk, "voters": list(voters)}))


def main() -> None:
    run_dir = Path()
    signal.alarm(STALL_S)  # its sshd may never say that the other end is gone
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "run_dir" in order:
                run_dir = Path(os.path.realpath(order["run_dir"]))
                answer = look(run_dir)
            else:
                take(run_dir, order["files"], order["voters"])
        except (OSError, GeminiError) as error:
            answer = {"problem": str(error)}
        print(PREFIX + json.dumps({"number": order["number"], "answer": answer}), flush=True)


if __name__ == "__main__":
    main()
