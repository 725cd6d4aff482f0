"""Small host-side agreements between the ranks of a job, over a gloo group: JSON values, no pickle.

Every rank must make the same calls in the same order; each call has the timeout of the group. A single rank gets its own
answer at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gemini_gnn.errors import SnapshotError

T = TypeVar("T")


class Ranks:
    """The ranks of ``group`` (None: the only one)."""

    def __init__(self, group: Any, rank: int, world_size: int):
        self._group, self.rank, self.world_size = group, rank, world_size

    def exchange(self, value: Any) -> list[Any]:
        """``value`` (JSON) of every rank, by rank."""
        if self.world_size == 1:
            return [value]
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(raw)]), group=self._group)
        longest = int(max(int(s) for s in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(raw)] = raw
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._group)
        return [json.loads(bytes(p[: int(s)].tolist())) for p, s in zip(parts, sizes, strict=True)]

    def all_true(self, bit: bool) -> bool:
        """The minimum of a bit."""
        if self.world_size == 1:
            return bit
        tensor = torch.tensor([int(bit)], dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._group)
        return bool(tensor.item())

    def together(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank; if it fails on one, it fails on all, instead of leaving the others waiting.

        Raises:
            SnapshotError: the error of this rank, or another rank's.
        """
        error: SnapshotError | None = None
        result: Any = None
        try:
            result = work()
        except SnapshotError as e:
            error = e
        said = self.exchange(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, words in enumerate(said):
            if words is not None:
                raise SnapshotError(f"rank {rank}: {words}")
        return result


def connect(group: Any, rank: int, world_size: int, timeout_s: float) -> Ranks:
    """The ranks of a job over ``group``, or over a gloo group made here. Collective.

    Raises:
        SnapshotError: several ranks, but no process group.
    """
    if world_size == 1:
        return Ranks(None, 0, 1)
    if not dist.is_available() or not dist.is_initialized():
        raise SnapshotError(
            f"this is rank {rank} of {world_size}, but torch.distributed is not initialised; call attach() after "
            "deepspeed.initialize or init_process_group"
        )
    if dist.get_world_size() != world_size or dist.get_rank() != rank:
        raise SnapshotError(
            f"the worker agent started this process as rank {rank} of {world_size}; torch.distributed says rank "
            f"{dist.get_rank()} of {dist.get_world_size()}: use the RANK and WORLD_SIZE of the environment"
        )
    if group is None:
        import datetime

        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return Ranks(group, rank, world_size)
