"""When a snapshot is written to storage, and whether it counts. Pure; ``now`` in seconds, on the root's clock.

    due        every so many seconds or steps the root names a step a little ahead, so that all machines hear of it in time
    held       each rank holds its first snapshot of that step or a later one; it is not overwritten, the other slots go on
    persisted  each machine has written its shards
    complete   all machines wrote the same snapshot: machine 0 marks it. From then on it counts

A rank that hears too late holds a later snapshot than the others. Then none of it counts, and the next step is named further
ahead. A failure of the job, or of storage, only costs this checkpoint: the ones before stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gemini_gnn.config import Interval
from gemini_gnn.snapshot.store.identity import Identity

MARGIN_S = 1.0  # a message that takes longer to all machines costs a checkpoint
SLOW_S = 60.0  # then it is said that storage does not answer


@dataclass(frozen=True)
class State:
    """
    Attributes:
        machines: number of them. every: from the beginning of one checkpoint to that of the next.
        last_s, last_step: when the last one began, and at which step; of the start before the first one.
        margin_s: how far ahead a step is named.
        asked: the step that was named; 0: none is under way. asked_s: when.
        persisted: by machine, what it has written.
        completing: all have, and machine 0 marks it.
        newest: the last complete checkpoint of this start.
        said: that storage is slow, or of its last problem.
    """

    machines: int
    every: Interval
    last_s: float = 0.0
    last_step: int = 0
    margin_s: float = MARGIN_S
    asked: int = 0
    asked_s: float = 0.0
    persisted: Mapping[int, Identity] = field(default_factory=dict)
    completing: Identity | None = None
    newest: Identity | None = None
    said: str = ""


@dataclass(frozen=True)
class Ask:
    """All machines hold and persist the first snapshot of ``step`` or a later one; 0: they let go."""

    step: int


@dataclass(frozen=True)
class Mark:
    """Machine 0 completes the checkpoint."""

    identity: Identity


@dataclass(frozen=True)
class Say:
    text: str


Action = Ask | Mark | Say
Step = tuple[State, list[Action]]


def look(state: State, step: int, step_s: float, now: float) -> Step:
    """The job trains in ``step``, with a median of ``step_s`` per step (0: unknown)."""
    if state.asked:
        if now - state.asked_s <= SLOW_S or state.said:
            return state, []
        text = f"a checkpoint has been under way for {now - state.asked_s:.0f} s: does storage answer? Training goes on"
        return replace(state, said=text), [Say(text)]
    by_time = 0 < state.every.seconds <= now - state.last_s
    by_steps = 0 < state.every.steps <= step - state.last_step
    if step == 0 or not (by_time or by_steps):
        return state, []
    ahead = math.ceil(state.margin_s / step_s) if step_s > 0 else 1
    asked = step + max(1, ahead)
    return replace(state, asked=asked, asked_s=now, last_s=now, last_step=step, persisted={}), [Ask(asked)]


def generation(state: State) -> State:
    """Another generation begins: its trainers hold nothing."""
    return replace(state, asked=0, persisted={}, completing=None)


def at_the_end(state: State, identity: Identity, machines: int) -> State:
    """No trainer lives, and so many machines are told to write what they hold of ``identity``."""
    return replace(state, machines=machines, asked=max(1, identity.step), persisted={}, completing=None)


def persisted(state: State, machine: int, identity: Identity | None, problem: str) -> Step:
    """A machine has written its shards of a snapshot, or could not; None: its ranks hold different ones."""
    if not state.asked or state.completing is not None:
        return state, []
    if identity is None:
        return _late(state)
    if problem:
        return _failed(state, identity, problem)
    state = replace(state, persisted={**state.persisted, machine: identity})
    if len(state.persisted) < state.machines:
        return state, []
    if len(set(state.persisted.values())) == 1:
        return replace(state, completing=identity), [Mark(identity)]
    return _late(state)


def _late(state: State) -> Step:
    """Some heard too late: again at once, and further ahead."""
    state = replace(state, margin_s=2 * state.margin_s, last_s=-math.inf, last_step=-(1 << 62))
    return replace(state, asked=0, persisted={}), [Ask(0)]


def completed(state: State, identity: Identity, problem: str) -> Step:
    """Machine 0 has marked a checkpoint, or could not."""
    if identity != state.completing:
        return state, []
    if problem:
        return _failed(state, identity, problem)
    state = replace(state, asked=0, persisted={}, completing=None, newest=identity, said="")
    return state, [Ask(0)]


def _failed(state: State, identity: Identity, problem: str) -> Step:
    """Let go of the snapshot; say why, unless it was said of the one before. Steps and paths of the two differ by numbers."""
    said = re.sub(r"\d+", "", problem)
    text = f"checkpoint of step {identity.step}: {problem}. Older checkpoints stay"
    state, new = replace(state, asked=0, persisted={}, completing=None, said=said), said != state.said
    return state, [Ask(0), Say(text)] if new else [Ask(0)]
