"""Sparse rows on the host: held, read by number, and own and remote ones put in the order of a batch.

Kernels check no bounds, here and in the products. So every offset that is read comes from offsets checked once
(:func:`held`), and every column that a batch has, from disk or from another rank, is checked in :func:`joined`.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from gemini_gnn import memory
from gemini_gnn.errors import DataError
from gemini_gnn.graph.sparse import SparseRows
from gemini_gnn.halo.rows import copy_ranges
from gemini_gnn.models.tensors import SparseFeatures


def held(local: SparseRows, in_ram: bool, dtype: torch.dtype) -> SparseFeatures:
    """``local`` as tensors to read from: its arrays themselves, or with ``in_ram`` their copies, values in ``dtype``.

    Raises:
        DataError: its row offsets lead outside of its arrays.
    """
    first, last, ends = int(local.ptr[0]), int(local.ptr[-1]), len(local.index)
    if first < 0 or last > ends or np.any(np.diff(local.ptr) < 0):
        raise DataError(
            f"sparse features of {len(local)} rows: expected offsets that ascend within {ends} stored values; got "
            f"{first}..{last}. The files are damaged: partition the graph again"
        )
    index = as_tensor(local.index[first:last])
    value = None if local.value is None else as_tensor(local.value[first:last])
    if in_ram:  # arrays that are in memory already, in that type, are not copied
        index = index.to(torch.int32, copy=isinstance(local.index, np.memmap))
        value = None if value is None else value.to(dtype, copy=isinstance(local.value, np.memmap))
    return SparseFeatures(torch.from_numpy(local.ptr - first), index, value, local.width, dtype)


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory as a tensor to read from."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; nothing here writes into this one.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def read(local: SparseFeatures, numbers: np.ndarray) -> SparseFeatures:
    """Rows ``numbers`` (int64, each within ``local``), in that order: a copy, with values in the ``dtype`` of ``local``."""
    begin = local.ptr.numpy()[numbers]
    length = local.ptr.numpy()[numbers + 1] - begin
    ptr = offsets(length)
    index = memory.empty((int(ptr[-1]),), torch.int32)
    copy_ranges(local.index, begin, index, ptr[:-1], length)
    value = None
    if local.value is not None:
        value = memory.empty((len(index),), local.value.dtype)
        copy_ranges(local.value, begin, value, ptr[:-1], length)
        value = value.to(local.dtype)
    return SparseFeatures(torch.from_numpy(ptr), index, value, local.width, local.dtype)


def joined(own: SparseFeatures, own_at: np.ndarray, far: SparseFeatures, far_at: np.ndarray) -> SparseFeatures:
    """The rows of ``own`` at the places ``own_at`` of the result, those of ``far`` at ``far_at``.

    Raises:
        DataError: a column outside of the features.
    """
    both = own
    if len(far):
        length = np.empty(len(own) + len(far), dtype=np.int64)
        for part, at in ((own, own_at), (far, far_at)):
            length[at] = np.diff(part.ptr.numpy())
        ptr = offsets(length)
        index = memory.empty((int(ptr[-1]),), torch.int32)
        value = None if own.value is None else memory.empty((len(index),), own.dtype)
        for part, at in ((own, own_at), (far, far_at)):
            begin = part.ptr.numpy()[:-1]
            copy_ranges(part.index, begin, index, ptr[at], length[at])
            if value is not None:
                assert part.value is not None
                copy_ranges(part.value, begin, value, ptr[at], length[at])
        both = SparseFeatures(torch.from_numpy(ptr), index, value, own.width, own.dtype)
    if both.stored:
        columns = both.index.numpy()  # torch would start threads for this, beside those that train
        low, high = int(columns.min()), int(columns.max())
        if low < 0 or high >= both.width:
            raise DataError(
                f"sparse features: expected columns in 0..{both.width - 1}; got {low}..{high}. The files, memory or the "
                "network corrupted them: type `python launch/partition.py --check FOLDER` of the partitioned graph"
            )
    return both


def offsets(length: np.ndarray) -> np.ndarray:
    """Where rows of these lengths begin, and where the last one ends."""
    ptr = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=ptr[1:])
    return ptr
