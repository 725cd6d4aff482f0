"""JSON lines over a unix socket between shim, worker agent, warm parent and trainer; descriptors may ride along.

A message that was sent but not read when its reader dies is lost with the reader; nobody waits for an answer without
watching for the end of the stream, so a lost message is always seen as a lost peer. A sender never waits for a reader
that does not read (a shim on a stopped terminal): after ``timeout_s`` the peer counts as lost.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_MESSAGE_BYTES = 16 << 20
PROTOCOL = (
    1  # of what visitors say to an agent, which may be of an older installation than they: count up with every change
)


class Channel:
    """One end of a stream socket. ``closed`` becomes true when the peer is gone or spoke nonsense.

    The socket itself stays open until :meth:`close`: a selector may know it, and its number must not be given to another.
    """

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.sock = sock
        self.closed = False
        self._received = bytearray()
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = (), timeout_s: float = 0.0) -> bool:
        """Whether the kernel took all of it. The peer owns copies of the descriptors and gets them with the message."""
        if self.closed:
            return False
        if descriptors:
            message = {**message, "descriptors": len(descriptors)}
        data = memoryview(json.dumps(message).encode() + b"\n")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        deadline = time.monotonic() + timeout_s
        while data:
            try:
                data = data[self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL) :]
                ancillary = []
            except (BlockingIOError, InterruptedError):
                left = deadline - time.monotonic()
                if left <= 0:
                    self.closed = True
                    return False
                select.select([], [self.sock], [], left)
            except OSError:
                return False  # gone; what it said before is still to be received, and then the end of the stream
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Every complete message that is here; never waits. Received descriptors are in its ``descriptors``."""
        while not self.closed:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(1 << 16, socket.CMSG_SPACE(16 * 4), socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.closed = True
                break
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                    self._descriptors += numbers
            self._received += data
            if not data or len(self._received) > MAX_MESSAGE_BYTES:
                self.closed = True
        messages = []
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.closed = True
                break
            if "descriptors" in message:
                count = message["descriptors"]
                message["descriptors"] = [self._descriptors.pop(0) for _ in range(count)]
            messages.append(message)
        return messages

    def close(self) -> None:
        self.closed = True
        self.sock.close()


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, mode 0600, in a folder that only this user may enter; what was there is replaced.

    Bound in place: a name of its own, renamed later, would stay behind when this process is killed in between.
    """
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(os.fspath(path))
    os.chmod(path, 0o600)
    sock.listen(1024)
    sock.setblocking(False)
    return sock


def connect(path: Path) -> Channel | None:
    """A channel to who listens at ``path``, or None when nobody of this user does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(5.0)
    try:
        sock.connect(os.fspath(path))
    except OSError:
        sock.close()
        return None
    if peer(sock)[1] != os.getuid():
        sock.close()
        return None
    return Channel(sock)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and uid of the process at the other end, as the kernel vouches for them."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid
