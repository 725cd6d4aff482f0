"""Where a run stands: what must survive besides weights, moments and counters of the engine."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class RunState:
    """The position of a run. JSON values only, so that it travels in the manifest of a snapshot.

    Attributes:
        step: optimizer steps done. evaluated: the last epoch that was evaluated, 0 for none.
        best: metrics of the best evaluation by validation, with its epoch; empty before the first.
        worse: evaluations since the best one.
        stopped: early stop was decided.
        losses: rows of losses.csv that may not have reached the disk yet.
    """

    step: int = 0
    evaluated: int = 0
    best: dict[str, float] = field(default_factory=dict)
    worse: int = 0
    stopped: bool = False
    losses: list[list[float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {f.name: copy(getattr(self, f.name)) for f in fields(self)}  # values one level deep: copied per step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for f in fields(self):
            setattr(self, f.name, state[f.name])


def evaluation_due(state: RunState, steps_per_epoch: int, every: int, epochs: int) -> int:
    """The epoch whose evaluation comes before the next step, or 0. Pure: after a resume it is asked again."""
    epoch, within = divmod(state.step, steps_per_epoch)
    if within or epoch == 0 or epoch <= state.evaluated:
        return 0
    due = epoch == epochs or (every > 0 and epoch % every == 0)
    return epoch if due else 0


def record_evaluation(state: RunState, epoch: int, val: dict[str, float], test: dict[str, float], metric: str) -> bool:
    """Note an evaluation; true when it is the best so far (strictly better: the earliest of equals counts)."""
    state.evaluated = epoch
    value = val[metric]
    if not state.best or value > state.best[f"val_{metric}"]:
        state.best = {"epoch": epoch}
        state.best |= {f"val_{k}": v for k, v in val.items()} | {f"test_{k}": v for k, v in test.items()}
        state.worse = 0
        return True
    state.worse += 1
    return False
