"""Shows a job on the terminal: rank 0's output as it comes, and news of the job.

Showing never stops the job. If the terminal or pipe is gone, or the log cannot be read (EIO, ESTALE), only the showing
ends; the logs hold everything.
"""

from __future__ import annotations

import os
import select
from pathlib import Path

from gemini_gnn.observe import logs
from gemini_gnn.recovery import messages

POLL_S = 0.1


class Screen:
    """
    Attributes:
        speaks: news of the job is shown here, on stderr.
        streams: what rank 0 prints is shown here, on stdout.
        terminal: stdout is a terminal; a progress bar may stand in its current line.
    """

    def __init__(self, speaks: bool, streams: bool, terminal: bool):
        self.speaks, self.streams, self.terminal = speaks, streams, terminal
        self._within_line = False
        self._log: int | None = None

    def follow(self, log: Path, offset: int | None = None) -> None:
        """Show ``log`` from ``offset`` on; None: from its end.

        A second call, for another agent, changes nothing: the same log goes on."""
        if self.streams and self._log is None:
            try:
                self._log = os.open(log, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
                os.lseek(self._log, offset or 0, os.SEEK_END if offset is None else os.SEEK_SET)
            except OSError as error:
                self._cannot_read(error)

    def copy(self) -> None:
        while self._log is not None:
            try:
                data = os.read(self._log, 1 << 16)
            except OSError as error:
                self._cannot_read(error)
                return
            if not data:
                return
            self._write(1, logs.without_headers(data))
            self._within_line = not data.endswith(b"\n")

    def say(self, text: str) -> None:
        if self.speaks:
            self.copy()
            begin = "\n" if self.terminal and self._within_line else ""
            self._write(2, f"{begin}[gemini_gnn] {text}\n".encode(errors="replace"))
            self._within_line = False

    def ended(self, message: messages.Ended) -> int:
        """Say how the job ended; returns its exit code."""
        self.copy()
        if message.outcome != "done" and not message.told:
            self.say(_last_words(message, shown=self.streams and message.rank == 0))
        return message.code

    def _cannot_read(self, error: OSError) -> None:
        self.streams, self._log = False, None
        self.say(
            f"cannot read the log of rank 0 ({error.strerror}): its output is no longer shown here; the job goes on"
        )

    def _write(self, number: int, data: bytes) -> None:
        try:
            while data:
                try:
                    data = data[os.write(number, data) :]
                except BlockingIOError:  # another process with the same terminal or pipe has made it non-blocking
                    select.select([], [number], [], POLL_S)
        except OSError:  # the terminal or pipe is gone
            self.streams = self.speaks = False
            self._log = None


def _last_words(message: messages.Ended, shown: bool) -> str:
    """Why the job ended, and what to do next. ``shown``: the screen has the error already."""
    where = f" on {message.machine}" if message.machine else ""
    rank = f"rank {message.rank}{where}: " if message.rank not in (None, -1) else ""
    text = f"{rank}{(message.text or message.reason).rstrip()}"
    words = f"{message.outcome}: {'the error above' if shown else text}"
    if message.kept_files:
        mended = "once the cause is mended, " if message.outcome == "failed" else ""
        words += f"\nthe snapshots stay in host memory: {mended}the same command resumes from the newest one"
    return words
