"""The doctor's process on each machine: takes orders, one JSON line each, from stdin; answers each with one line.

    {"number": 1, "do": "facts", ...}  ->  PREFIX {"number": 1, "answer": {...}}

When stdin ends it ends the processes that it has started, and itself. An order that takes too long is the asking side's to
give up; a child that takes too long is given up here, without waiting for it: a process that waits for a file system
cannot be killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gemini_gnn.cluster.doctor import facts, links
from gemini_gnn.cluster.place import interface_to
from gemini_gnn.errors import ClusterError

PREFIX = "GEMINI-GNN "  # banners of logins have other first words
CHILD = [sys.executable, "-m"]
PACKAGE = "gemini_gnn.cluster.doctor"

_children: list[subprocess.Popen[str]] = []
_meeting: list[socket.socket] = []


LIFE_S = 900  # of a probe whose machine has lost the one that asks: its sshd may never say so


def main() -> None:
    signal.alarm(LIFE_S)
    threading.Thread(target=_obey, name="orders", daemon=True).start()
    orders = iter(sys.stdin.readline, "")
    try:
        for line in orders:
            _waiting.put(json.loads(line))
    finally:
        for child in _children:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()  # the folder's child removes what it made, if it can
        deadline = time.monotonic() + 2
        for child in _children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()
        os._exit(0)  # threads and children may hang


_waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()


def _obey() -> None:
    while True:
        order = _waiting.get()
        number, what = order.pop("number"), order.pop("do")
        try:
            answer = ORDERS[what](**order)
        except (OSError, ClusterError) as error:
            answer = {"problem": str(error)}
        except Exception as error:  # a bug: told where it is seen
            answer = {"problem": f"{type(error).__name__} in {what}: {error}"}
        print(PREFIX + json.dumps({"number": number, "answer": answer}), flush=True)


# --- orders -----------------------------------------------------------------------------------------------------------


def clock() -> dict[str, Any]:
    return {"time_s": time.time()}


def route(to: str) -> dict[str, Any]:
    """The card that leads to the first machine, and its address: by that the others reach this machine."""
    name = interface_to(to)
    family, _, _, _, where = socket.getaddrinfo(to, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as line:
        line.connect(where)
        return {"interface": name, "address": line.getsockname()[0]}


def listen(token: str) -> dict[str, Any]:
    return {"port": links.listen(token.encode())}


def call(targets: list[list[Any]], token: str, seconds: float) -> dict[str, Any]:
    """Call all ``targets``, pairs of address and port, at once."""
    with ThreadPoolExecutor(max_workers=len(targets)) as pool:
        calls = [pool.submit(links.call, address, port, token.encode(), seconds) for address, port in targets]
        return {"calls": [one.result() for one in calls]}


def folder_begin(run_dir: str, deadline_s: float) -> dict[str, Any]:
    token = secrets.token_hex(16)
    return _child("folder", ["begin", os.path.abspath(run_dir), token], deadline_s) | {"token": token}


def folder_look(folder: str, token: str, deadline_s: float) -> dict[str, Any]:
    return _child("folder", ["look", folder, token], deadline_s)


def meet() -> dict[str, Any]:
    """A port for the trial of the collectives; the child gets the socket, so that nobody takes the port before."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    _meeting.append(listener)
    return {"port": listener.getsockname()[1]}


def collective(order: dict[str, Any], deadline_s: float) -> dict[str, Any]:
    fds = [_meeting[0].fileno()] if order["rank"] == 0 else []
    order = order | {"fd": fds[0] if fds else None}
    return _child("collective", [json.dumps(order)], deadline_s, fds)


ORDERS: dict[str, Callable[..., dict[str, Any]]] = {
    **{"facts": facts.gather, "clock": clock, "route": route, "listen": listen, "call": call},
    **{"folder_begin": folder_begin, "folder_look": folder_look, "meet": meet, "collective": collective},
}


def _child(name: str, arguments: list[str], deadline_s: float, fds: list[int] | None = None) -> dict[str, Any]:
    """The first line that a module of this package prints, as JSON; its last words, if there is none. It is left running."""
    child = subprocess.Popen(
        [*CHILD, f"{PACKAGE}.{name}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=fds or [],
    )
    _children.append(child)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    words: list[str] = []
    assert child.stdout is not None and child.stderr is not None
    out, err = child.stdout, child.stderr
    listening = threading.Thread(target=lambda: words.extend(err), daemon=True)
    listening.start()
    threading.Thread(target=lambda: said.put(out.readline()), daemon=True).start()
    try:
        line = said.get(timeout=deadline_s)
    except queue.Empty:
        child.kill()
        return {"problem": f"no answer within {deadline_s:.0f} s", "hangs": True}
    if line.startswith("{"):
        return dict(json.loads(line))
    listening.join(2)
    last = [word.strip() for word in words if word.strip()]
    return {"problem": last[-1] if last else f"it ended without a word: {line.strip()}"}


if __name__ == "__main__":
    main()
