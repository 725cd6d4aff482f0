"""A sampled block as torch tensors on one device. No arithmetic here; the products are in :mod:`gemini_gnn.models.csr`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

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
