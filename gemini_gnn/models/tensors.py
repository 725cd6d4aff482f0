"""A sampled block, and sparse features, as torch tensors on one device. The products are in :mod:`gemini_gnn.models.csr`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from gemini_gnn import memory
from gemini_gnn.sampling.blocks import Block


@dataclass(frozen=True)
class BlockTensors:
    """:class:`gemini_gnn.sampling.blocks.Block` on a device; the same fields, dtypes and meanings."""

    num_src: int
    num_dst: int
    num_edges: int
    indptr: Tensor
    indices: Tensor
    indptr_t: Tensor
    indices_t: Tensor
    edge_t: Tensor
    degree: Tensor
    src_degree: Tensor
    edge_weight: Tensor | None = None


def to_tensors(block: Block, device: torch.device | str = "cpu") -> BlockTensors:
    """The block on ``device``. On the CPU nothing is copied: the tensors share memory with the block's arrays."""

    def move(array: np.ndarray) -> Tensor:
        if not array.flags.writeable:
            array = array.copy()  # torch has no read-only tensors
        return torch.from_numpy(array).to(device, non_blocking=True)

    return BlockTensors(
        num_src=block.num_src,
        num_dst=block.num_dst,
        num_edges=block.num_edges,
        indptr=move(block.indptr),
        indices=move(block.indices),
        indptr_t=move(block.indptr_t),
        indices_t=move(block.indices_t),
        edge_t=move(block.edge_t),
        degree=move(block.degree),
        src_degree=move(block.src_degree),
        edge_weight=None if block.edge_weight is None else move(block.edge_weight),
    )


def pinned(block: BlockTensors) -> BlockTensors:
    """The block in page-locked host memory, from where a copy to a GPU neither waits for the GPU nor keeps it waiting."""
    return _each(block, Tensor.pin_memory)


def moved(block: BlockTensors, device: torch.device) -> BlockTensors:
    """The block on ``device``."""
    return _each(block, lambda tensor: tensor.to(device, non_blocking=True))


def _each(block: BlockTensors, change: Callable[[Tensor], Tensor]) -> BlockTensors:
    values = {f.name: getattr(block, f.name) for f in fields(block)}
    return BlockTensors(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})


@dataclass(frozen=True)
class SparseFeatures:
    """Features ``[rows, width]`` of which only the stored values exist: the ``x`` of models with ``takes_sparse = True``.

    Attributes:
        ptr: int64 ``[rows + 1]``, begins with 0; row r is ``index[ptr[r]:ptr[r + 1]]``.
        index: int32 ``[stored]``, columns, ascending within a row.
        value: ``[stored]``, float32 or bfloat16; None: every stored value is 1.
        width: columns. dtype: of the values, also where they are left out.
    """

    ptr: Tensor
    index: Tensor
    value: Tensor | None
    width: int
    dtype: torch.dtype = torch.float32

    requires_grad = False

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ptr) - 1, self.width

    @property
    def stored(self) -> int:
        return len(self.index)

    @property
    def device(self) -> torch.device:
        return self.ptr.device

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, rows: slice) -> SparseFeatures:
        """The first rows, ``[:n]``: views."""
        assert rows.start is None and rows.step is None
        ptr = self.ptr[: slice(rows.stop).indices(len(self))[1] + 1]
        stored = int(ptr[-1])
        value = None if self.value is None else self.value[:stored]
        return replace(self, ptr=ptr, index=self.index[:stored], value=value)

    def to(self, to: torch.device | str | torch.dtype, non_blocking: bool = False) -> SparseFeatures:
        """On another device, or with values of another floating-point type."""
        if isinstance(to, torch.dtype):
            return replace(self, value=None if self.value is None else self.value.to(to), dtype=to)
        move = lambda tensor: tensor.to(to, non_blocking=non_blocking)  # noqa: E731
        value = None if self.value is None else move(self.value)
        return replace(self, ptr=move(self.ptr), index=move(self.index), value=value)

    def pin_memory(self) -> SparseFeatures:
        value = None if self.value is None else self.value.pin_memory()
        return replace(self, ptr=self.ptr.pin_memory(), index=self.index.pin_memory(), value=value)

    def dense(self) -> Tensor:
        """``[rows, width]`` on the same device. Each place is written at most once, so two runs agree bit for bit."""
        if self.device.type == "cpu":
            rows = memory.empty(self.shape, self.dtype).zero_()
        else:
            rows = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        lengths = self.ptr[1:] - self.ptr[:-1]
        row = torch.repeat_interleave(torch.arange(len(self), device=self.device), lengths, output_size=self.stored)
        value = torch.ones((), dtype=self.dtype, device=self.device) if self.value is None else self.value
        rows[row, self.index.long()] = value
        return rows


def needs_dense(model: nn.Module, device: torch.device) -> bool:
    """Whether sparse features are made dense for ``model``: it does not declare ``takes_sparse = True``, or it is on a GPU,
    where the sparse products are not ours."""
    return device.type == "cuda" or not getattr(model, "takes_sparse", False)


def moved_features(x: Tensor | SparseFeatures, device: torch.device, dense: bool) -> Tensor | SparseFeatures:
    """``x`` on ``device``, and there as a tensor if ``dense`` says so."""
    x = x.to(device, non_blocking=True)
    return x.dense() if dense and isinstance(x, SparseFeatures) else x
