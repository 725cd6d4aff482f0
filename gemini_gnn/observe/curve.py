"""The loss curve of a run, as a picture and as a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def draw_losses(
    losses: Sequence[tuple[int, int, float]],
    path: Path,
    done: Sequence[tuple[float, int]] | None = None,
    failure: str = "every trainer killed (SIGKILL)",
) -> None:
    """Write a PNG of ``(step, epoch, loss)`` rows.

    Args:
        done: of a run that failed: (seconds after the failure, negative before it; step) of each step as it was done. A second
            picture then shows what the failure cost in time, and which steps were done again.
        failure: in words.
    """
    from matplotlib.figure import Figure  # without pyplot: no backend to choose, half the import

    figure = Figure(figsize=(11 if done else 8, 4), dpi=120)
    axes = figure.subplots(1, 2 if done else 1, squeeze=False)[0]
    axes[0].plot([row[0] for row in losses], [row[2] for row in losses], color="#1f77b4", linewidth=1.4, label="loss")
    axes[0].set(xlabel="optimizer step", ylabel="global mean loss", yscale="log", title="losses.csv")
    if done:
        last = max(step for t, step in done if t <= 0)
        axes[0].axvline(last + 0.5, color="#d62728", linestyle="--", linewidth=1, label=failure)
        axes[1].plot(*zip(*done, strict=True), ".", color="#1f77b4", markersize=4, label="a step was done")
        axes[1].axvline(0.0, color="#d62728", linestyle="--", linewidth=1, label=failure)
        new = min((t for t, step in done if t > 0 and step > last), default=None)
        if new is not None:
            axes[1].axvspan(
                0.0, new, color="#d62728", alpha=0.12, linewidth=0, label=f"{new:.2f} s to the first new step"
            )
        axes[1].set(xlabel="seconds after the failure", ylabel="optimizer step", title="the same run by the clock")
    for each in axes:
        each.grid(alpha=0.25)
        each.legend(frameon=False)
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
