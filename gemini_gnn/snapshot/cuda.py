"""Copying from a GPU straight into the slots' pages, on a stream of its own.

Account of the concurrency, in addition to capture.py's. Three lines of execution: the compute stream, the side stream, and the
threads that put work on them. ``mark`` (training thread, just after the optimizer step) records an event that the side
stream waits for; the copies are put on the side stream by the copying thread; ``enqueued`` records their end. ``fence``
(training thread, before the next optimizer step) makes the *compute stream* wait for that end, not the thread; ``wait``
makes the copying thread wait, and only then is the slot sealed. Tensors that forward changes are copied in the compute
stream by the training thread, so they come before the next forward pass in it.

What may be interrupted where: nothing new. Until the header says COMMITTED, after ``wait``, nobody believes the bytes.

Written after the documentation of the calls; no GPU was at hand.
"""

from __future__ import annotations

import torch

from gemini_gnn.snapshot.shards import Shard
from gemini_gnn.snapshot.state import Entry


def on_cuda(entry: Entry) -> bool:
    tensor = entry.get()
    return tensor is not None and tensor.is_cuda


class CudaCopies:
    """The side stream of one rank. ``device``: the rank's GPU, which a new thread has to choose first."""

    def __init__(self) -> None:
        self.device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream()
        self._stepped = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._registered: set[int] = set()

    def mark(self) -> None:
        self._stepped.record(torch.cuda.current_stream())

    def copy(self, shard: Shard, slot: int, source: torch.Tensor, entry: Entry, offset: int) -> None:
        address = shard.addresses[slot]
        if address not in self._registered:
            # After the first step, not at attach: it takes time, and a restart should not wait for it.
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, shard.layout.tail_offset, 0)))
            self._registered.add(address)
        target = shard.tensor(slot, entry.spec, offset)
        if entry.at_once:
            target.copy_(source, non_blocking=True)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._stepped)
            target.copy_(source, non_blocking=True)

    def enqueued(self) -> None:
        self._stream.wait_event(self._stepped)  # also covers the at-once copies, which were recorded before it
        self._done.record(self._stream)

    def fence(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)

    def wait(self) -> None:
        self._done.synchronize()
