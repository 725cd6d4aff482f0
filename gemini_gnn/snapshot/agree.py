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

SIZE_BYTES, HEAD_BYTES = 8, 1016  # nearly every value is that short: a recovery has a dozen, one all_gather each


class Ranks:
    """The ranks of ``group`` (None: the only one)."""

    def __init__(self, group: Any, rank: int, world_size: int):
        self._group, self.rank, self.world_size = group, rank, world_size

    def exchange(self, value: Any) -> list[Any]:
        """``value`` (JSON) of every rank, by rank."""
        if self.world_size == 1:
            return [value]
        text = json.dumps(value).encode()
        heads = self._gather(len(text).to_bytes(SIZE_BYTES, "little") + text[:HEAD_BYTES], SIZE_BYTES + HEAD_BYTES)
        sizes = [int.from_bytes(head[:SIZE_BYTES], "little") for head in heads]
        texts = [head[SIZE_BYTES:] for head in heads]
        if max(sizes) > HEAD_BYTES:
            rests = self._gather(text[HEAD_BYTES:], max(sizes) - HEAD_BYTES)
            texts = [head + rest for head, rest in zip(texts, rests, strict=True)]
        return [json.loads(text[:size]) for text, size in zip(texts, sizes, strict=True)]

    def _gather(self, mine: bytes, length: int) -> list[bytes]:
        """``mine`` of every rank, by rank, filled up to ``length``."""
        sent = torch.frombuffer(bytearray(mine.ljust(length, b"\0")), dtype=torch.uint8)
        parts = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(parts, sent, group=self._group)
        return [part.numpy().tobytes() for part in parts]

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
