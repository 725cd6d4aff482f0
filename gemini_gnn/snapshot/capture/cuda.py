"""Copying from a GPU straight into the slots' pages, on a stream of its own.

Account of the concurrency, in addition to copier.py's. Three lines of execution: the compute stream, the side stream, and the
threads that put work on them. ``mark`` (training thread, just after the optimizer step) records an event; ``begin`` (copying
thread) has the side stream wait for it, and the copies follow on it; ``enqueued`` records their end. ``fence`` (training
thread, before the next optimizer step) makes the *compute stream* wait for that end, not the thread; ``wait`` makes the copying
thread wait, and only then is the slot sealed. Tensors that forward changes are copied in the compute stream by the training
thread, so they come before the next forward pass in it, and before ``mark``: ``wait`` covers them too.

No memory is used again too early: what is copied on the side stream lives until the optimizer replaces it, which is after the
fence in the compute stream; what is copied in the compute stream may be freed at once, as in any program.

Pages. The driver must know the slots' pages (``register``), or the host takes part in every copy. That takes a while, so only the
copying thread does it, and a driver that refuses costs speed, nothing else. What is registered must be made unknown
before it is unmapped (``close``): the driver would go on writing to the old pages at addresses that mean others.

What may be interrupted where: nothing new. Until the header says COMMITTED, after ``wait``, nobody believes the bytes.

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
        self._done = torch.cuda.Event(blocking=True)  # who waits for it sleeps; by default it would keep a core busy
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
        """What this thread does from now on, it does on the rank's GPU, on the side stream, after ``mark``."""
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
        # The runtime hands the error of a call that nobody checked to the next launch in this thread: let it be this one.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")

    def enqueued(self) -> None:
        self._done.record(self._stream)

    def wait(self) -> None:
        self._done.synchronize()

    # Either: each in its own stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source.detach(), non_blocking=True)
