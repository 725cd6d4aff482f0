"""A repaired or new machine joins a job that lives: what is checked before its worker agent is started.

The run directory says where the root agent answers: the newest term, or, while another machine is about to take over,
the machines of the last status. Whoever answers there has proved that it holds the job's token (``wire.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.installation import code
from gemini_gnn.cluster.place import Place
from gemini_gnn.errors import RecoveryError
from gemini_gnn.observe import terms
from gemini_gnn.observe.status import ENDED, read_status
from gemini_gnn.recovery import messages, visits, wire

FIND_S = 20.0  # a root that was lost has a successor sooner
ANSWER_S = 1.0  # a worker that is no root has the port too, and does not answer


def find(run_dir: Path) -> Place:
    """The place of a machine that joins: for all its slots, where the root agent answers. Its rank is not decided yet.

    Raises:
        RecoveryError: no job to join runs there, or it is another user's, or runs other code; or no root agent answers.
    """
    deadline = time.monotonic() + FIND_S
    while True:
        term, status = terms.newest_term(run_dir), read_status(run_dir)
        if (text := why_not(run_dir, term, status, code())) != "":
            raise RecoveryError(text)
        try:
            token = terms.token(run_dir)
        except PermissionError:
            raise RecoveryError(visits.of_another_user(run_dir)) from None
        complaints = []
        for address, port in targets(term, status):
            if (complaint := _why_silent(address, port, token)) == "":
                world, local = term["world_size"], term["local_world_size"]
                return Place(world - local, world, 0, local, os.uname().nodename, address, port, "plain")
            complaints.append(complaint)
        if time.monotonic() > deadline:
            raise RecoveryError(
                f"no root agent of {run_dir} answers: {'; '.join(complaints)}. If the job lives, see that this machine "
                f"reaches it (`ping {term['address']}`); else type the command of the job again"
            )
        time.sleep(visits.PAUSE_S)


def why_not(run_dir: Path, term: Mapping[str, Any], status: Mapping[str, Any], own: str) -> str:
    """Why a machine cannot join the job of the newest ``term``; empty if it can. Pure.

    Args:
        own: ``installation.code`` of this process.
    """
    again = "type the command of the job itself (deepspeed --hostfile ... launch/train.py ...)"
    if not term:
        return f"no job has begun in {run_dir}: give the run_dir=... of a job that runs, or {again}"
    if status.get("term") == term["term"] and status.get("state") in ENDED:
        return f"the job of {run_dir} has ended ({status['state']}), so there is nothing to join; to go on, {again}"
    if "port" not in term:
        return (
            f"the job of {run_dir} runs on one machine, {term.get('machine', '?')}, and takes no other; stop it there with "
            f"`python launch/stop.py run_dir={run_dir}`, and start it on several"
        )
    if term.get("code") != own:
        return (
            f"this machine runs other code than the job of {run_dir}: expected {term.get('code', 'an older version')}; got "
            f"{own}. Use the same installation here, or end the job and start it with this one"
        )
    return ""


def targets(term: Mapping[str, Any], status: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Where the root may answer: as the newest term says; else a machine of the job that is about to take over. Pure."""
    members = [(one.get("address"), one.get("port")) for one in status.get("machines", [])]
    return list(dict.fromkeys((a, p) for a, p in [(term["address"], term["port"]), *members] if a and p))


def _why_silent(address: str, port: int, token: bytes) -> str:
    """Why no root of the job answers there; empty if one does."""
    root = wire.connect(address, port, messages.TO_SLOT, token)
    try:
        deadline = time.monotonic() + ANSWER_S
        while not root.closed and not root.authenticated and time.monotonic() < deadline:
            root.wait(ANSWER_S / 10)
        return "" if root.authenticated else str(root.complaint or f"{address}:{port} is silent for {ANSWER_S:g} s")
    finally:
        root.close()
