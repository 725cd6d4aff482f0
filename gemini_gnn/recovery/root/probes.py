"""Whether the machines that a new root has not heard of are lost: does at least their kernel answer?

A root that takes over hears nothing of a machine that was lost with the last root. It cannot know whether that machine's
agent has died, which an heir replaces soon, or the machine itself. So it asks the kernel there for a connection to the
agent's port. Any answer, a refusal too, says that the machine has power and network.

Ownership. The probes own one socket per machine until it has answered or its time is over; the root looks at them in its
loop, which never waits. Nothing is sent over them. The answer may be wrong where the network loses the first packet: then a
standby takes the seat of a machine that lives, and that machine stands by when it joins.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

from gemini_gnn.recovery.messages import Member

PATIENCE_S = 0.5  # for the kernel of a machine; it answers within a millisecond, however busy its processes are
POLL_S = 0.05
ANSWERS = (0, errno.EISCONN, errno.ECONNREFUSED, errno.ECONNRESET)


class Probes:
    def __init__(self, members: Mapping[int, Member], now: float):
        """
        Args:
            members: to be asked, by number. One without an address or a port never joined, and is not asked.
        """
        self._until_s = now + PATIENCE_S
        self._asked: dict[int, tuple[socket.socket, tuple[str, int]]] = {}
        for number, member in members.items():
            if member.address and member.port:
                family = socket.AF_INET6 if ":" in member.address else socket.AF_INET
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                self._asked[number] = sock, (member.address, member.port)
        self.look(now)

    @property
    def under_way(self) -> bool:
        return bool(self._asked)

    def look(self, now: float) -> list[int]:
        """Numbers of the machines that did not answer; each once. Never waits."""
        lost = []
        for number, (sock, where) in list(self._asked.items()):
            code = sock.connect_ex(where)  # of a connection under way: how it stands
            if code in ANSWERS:
                self._forget(number)
            elif now > self._until_s:
                self._forget(number)
                lost.append(number)
        return lost

    def close(self) -> None:
        for number in list(self._asked):
            self._forget(number)

    def _forget(self, number: int) -> None:
        self._asked.pop(number)[0].close()
