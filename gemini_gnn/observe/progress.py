"""Progress for a person: one line that rewrites itself on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time


class Progress:
    """Epochs and steps of a run on rank 0; silent when ``enabled`` is false.

    Args:
        terminal: rewrite one line in place; else print a line at most every ``every_s`` seconds within an epoch.
    """

    line_is_open = False  # the terminal's cursor stands behind a line that is not ended

    def __init__(self, enabled: bool, epochs: int, steps_per_epoch: int, terminal: bool, every_s: float = 5.0):
        self.enabled, self.epochs, self.steps_per_epoch = enabled, epochs, steps_per_epoch
        self.terminal = terminal
        self.every_s = 0.1 if terminal else every_s
        self._last = time.monotonic()
        self._begin: tuple[float, int] | None = None

    def step(self, step: int, loss: float) -> None:
        """``step`` optimizer steps are done."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = (now, step)
        if not self.enabled or now - self._last < self.every_s:
            return
        self._last = now
        epoch, within = divmod(step - 1, self.steps_per_epoch)  # of the step that was done last
        done = step / (self.epochs * self.steps_per_epoch)
        width = 24
        bar = "#" * int(done * width) + "." * (width - int(done * width))
        line = f"[{bar}] epoch {epoch + 1}/{self.epochs} step {within + 1}/{self.steps_per_epoch} loss {loss:.4f}"
        if step > self._begin[1]:  # one step has no duration yet
            rate = (step - self._begin[1]) / max(now - self._begin[0], 1e-9)
            left_s = (self.epochs * self.steps_per_epoch - step) / rate
            line += f"  {rate:.1f} steps/s  {_clock(left_s)} left"
        print(f"\r{line:<100}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)
        Progress.line_is_open = self.terminal

    def line(self, text: str) -> None:
        if self.enabled:
            print(f"\r{text:<100}" if self.terminal else text, flush=True)
            self._last = time.monotonic()
            Progress.line_is_open = False


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(min(seconds, 359_999)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def say(text: str) -> None:
    """A message that is not progress of training: partitioning, loading, warnings."""
    if Progress.line_is_open:
        print(flush=True)
        Progress.line_is_open = False
    print(text, file=sys.stderr, flush=True)
