"""Host memory for large tensors that come and go with every batch.

The allocator gives a freed block of many megabytes back to the system at once, and the next batch pays for it again, page by
page: gathering 450 k rows of 128 features into fresh memory took 110-160 ms of CPU time (on huge pages 270-450), into held
memory 50 (one core of a virtual machine, the rest of the training step running between the gathers). Asking glibc to
keep freed memory instead (mallopt) does not do: torch allocates aligned, an aligned request does not fit the hole that
the same request left (glibc before 2.38), and the heap grows from step to step.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 64  # bytes, as torch's own tensors
_SMALL_BYTES = 1 << 20  # below this the allocator keeps what it is given back

_lock = threading.Lock()
_blocks: list[np.ndarray] = []  # every block handed out or waiting; guarded by _lock


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised, contiguous CPU tensor; its memory is used again once nothing refers to it any more.

    Nothing is given back to the system, except blocks that a larger one replaces: what stays held is about the most that
    was in use at one time. Any thread may call. The memory is as the last user left it: write before you read.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    with _lock:
        block = _take(size + _ALIGNMENT)
    first = -block.ctypes.data % _ALIGNMENT
    # .data: no view to autograd, which lets nobody change a function's view in place
    return torch.from_numpy(block[first : first + size]).view(dtype).view(tuple(shape)).data


def _take(size: int) -> np.ndarray:
    """The smallest free block that fits without wasting more than half of it, else a new one in place of one outgrown."""
    # A tensor refers to its block through numpy, where a slice of a slice refers to the array that owns the memory. Of a free
    # one there are two references, the list's and getrefcount's argument; nobody gains another meanwhile, since blocks
    # are handed out here alone.
    free = [i for i in range(len(_blocks)) if sys.getrefcount(_blocks[i]) == 2]
    fitting = [i for i in free if size <= len(_blocks[i]) <= 2 * size + size // 4]
    if fitting:
        return _blocks[min(fitting, key=lambda i: len(_blocks[i]))]
    outgrown = [i for i in free if len(_blocks[i]) < size]
    if outgrown:
        del _blocks[max(outgrown, key=lambda i: len(_blocks[i]))]
    # Batches differ by some percent: the room to spare is only touched, hence only backed by memory, when it is needed.
    block = np.empty(size + size // 8, dtype=np.uint8)
    _blocks.append(block)
    return block
