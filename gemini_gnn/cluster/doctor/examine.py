"""The course of an examination: ask all machines at once, then the links between them, then what they share.

Everything found goes into one document, which JSON knows; ``verdicts.py`` reads it and decides.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.doctor import reach
from gemini_gnn.cluster.doctor.links import Link, slow_links
from gemini_gnn.cluster.doctor.reach import Probe, Say, ask
from gemini_gnn.cluster.hosts import keeps_alive

FACTS_S = 30.0  # login and the start of Python, from a file server too
ORDER_S = 20.0
FOLDER_S = 20.0  # start of a process, and 5 s for a file to be seen
COLLECTIVE_S = 60.0  # torch is loaded in it
STREAM_S = 0.3  # each way
ALL_PAIRS = 8  # machines; beyond, each one and its next
SAY_S = 2.0

Document = dict[str, Any]


def examine(
    hosts: Sequence[tuple[str, int]], how: str, folder: Path, run_dir: Path, say: Say, thorough: bool = True
) -> Document:
    """Ask ``hosts``, and try what lies between them.

    Args:
        how: "ssh" | "srun" | "here". folder: of the project. run_dir: need not exist.
        thorough: else without links and collectives, as before a job.
    """
    say(f"asking {len(hosts)} machine{'s' * (len(hosts) > 1)} ({how})")
    with reach.probes(hosts, how, folder) as probes:
        first = hosts[0][0].split("@")[-1]
        found = ask(probes, [{"do": "facts", "first": first}] * len(probes), FACTS_S, say)
        document: Document = {"how": how, "run_dir": str(run_dir), "links": [], "collective": None, "launcher": {}}
        if thorough and how == "ssh" and len(hosts) > 1:
            document["launcher"] = _launcher(hosts[0][0])
        machines = document["machines"] = [
            {
                "host": probe.host,
                "slots": probe.slots,
                "facts": {} if "problem" in facts else facts,
                **_silence(probe, facts),
            }
            for probe, facts in zip(probes, found, strict=True)
        ]
        here = [(probe, machine) for probe, machine in zip(probes, machines, strict=True) if machine["facts"]]
        _skews(here, say)
        document["folder"] = _folder(here, run_dir, say) if here else None
        if thorough and here:
            if len(here) > 1 and _routes(here, machines, say):
                document["links"] = _links(here, say)
            if all("address" in machine or len(here) == 1 for _, machine in here):
                blocked = any("problem" in link for link in document["links"])
                document["collective"] = {} if blocked else _collective(here, say)
        for probe, machine in here:
            if probe.problem:  # it has answered at first
                machine |= _silence(probe, {})
        return document


def _launcher(host: str) -> dict[str, bool]:
    done = subprocess.run(
        ["ssh", "-G", host], capture_output=True, text=True, timeout=ORDER_S, stdin=subprocess.DEVNULL
    )
    return {"pdsh": shutil.which("pdsh") is not None, "keeps_alive": keeps_alive(done.stdout, os.environ)}


def _silence(probe: Probe, answer: Mapping[str, Any]) -> dict[str, Any]:
    problem = probe.problem or answer.get("problem", "")
    return {"problem": problem, "remedy": probe.remedy, "login_s": probe.login_s}


Here = Sequence[tuple[Probe, dict[str, Any]]]


def _skews(here: Here, say: Say) -> None:
    """How far the clock of each machine is from this one's, and within what: half of the best round trip of three."""
    for probe, machine in here:
        best = None
        for _ in range(3):
            began, before = time.time(), time.monotonic()
            (answer,) = ask([probe], [{"do": "clock"}], ORDER_S, say)
            trip_s = time.monotonic() - before
            if "time_s" in answer and (best is None or trip_s < best[0]):
                best = trip_s, answer["time_s"] - (began + trip_s / 2)
        if best is not None:
            machine["skew_s"], machine["skew_within_s"] = best[1], best[0] / 2


# --- links ------------------------------------------------------------------------------------------------------------


def master_address(machines: Sequence[Mapping[str, Any]]) -> str | None:
    """The first host's address as the *others* see it, which is the one that serves them; None when they do not agree.

    On itself a host's name may mean loopback, and the first of its addresses may be one only it has. Pure.
    """
    others = [machine for machine in machines[1:] if machine["facts"]] or machines[:1]
    seen = {machine["facts"].get("first") for machine in others}
    return seen.pop() if len(seen) == 1 else None


def _routes(here: Here, machines: Sequence[dict[str, Any]], say: Say) -> bool:
    """Card and address of each machine on its way to the first; whether all have one."""
    to = master_address(machines)
    if to is None:
        return False
    probes = [probe for probe, _ in here]
    for (_, machine), answer in zip(
        here, ask(probes, [{"do": "route", "to": to}] * len(probes), ORDER_S, say), strict=True
    ):
        machine |= {"route_problem": answer["problem"]} if "problem" in answer else answer
    return all("address" in machine for _, machine in here)


def pairs(count: int) -> list[tuple[int, int]]:
    """All pairs of machines; of many, each one and its next, in a ring. Pure."""
    if count <= ALL_PAIRS:
        return list(itertools.combinations(range(count), 2))
    return [(one, (one + 1) % count) for one in range(count)]


def _links(here: Here, say: Say) -> list[Link]:
    """First the ports, all at once, both ways; then, where they are open, how much passes, one stream at a time."""
    probes = {machine["host"]: probe for probe, machine in here}
    hosts, token = list(probes), secrets.token_hex(16)
    ports = ask(list(probes.values()), [{"do": "listen", "token": token}] * len(here), ORDER_S, say)
    where = {
        machine["host"]: [machine["address"], answer.get("port")]
        for (_, machine), answer in zip(here, ports, strict=True)
    }
    ways = [(hosts[one], hosts[to]) for a, b in pairs(len(here)) for one, to in ((a, b), (b, a))]
    say(f"{len(ways)} links between {len(here)} machines")
    targets = {host: [to for one, to in ways if one == host] for host in hosts}

    def order(tos: Sequence[str], seconds: float) -> dict[str, Any]:
        return {"do": "call", "targets": [where[to] for to in tos], "token": token, "seconds": seconds}

    answers = ask(list(probes.values()), [order(targets[host], 0) for host in hosts], ORDER_S, say)
    found: dict[tuple[str, str], Link] = {}
    for host, answer in zip(hosts, answers, strict=True):
        calls = answer.get("calls") or [answer] * len(targets[host])
        found |= {(host, to): call for to, call in zip(targets[host], calls, strict=True)}
    links = [{"from": one, "to": to, "address": where[to][0], **found[one, to]} for one, to in ways]

    def stream(some: Sequence[Link], again: str) -> None:
        spoke = time.monotonic()
        for number, link in enumerate(some):
            if time.monotonic() - spoke > SAY_S:
                spoke = time.monotonic()
                say(f"bandwidth{again}: {number} of {len(some)} links")
            (answer,) = ask([probes[link["from"]]], [order([link["to"]], STREAM_S)], ORDER_S, say)
            new = answer["calls"][0] if "calls" in answer else answer
            best = max(new.get("bytes_per_s", 0.0), link.get("bytes_per_s", 0.0))
            link |= new | ({} if "problem" in new else {"bytes_per_s": best})

    stream([link for link in links if "problem" not in link], "")
    # A machine that was busy for a moment looks like a slow link: these are measured once more, and the better counts.
    stream(slow_links(links), " of slow links once more")
    return links


# --- what is shared ---------------------------------------------------------------------------------------------------


def _folder(here: Here, run_dir: Path, say: Say) -> dict[str, Any]:
    """The first machine writes, all look: see ``folder.py``."""
    say(f"run_dir {run_dir}")
    probes = [probe for probe, _ in here]
    order = {"do": "folder_begin", "run_dir": str(run_dir), "deadline_s": ORDER_S}
    (begun,) = ask(probes[:1], [order], ORDER_S + 5, say)
    if "problem" in begun:
        return begun | {"host": here[0][1]["host"]}
    look = {"do": "folder_look", "folder": begun["folder"], "token": begun["token"], "deadline_s": FOLDER_S}
    looks = ask(probes, [look] * len(probes), FOLDER_S + 5, say)
    hosts = [machine["host"] for _, machine in here]
    return {"folder": begun["folder"], "looks": dict(zip(hosts, looks, strict=True))}


def _collective(here: Here, say: Say) -> dict[str, Any]:
    """A rank on each machine: gloo, or NCCL where each has a GPU and may use it."""
    on_gpus = os.environ.get("DS_ACCELERATOR") != "cpu" and all(machine["facts"]["gpus"] for _, machine in here)
    backend = "nccl" if on_gpus else "gloo"
    say(f"an all-reduce and an all_to_all over {len(here)} ranks with {backend}")
    probes = [probe for probe, _ in here]
    (met,) = ask(probes[:1], [{"do": "meet"}], ORDER_S, say)
    if "problem" in met:
        return {"backend": backend, "answers": {here[0][1]["host"]: met}}
    address = here[0][1].get("address", "127.0.0.1")
    common = {
        "world": len(here),
        "address": address,
        "port": met["port"],
        "backend": backend,
        "seconds": COLLECTIVE_S / 2,
    }
    orders = [
        {
            "do": "collective",
            "order": {"rank": rank, "interface": machine.get("interface"), **common},
            "deadline_s": COLLECTIVE_S,
        }
        for rank, (_, machine) in enumerate(here)
    ]
    answers = ask(probes, orders, COLLECTIVE_S + 10, say)
    return {"backend": backend, "answers": dict(zip([machine["host"] for _, machine in here], answers, strict=True))}
