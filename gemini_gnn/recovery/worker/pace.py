"""When the next bytes may be sent: between the bursts of the trainers' own traffic, and under a limit.

GEMINI (SOSP'23, section 5) puts the chunks of a snapshot into the spans in which training leaves the network idle. Here the
trainers mark their bursts on the board, and a sender looks there before each chunk.
"""

from __future__ import annotations

import mmap
import threading
import time

from gemini_gnn.recovery import board

WAIT_S = 0.02  # at most, for a burst to end, before one chunk
LOOK_S = 0.0005  # between two looks: nothing announces the end of a burst
SHARE = 0.5  # of the time of a transfer that may go by in such waits, after the first one: a snapshot must arrive


class Pace:
    """A gate for every sending thread of a process. ``sent_bytes`` have passed it.

    Attributes:
        bytes_per_s: limit for all of them together; 0: none.
        look: the board, and how many pages it has; None: send at any time. Replaced with each board.
    """

    def __init__(self, bytes_per_s: float, stop: threading.Event):
        self.bytes_per_s, self.sent_bytes = bytes_per_s, 0
        self.look: tuple[mmap.mmap, int] | None = None
        self.stop, self._lock = stop, threading.Lock()
        self._free_s = 0.0  # when the bytes so far are paid for; guarded by _lock

    def gate(self) -> Gate:
        """For one transfer."""
        return Gate(self)

    def pay(self, nbytes: int) -> float:
        """Seconds to wait before ``nbytes`` may be sent."""
        with self._lock:
            self.sent_bytes += nbytes
            if not self.bytes_per_s:
                return 0.0
            now = time.monotonic()
            wait_s = max(0.0, self._free_s - now)
            self._free_s = max(now, self._free_s) + nbytes / self.bytes_per_s
            return wait_s

    def talks(self) -> bool:
        """Whether a trainer of this machine is in a burst of traffic."""
        if (look := self.look) is None:
            return False
        mapped, pages = look
        return any(board.talks(mapped, page) for page in range(min(pages, len(mapped) // board.PAGE_BYTES)))


class Gate:
    """The gate of one transfer; one thread calls it."""

    def __init__(self, pace: Pace):
        self._pace, self._begin_s, self._waited_s = pace, time.monotonic(), 0.0

    def __call__(self, nbytes: int) -> None:
        """Return when ``nbytes`` may be sent."""
        if (wait_s := self._pace.pay(nbytes)) > 0:
            self._pace.stop.wait(wait_s)
        begin = now = time.monotonic()
        while (
            now - begin < WAIT_S
            and self._waited_s + now - begin <= WAIT_S + SHARE * (now - self._begin_s)
            and self._pace.talks()
            and not self._pace.stop.wait(LOOK_S)
        ):
            now = time.monotonic()
        self._waited_s += now - begin
