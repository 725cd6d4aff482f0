"""A bare TCP socket between two machines: is the port open, how long a byte takes, how many bytes pass.

One side listens at a free port, as our agents do, and answers only callers that know the token of this examination. A caller
that gets another answer has reached another machine or program.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

CONNECT_S = 3.0
TRANSFER_S = 10.0  # of one send or receive
PINGS = 5
SLOW = 4  # times less than usual
CHUNK = bytes(256 << 10)

Link = dict[str, Any]  # from, to, address; latency_s and bytes_per_s, or a problem


def listen(token: bytes) -> int:
    """Serve calls until this process ends; returns the port."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    threading.Thread(target=_serve, args=(listener, token), name="listener", daemon=True).start()
    return int(listener.getsockname()[1])


def _serve(listener: socket.socket, token: bytes) -> None:
    while True:
        call, _ = listener.accept()
        threading.Thread(target=_answer, args=(call, token), name="call", daemon=True).start()


def _answer(call: socket.socket, token: bytes) -> None:
    """Echo the token and the pings, then count what comes until its end."""
    with call, contextlib.suppress(OSError):  # the caller sees the end of the connection, and says so
        call.settimeout(TRANSFER_S)
        call.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _exactly(call, len(token)) != token:
            return
        call.sendall(token)
        for _ in range(PINGS):
            call.sendall(_exactly(call, 1))
        count, buffer = 0, bytearray(len(CHUNK))
        while size := call.recv_into(buffer):
            count += size
        call.sendall(count.to_bytes(8, "big"))


def call(address: str, port: int, token: bytes, seconds: float) -> dict[str, Any]:
    """Call a listener: ``latency_s`` of a byte there and back, and ``bytes_per_s`` of a stream that lasts ``seconds``.

    A problem instead, if it cannot be reached.
    """
    try:
        with socket.create_connection((address, port), CONNECT_S) as line:
            line.settimeout(TRANSFER_S)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.sendall(token)
            if _exactly(line, len(token)) != token:
                return {"problem": "another program answers there"}
            times = []
            for _ in range(PINGS):
                began = time.monotonic()
                line.sendall(b"?")
                _exactly(line, 1)
                times.append(time.monotonic() - began)
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                line.sendall(CHUNK)
            line.shutdown(socket.SHUT_WR)
            count = int.from_bytes(_exactly(line, 8), "big")  # all of it has arrived by now
            took_s = time.monotonic() - began
    except OSError as error:
        return {"problem": str(error)}
    return {"latency_s": min(times)} | ({"bytes_per_s": count / took_s} if seconds else {})


def _exactly(line: socket.socket, size: int) -> bytes:
    """``size`` bytes.

    Raises:
        ConnectionError: the other side has ended before.
    """
    found = b""
    while len(found) < size:
        piece = line.recv(size - len(found))
        if not piece:
            raise ConnectionError("the other side ended the connection")
        found += piece
    return found


# --- all of them ------------------------------------------------------------------------------------------------------


def usual_rate(found: Sequence[Link]) -> float:
    """The median of the machines' best links. One machine of three or four has half of all links or more."""
    best: dict[str, float] = {}
    for link in found:
        for host in (link["from"], link["to"]):
            best[host] = max(best.get(host, 0.0), link.get("bytes_per_s", 0.0))
    return statistics.median(best.values()) if best else 0.0


def slow_links(found: Sequence[Link]) -> list[Link]:
    """Those that pass less than a quarter of what is usual. Pure."""
    usual = usual_rate(found)
    return [link for link in found if "bytes_per_s" in link and link["bytes_per_s"] * SLOW < usual]
