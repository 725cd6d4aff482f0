"""The names of snapshots and shards."""

from __future__ import annotations

from typing import Any, NamedTuple

COMMON = "common"  # the shard of the state that all data-parallel ranks hold identically


def shard_of(rank: int) -> str:
    """The name of a rank's own shard."""
    return f"rank-{rank:05d}"


class Identity(NamedTuple):
    """The name of a snapshot: never the step alone, because a step is computed again after every roll-back.

    Ordered: a later term beats a later generation beats a later step. Shards are combined only under one identity.

    Attributes:
        term: reign of a root.
        generation: membership of the job that took it.
        step: optimizer steps completed when it was taken.
    """

    term: int
    generation: int
    step: int

    def __str__(self) -> str:
        return f"{self.term}-{self.generation}-{self.step}"


def from_json(value: Any) -> Identity:
    """An identity out of a JSON list of three numbers."""
    term, generation, step = (int(v) for v in value)
    return Identity(term, generation, step)
