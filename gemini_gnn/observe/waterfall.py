"""The failures of a run as a picture: a bar for each, a colour for each part of its cost; and the steps by the clock.

:func:`bars`, :func:`outages` and :func:`steps_by_clock` are pure; :func:`draw_waterfall` draws what they return.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe.failures import read_failures

MOST = 60  # bars in one picture
RED = "#d62728"


@dataclass(frozen=True)
class Bar:
    """``parts``: name and seconds of each, in order."""

    label: str
    parts: tuple[tuple[str, float], ...]

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    def span(self, name: str) -> tuple[float, float]:
        """Begin and length of the part ``name``."""
        at = [part for part, _ in self.parts].index(name)
        return sum(seconds for _, seconds in self.parts[:at]), self.parts[at][1]


def bars(failures: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """A bar for each record of ``failures.jsonl``."""
    found = []
    for one in failures:
        where = f", rank {one['rank']}" if "rank" in one else f" on {one['machine']}" if one.get("machine") else ""
        label = f"{one['kind']}{where}, step {one['step']}" + (" (interrupted)" if one["interrupted"] else "")
        parts = tuple((name.removesuffix("_s").replace("_", " "), seconds) for name, seconds in one["parts"].items())
        found.append(Bar(label, parts))
    return found


def outages(failures: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """From when to when each failure kept the run from new steps, on the wall clock of the root's machine.

    A record has the time at which the root gave up the generation: after the failure was found and decided upon.
    """
    found = []
    for one in failures:
        failed = one["time"] - one["parts"].get("detect_s", 0.0) - one["parts"].get("decide_s", 0.0)
        found.append((failed, failed + one["recovery_s"]))
    return found


def steps_by_clock(lines: Iterable[str]) -> list[tuple[float, int]]:
    """(wall time, step) for each step that the events of a rank tell of. A line that was torn by a kill is left out."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event["kind"] == "step":
                found.append((event["t"], event["step"]))
    return found


def draw(run_dir: Path, path: Path) -> Path:
    """Draw the run in ``run_dir``; the events of rank 0 have the same clock as the root.

    Raises:
        RunDirError: there is no failure to draw, or ``path`` cannot be written.
    """
    failures = read_failures(run_dir)
    if not failures:
        raise RunDirError(f"no failure of {run_dir} is over: nothing to draw; `status.py run_dir=...` shows the job")
    events = run_dir / "events" / "rank-0.jsonl"
    done = steps_by_clock(events.read_text(errors="replace").splitlines()) if events.exists() else []
    try:
        draw_waterfall(bars(failures), path, done, outages(failures))
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise RunDirError(f"cannot write {path}: {error}; give another plot=FILE.png") from None
    return path


def draw_waterfall(
    bars: Sequence[Bar],
    path: Path,
    done: Sequence[tuple[float, int]] = (),
    outages: Sequence[tuple[float, float]] = (),
    *,
    title: str = "what each failure cost",
    longest_s: float | None = None,
) -> None:
    """Write a picture of the last MOST ``bars``; below them, where ``done`` has steps, these by the clock.

    Args:
        longest_s: a longer bar is cut at the edge, and says how long it is.

    Raises:
        OSError, ValueError: of ``path``.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, half the import

    kept = bars[-MOST:]
    heights = [max(2.2, 0.8 + 0.28 * len(kept)), *([3.0] if done else [])]
    figure = Figure(figsize=(11, sum(heights) + 0.8), dpi=100, layout="constrained")
    rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = rows[0]
    edge = longest_s or max(bar.seconds for bar in kept)
    names = list(dict.fromkeys(name for bar in kept for name, _ in bar.parts))
    colors = cycle([colormaps[name](i) for name, size in (("tab10", 10), ("Set2", 8)) for i in range(size)])
    for name, color in zip(names, colors, strict=False):
        spans = [(row, *bar.span(name)) for row, bar in enumerate(kept) if name in dict(bar.parts)]
        widths = [max(0.0, min(seconds, edge - begin)) for _, begin, seconds in spans]
        at, begins, _ = zip(*spans, strict=True)
        axes.barh(at, widths, left=begins, color=color, label=name, height=0.7)
    for row, end in enumerate(bar.seconds for bar in kept):
        text = f"{end:.2f} s" if end <= edge else f"... {end:.1f} s"
        axes.annotate(text, (min(end, edge), row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(kept)), [bar.label for bar in kept], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * edge)
    cut = "" if len(kept) == len(bars) else f", the last {len(kept)} of {len(bars)}"
    axes.set(xlabel="seconds from the failure to the first new step", title=f"{title}{cut}")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if done:
        axes, begin = rows[1], done[0][0]
        axes.plot([t - begin for t, _ in done], [step for _, step in done], ".", markersize=3, label="a step")
        for number, (failed, over) in enumerate(outages):
            label = None if number else "failure"
            axes.axvspan(failed - begin, over - begin, color=RED, alpha=0.25, label=label)
        axes.set(xlabel="seconds since the first step", ylabel="optimizer step", title="the run by the clock")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in rows:
        axes.grid(alpha=0.25, axis="x")
    figure.savefig(path)
