"""Copying rows by index, and ranges of a flat array. As machine words, so one kernel serves every dtype, bfloat16 too.

Why not ``torch.index_select`` and ``index_copy_``: between them lies a buffer, and called from a background thread they
start a second pool of OpenMP threads beside the one that trains. The kernel runs without the interpreter lock on the
thread that calls it.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from gemini_gnn import memory

_WORDS = ((8, np.int64), (4, np.int32), (2, np.int16), (1, np.uint8))


def copy_rows(source: torch.Tensor, source_index: np.ndarray, target: torch.Tensor, target_index: np.ndarray) -> None:
    """``target[target_index[i]] = source[source_index[i]]`` for all i, without a buffer between them on the CPU.

    Args:
        source, target: 2-dimensional, same dtype and width, contiguous, on any devices.
        source_index, target_index: int64, of equal length; those of ``target`` unique.

    Raises:
        IndexError: an index outside its tensor; nothing has been copied then.
    """
    assert source.dtype == target.dtype and source.shape[1:] == target.shape[1:]
    assert len(source_index) == len(target_index)
    for name, index, rows in (("source", source_index, len(source)), ("target", target_index, len(target))):
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= rows):
            raise IndexError(f"{name} has rows 0..{rows - 1}; got indices {int(index.min())}..{int(index.max())}")
    if source.device.type == target.device.type == "cpu":
        _copy(_words(source), source_index, _words(target), target_index)
        return
    picked = source[torch.from_numpy(source_index).to(source.device)].to(target.device, non_blocking=True)
    target[torch.from_numpy(target_index).to(target.device)] = picked


def copy_ranges(
    source: torch.Tensor, begin: np.ndarray, target: torch.Tensor, first: np.ndarray, length: np.ndarray
) -> None:
    """``target[first[i]:first[i] + length[i]] = source[begin[i]:begin[i] + length[i]]`` for all i: rows of uneven length.

    Args:
        source, target: 1-dimensional, same dtype, contiguous, on the CPU.
        begin, first, length: int64, of equal length. Nothing here checks that the ranges lie within the tensors.
    """
    assert source.dtype == target.dtype and len(begin) == len(first) == len(length)
    word = next(word for size, word in _WORDS if size == source.element_size())
    _copy_ranges(
        source.view(torch.uint8).numpy().view(word), begin, target.view(torch.uint8).numpy().view(word), first, length
    )


def empty_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised ``[rows, width]``.

    On the CPU in memory that earlier batches used: the page faults of a new tensor took several times as long as
    gathering rows into it.
    """
    if device.type != "cpu":
        return torch.empty((rows, width), dtype=dtype, device=device)
    return memory.empty((rows, width), dtype)


def _words(rows: torch.Tensor) -> np.ndarray:
    """The same memory as a numpy matrix of the widest word that divides a row."""
    assert rows.is_contiguous()
    width = rows.shape[1] * rows.element_size()
    # Flat first: strides of a matrix without rows, or of one column, mean nothing to torch's is_contiguous, but to view.
    as_bytes = rows.view(rows.numel()).view(torch.uint8).numpy().reshape(len(rows), width)
    return as_bytes.view(next(word for size, word in _WORDS if width % size == 0))


@numba.njit(nogil=True, cache=True)
def _copy(source, source_index, target, target_index):
    for i in range(len(source_index)):
        a, b = source_index[i], target_index[i]
        for j in range(source.shape[1]):
            target[b, j] = source[a, j]


@numba.njit(nogil=True, cache=True)
def _copy_ranges(source, begin, target, first, length):
    for i in range(len(begin)):
        # As views: numba looks for negative indices in each access, and does not vectorise then (6 to 16 times slower).
        out, part = target[first[i] : first[i] + length[i]], source[begin[i] : begin[i] + length[i]]
        for j in range(len(part)):
            out[j] = part[j]
