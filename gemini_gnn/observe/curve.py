"""The loss curve of a run, as a picture and as a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def draw_losses(losses: Sequence[tuple[int, int, float]], path: Path, killed_after: int | None = None) -> None:
    """Write a PNG of ``(step, epoch, loss)`` rows; a vertical line marks where trainers were killed."""
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, half the import

    figure = Figure(figsize=(8, 4), dpi=120)
    axes = figure.subplots()
    axes.plot([row[0] for row in losses], [row[2] for row in losses], color="#1f77b4", linewidth=1.4, label="loss")
    if killed_after is not None:
        axes.axvline(
            killed_after + 0.5, color="#d62728", linestyle="--", linewidth=1, label="every trainer killed (SIGKILL)"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("global mean loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def spark(values: Sequence[float], width: int = 60) -> str:
    """Values as a row of bars, the highest full."""
    if not values:
        return ""
    picked = [values[i * len(values) // width] for i in range(width)] if len(values) > width else list(values)
    low, high = min(picked), max(picked)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[int((v - low) / (high - low or 1.0) * (len(bars) - 1))] for v in picked)
