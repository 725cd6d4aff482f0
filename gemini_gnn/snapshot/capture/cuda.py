"""Copying from a GPU straight into the slots' pages, on a stream of its own.

Account of the concurrency, in addition to copier.py's. Three lines of execution: the compute stream, the side stream, and
the threads that put work on them. ``mark`` (training thread, just after the optimizer step) records an event. ``begin``
(copying thread) has the side stream wait for it; the copies follow, and ``end`` records their end. ``fence`` (training
thread, before the next optimizer step) makes the *compute stream* wait for that end, not the thread. ``wait`` makes the
copying thread wait for it before it seals the slot. The training thread copies the tensors that forward changes in the
compute stream: before the next forward pass, and before ``mark``, so ``wait`` covers them too.

No memory is used again too early. A tensor that is copied on the side stream lives until the optimizer replaces it, which is
after the fence in the compute stream. A tensor that is copied in the compute stream may be freed at once, as in any program.

Pages. The driver must know the slots' pages (``register``), or the host takes part in every copy. That takes a while, so
only the copying thread does it; a driver that refuses only costs speed. ``close`` makes the pages unknown before they are
unmapped: otherwise the driver would still write to the old pages at addresses that now mean others.

Interruption: as for copier.py. Until the header says COMMITTED, after ``wait``, no reader believes the bytes.

Written after the documentation of the calls and the sources of torch; no GPU was at hand. Its order of calls is tested with
a fake driver (tests/training/test_cuda_on_cpu.py), the rest waits for tests/training/test_cuda.py on a machine that has one.
"""

from __future__ import annotations

import contextlib
import logging

import torch

log = logging.getLogger(__name__)


def on_gpu(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_cuda


class CudaCopies:
    """The side stream of one rank. Made and closed by the training thread."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream()
        self._stepped = torch.cuda.Event()
        self._done = torch.cuda.Event(blocking=True)  # a thread that waits sleeps; by default it would keep a core busy
        self._registered: list[int] = []
        self._refused = False

    # The training thread

    def mark(self) -> None:
        self._stepped.record(torch.cuda.current_stream())

    def fence(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)

    def close(self) -> None:
        """Forget the slots' pages; the copying thread has ended.

        Raises:
            RuntimeError: the driver's error; every page was tried all the same.
        """
        registered, self._registered = self._registered, []
        try:
            self._stream.synchronize()  # after an error copies may still be under way
        finally:
            errors = [int(torch.cuda.cudart().cudaHostUnregister(address)) for address in registered]
        for error in errors:
            torch.cuda.check_error(error)

    # The copying thread

    def begin(self) -> None:
        """Put this thread's further work on the rank's GPU, on the side stream, after ``mark``."""
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._stream)
        self._stream.wait_event(self._stepped)

    def register(self, address: int, nbytes: int) -> None:
        """Tell the driver of the pages of a slot, once."""
        if self._refused or address in self._registered:
            return
        torch.cuda.set_device(self._device)  # a new thread starts on device 0
        error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        if error == 0:
            self._registered.append(address)
            return
        self._refused = True
        log.warning(
            "the driver does not page-lock the arena (CUDA error %d): snapshots are taken all the same, but slower",
            error,
        )
        # The runtime raises an unchecked call's error at the thread's next launch: this one takes it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")

    def end(self) -> None:
        """Record that all copies are on the side stream."""
        self._done.record(self._stream)

    def wait(self) -> None:
        self._done.synchronize()

    # Either: each in its own stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source.detach(), non_blocking=True)
