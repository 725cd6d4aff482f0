"""Deterministic, differentiable products of a block, or of sparse features, with rows. Knows blocks and tensors, no models.

A block is a sparse matrix A ``[num_dst, num_src]``. Forward is a product with A, backward one with its transpose, which
every block carries: each output row is summed by one thread in one order, so there are no atomics and two runs agree bit
for bit.

    CPU     the loops of :mod:`gemini_gnn.models.kernels`, rows cut into one piece per torch thread
    others  gather the edges' rows, ``torch.segment_reduce`` them. It holds ``[edges, features]`` for a moment, but sums
            each segment in order; cuSPARSE's default CSR product does not promise the same bits twice.

16-bit features are summed in float32 and returned in their own type.

Sparse features are input, never a result: no product has a gradient for them. On other devices they are made dense.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemini_gnn import memory
from gemini_gnn.models import bf16
from gemini_gnn.models.tensors import BlockTensors, SparseFeatures

_SPLIT_EDGES = 20_000  # fewer edges than this are not worth waking a thread for

# Costs in flops of a GEMM. A float moved by a sparse product: 8 GB/s against 85 GFLOP/s measured on
# one Zen 4 core, and the same order on a GPU (4.8 TB/s against 60 TFLOP/s on an H200). A stored
# value times one float of a weight, forward and backward: 0.13 ns there (0.27 where the weight is
# too large for the L2 cache: then the choice is clear). A stored value added to a dense row, where
# it lies alone: 1.2 ns.
_FLOPS_PER_FLOAT = 40
_FLOPS_PER_PRODUCT = 11
_FLOPS_PER_VALUE = 100


def linear(x: Tensor | SparseFeatures, weight: Tensor, bias: Tensor | None = None, in_bf16: bool = False) -> Tensor:
    """``x W^T + b``: torch's own of dense rows; of sparse ones only the stored values are multiplied.

    A row is summed over its columns in ascending order, whichever other rows there are.

    Args:
        x: ``[rows, in]``.
        weight: ``[out, in]``.
        in_bf16: see :mod:`gemini_gnn.models.bf16`; sparse rows on the CPU stay float32.

    Returns:
        ``[rows, out]``.
    """
    if isinstance(x, SparseFeatures) and _compiled(x):
        out = _SparseLinear.apply(weight, x)
        return out if bias is None else out + bias
    return (bf16.linear if in_bf16 else F.linear)(dense(x), weight, bias)


def dense(x: Tensor | SparseFeatures) -> Tensor:
    """``x`` as a tensor ``[rows, width]``."""
    return x.dense() if isinstance(x, SparseFeatures) else x


def project_first(block: BlockTensors, x_src: Tensor | SparseFeatures, out_features: int) -> bool:
    """Whether a sum over neighbors is cheaper taken over projected rows than over the rows themselves (both are right).

    Forward and backward are counted; the aggregate-first way needs no sparse product backward when its input needs no gradient.
    """
    width, edges = x_src.shape[1], block.num_edges
    gemm = (6 if x_src.requires_grad else 4) * width * out_features  # 2 flops per multiply-add, in 2 or 3 GEMMs
    project = edges * out_features * _FLOPS_PER_FLOAT * 2
    if isinstance(x_src, SparseFeatures):
        project += x_src.stored * out_features * _FLOPS_PER_PRODUCT
        gathered = edges * x_src.stored / max(len(x_src), 1) * _FLOPS_PER_VALUE
    else:
        project += block.num_src * gemm
        gathered = edges * width * _FLOPS_PER_FLOAT * (2 if x_src.requires_grad else 1)
    return project < block.num_dst * gemm + gathered


def mean(block: BlockTensors, x_src: Tensor) -> Tensor:
    """Mean of the in-neighbors' rows, zeros where there is none.

    Args:
        x_src: ``[num_src, f]``.

    Returns:
        ``[num_dst, f]``.
    """
    return _Product.apply(x_src, block, _inverse_count(block, x_src), None, None, None, "none")


def mean_beside_root(block: BlockTensors, x_src: Tensor | SparseFeatures) -> Tensor:
    """``[num_dst, 2 f]``: :func:`mean` on the left, the destinations' own rows on the right.

    In one matrix because a layer then needs one GEMM for both weights, and its backward pass one product for both gradients.
    """
    row_scale = _inverse_count(block, x_src)
    if isinstance(x_src, SparseFeatures) and _compiled(x_src):
        return _sparse_product(block, row_scale, None, None, x_src, x_src.width, None)
    return _Product.apply(dense(x_src), block, row_scale, None, None, None, "beside")


def weighted_sum(block: BlockTensors, values: Tensor, x_src: Tensor) -> Tensor:
    """``out[i] = sum of values[e] x_src[j]`` over the edges e = (i, j).

    Args:
        values: ``[edges]`` in CSR order, constants (they get no gradient).
        x_src: ``[num_src, f]``.
    """
    return _Product.apply(x_src, block, None, None, values, None, "none")


def scaled_sum(
    block: BlockTensors,
    x_src: Tensor | SparseFeatures,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    values: Tensor | None,
    root_scale: Tensor,
) -> Tensor:
    """``out[i] = root_scale[i] x_src[i] + row_scale[i] * sum of values[e] col_scale[j] x_src[j]`` over the edges e = (i, j).

    All scales are constants: ``row_scale`` and ``root_scale`` ``[num_dst]``, ``col_scale`` ``[num_src]``, ``values`` ``[edges]``.
    """
    if isinstance(x_src, SparseFeatures) and _compiled(x_src):
        return _sparse_product(block, row_scale, col_scale, values, x_src, 0, root_scale)
    return _Product.apply(dense(x_src), block, row_scale, col_scale, values, root_scale, "add")


def maximum(block: BlockTensors, x_src: Tensor) -> Tensor:
    """Maximum of the in-neighbors' rows per feature, zeros where there is none; ``[num_dst, f]``.

    Neighbors that attain the maximum share the gradient evenly (as ``torch.amax`` and PyG do), so that their order has no say.
    """
    return _Maximum.apply(x_src, block)


def attention_sum(block: BlockTensors, weight: Tensor, x_src: Tensor) -> Tensor:
    """``out[i, h] = sum of weight[e, h] x_src[j, h]`` over the edges e = (i, j); differentiable in both arguments.

    Args:
        weight: ``[edges, heads]`` in CSR order.
        x_src: ``[num_src, heads * c]``, head by head.

    Returns:
        ``[num_dst, heads * c]``.
    """
    return _Attention.apply(weight, x_src, block)


def source_to_edge(block: BlockTensors, value: Tensor) -> Tensor:
    """``[edges, h]``: each edge gets the row of its source (``value`` is ``[num_src, h]``)."""
    return _SourceToEdge.apply(value, block)


def destination_to_edge(block: BlockTensors, value: Tensor) -> Tensor:
    """``[edges, h]``: each edge gets the row of its destination (``value`` is ``[num_dst, h]``)."""
    return _DestinationToEdge.apply(value, block)


def edge_sum(block: BlockTensors, value: Tensor) -> Tensor:
    """``[num_dst, h]``: sum over the in-edges (``value`` is ``[edges, h]``)."""
    return _EdgeSum.apply(value, block)


def edge_maximum(block: BlockTensors, value: Tensor) -> Tensor:
    """``[num_dst, h]``: maximum over the in-edges, -inf where there is none. Carries no gradient."""
    return _segment(value.detach(), block.indptr, "max")


def counts(block: BlockTensors) -> Tensor:
    """int64 ``[num_dst]``: in-edges of each destination in the block."""
    return block.indptr[1:] - block.indptr[:-1]


def destinations(block: BlockTensors) -> Tensor:
    """int64 ``[edges]``: destination of each edge."""
    rows = torch.arange(block.num_dst, device=block.indptr.device)
    return torch.repeat_interleave(rows, counts(block), output_size=block.num_edges)


# What follows is private: the autograd functions, then the two implementations of each product.


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, x):
        ctx.x = x
        rows = _empty(weight.shape[1], weight.shape[0], weight).copy_(weight.T)  # each stored value adds one of them
        out = _empty(len(x), weight.shape[0], weight)
        _product(x.ptr, x.index, x.value, None, None, rows, None, 0, None, out, out.shape[1])
        return out.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from gemini_gnn.models import kernels

        x = ctx.x
        value = None if x.value is None else x.value.to(_wide(grad.dtype))
        ptr_t, row_t = torch.empty(x.width + 1, dtype=torch.int64), torch.empty_like(x.index)
        value_t = None if value is None else torch.empty_like(value)
        kernels.transpose(*_arrays(x.ptr, x.index, value, ptr_t, row_t, value_t))
        out = _empty(x.width, grad.shape[1], grad)
        _product(ptr_t, row_t, value_t, None, None, grad, None, 0, None, out, grad.shape[1])
        return out.T.to(grad.dtype), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block, row_scale, col_scale, values, root_scale, root):
        ctx.block, ctx.constants, ctx.root = block, (row_scale, col_scale, values, root_scale), root
        width = x.shape[1]
        sums = _empty(block.num_dst, width * (2 if root == "beside" else 1), x)
        _product(
            block.indptr,
            block.indices,
            values,
            row_scale,
            col_scale,
            x,
            x if root == "add" else None,
            0,
            root_scale,
            sums,
            width,
        )
        if root == "beside":
            sums[:, width:] = x[: block.num_dst]
        return sums.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        block, root = ctx.block, ctx.root
        row_scale, col_scale, values, root_scale = ctx.constants
        width = grad.shape[1] // (2 if root == "beside" else 1)
        out = _empty(block.num_src, width, grad)
        _product(
            block.indptr_t,
            block.indices_t,
            None if values is None else values[block.edge_t],
            col_scale,
            row_scale,
            grad,
            None if root == "none" else grad,
            width if root == "beside" else 0,
            root_scale,
            out,
            width,
        )
        return out.to(grad.dtype), None, None, None, None, None, None


class _Maximum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        rows = x.to(_wide(x.dtype))
        if _compiled(x):
            rows = rows.contiguous()
            top = _empty(block.num_dst, x.shape[1], rows)
            _by_rows("maximum", block.indptr, block.indices, rows, top)
        else:
            top = _segment(rows.index_select(0, block.indices), block.indptr, "max")
            top = torch.where(counts(block)[:, None] > 0, top, 0)
        ctx.block = block
        ctx.save_for_backward(rows, top)
        return top.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.needs_input_grad[0]:
            return None, None
        (rows, top), block = ctx.saved_tensors, ctx.block
        wide = grad.to(rows.dtype).contiguous()
        if _compiled(rows):
            share, out = torch.empty_like(top), _empty(rows.shape[0], rows.shape[1], rows)
            _by_rows("maximum_share", block.indptr, block.indices, rows, top, wide, share)
            _by_rows("maximum_back", block.indptr_t, block.indices_t, rows, top, share, out)
        else:
            to = destinations(block)
            hit = (rows.index_select(0, block.indices) == top.index_select(0, to)).to(rows.dtype)
            share = wide / _segment(hit, block.indptr, "sum").clamp(min=1)
            edges = hit * share.index_select(0, to)
            out = _segment(edges.index_select(0, block.edge_t), block.indptr_t, "sum")
        return out.to(grad.dtype), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, x, block):
        ctx.block = block
        ctx.save_for_backward(weight, x)
        return _heads_product(block.indptr, block.indices, None, weight, x).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight, x), block = ctx.saved_tensors, ctx.block
        weight_grad = x_grad = None
        if ctx.needs_input_grad[0]:
            weight_grad = _heads_dot(block, grad, x, weight.shape[1]).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            x_grad = _heads_product(block.indptr_t, block.indices_t, block.edge_t, weight, grad).to(x.dtype)
        return weight_grad, x_grad, None


class _SourceToEdge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, block):
        ctx.block = block
        return value.index_select(0, block.indices)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _segment(grad.index_select(0, ctx.block.edge_t), ctx.block.indptr_t, "sum"), None


class _DestinationToEdge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, block):
        ctx.block = block
        return torch.repeat_interleave(value, counts(block), dim=0, output_size=block.num_edges)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _segment(grad, ctx.block.indptr, "sum"), None


class _EdgeSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, block):
        ctx.block = block
        return _segment(value, block.indptr, "sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return torch.repeat_interleave(grad, counts(ctx.block), dim=0, output_size=ctx.block.num_edges), None


def _sparse_product(block, row_scale, col_scale, values, x: SparseFeatures, root_to: int, root_scale) -> Tensor:
    """See ``kernels.sparse_product``; ``[num_dst, width + root_to]``."""
    wide = _wide(x.dtype)
    scales = [None if c is None else c.to(wide) for c in (values, row_scale, col_scale)]
    value, root_scale = (None if c is None else c.to(wide) for c in (x.value, root_scale))
    out = memory.empty((block.num_dst, x.width + root_to), wide)
    _by_rows("sparse_product", block.indptr, block.indices, *scales, x.ptr, x.index, value, root_to, root_scale, out)
    return out.to(x.dtype)


def _inverse_count(block: BlockTensors, like: Tensor | SparseFeatures) -> Tensor:
    return counts(block).clamp(min=1).to(_wide(like.dtype)).reciprocal()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _empty(rows: int, width: int, like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return memory.empty((rows, width), _wide(like.dtype))
    return torch.empty(rows, width, dtype=_wide(like.dtype), device=like.device)


def _compiled(x: Tensor | SparseFeatures) -> bool:
    return x.device.type == "cpu"


def _segment(value: Tensor, indptr: Tensor, reduce: str) -> Tensor:
    """Reduce consecutive rows of ``value``; an empty segment gives 0 (sum) or -inf (max)."""
    if len(indptr) == 1 or value.shape[0] == 0:  # segment_reduce refuses empty data
        return value.new_full((len(indptr) - 1, *value.shape[1:]), 0.0 if reduce == "sum" else float("-inf"))
    wide = value.to(_wide(value.dtype))
    initial = 0.0 if reduce == "sum" else float("-inf")
    return torch.segment_reduce(wide, reduce, offsets=indptr, axis=0, initial=initial, unsafe=True).to(value.dtype)


def _product(indptr, indices, values, row_scale, col_scale, x, root, root_from, root_scale, out, width) -> None:
    """See ``kernels.product``; ``x`` has at least ``width`` columns, ``out`` at least ``len(indptr) - 1`` rows."""
    x, root = x.to(out.dtype), None if root is None else root.to(out.dtype)
    values, row_scale, col_scale, root_scale = (
        None if c is None else c.to(out.dtype) for c in (values, row_scale, col_scale, root_scale)
    )
    rows = out.shape[0]
    root_rows = 0 if root is None else min(rows, root.shape[0])
    if _compiled(out):
        x, root = x.contiguous(), None if root is None else root.contiguous()
        _by_rows(
            "product",
            indptr,
            indices,
            values,
            row_scale,
            col_scale,
            x,
            root,
            root_from,
            root_scale,
            root_rows,
            out,
            width,
        )
        return
    edges = x[:, :width].index_select(0, indices)
    if values is not None:
        edges = edges * values[:, None]
    if col_scale is not None:
        edges = edges * col_scale.index_select(0, indices)[:, None]
    sums = _segment(edges, indptr, "sum")
    if row_scale is not None:
        sums = sums * row_scale[:, None]
    if root is not None:
        own = root[:root_rows, root_from : root_from + width]
        sums[:root_rows] += own if root_scale is None else own * root_scale[:root_rows, None]
    out[:, :width] = sums


def _heads_product(indptr, indices, edge, weight, x) -> Tensor:
    x = x.to(_wide(x.dtype))
    weight = weight.to(x.dtype)
    rows, heads = len(indptr) - 1, weight.shape[1]
    if _compiled(x):
        out = _empty(rows, x.shape[1], x)
        _by_rows("heads_product", indptr, indices, edge, weight.contiguous(), x.contiguous(), out)
        return out
    weight = weight if edge is None else weight.index_select(0, edge)
    edges = x.index_select(0, indices).view(len(indices), heads, x.shape[1] // heads) * weight[:, :, None]
    return _segment(edges.flatten(1), indptr, "sum")


def _heads_dot(block: BlockTensors, a: Tensor, x: Tensor, heads: int) -> Tensor:
    x = x.to(_wide(x.dtype))
    a = a.to(x.dtype)
    if _compiled(x):
        out = x.new_empty(block.num_edges, heads)
        _by_rows("heads_dot", block.indptr, block.indices, a.contiguous(), x.contiguous(), out)
        return out
    product = a.index_select(0, destinations(block)) * x.index_select(0, block.indices)
    return product.view(block.num_edges, heads, x.shape[1] // heads).sum(2)


def _by_rows(kernel: str, indptr: Tensor, indices: Tensor, *args: Any) -> None:
    """Run a kernel over all rows, cut into one piece of about equally many edges per torch thread."""
    from gemini_gnn.models import kernels  # numba costs 0.2 s to import: only once something is computed

    function: Callable[..., None] = getattr(kernels, kernel)
    arrays = _arrays(indptr, indices, *args)
    rows, threads = len(indptr) - 1, torch.get_num_threads()
    if threads == 1 or len(indices) < _SPLIT_EDGES:
        function(0, rows, *arrays)
        return
    ends = np.searchsorted(arrays[0], np.linspace(0, len(indices), threads + 1)[1:-1])
    bounds = [0, *(int(end) for end in ends), rows]
    futures = [
        _pool(os.getpid(), threads).submit(function, low, high, *arrays) for low, high in itertools.pairwise(bounds)
    ]
    for future in futures:
        future.result()


def _arrays(*args: Any) -> list[Any]:
    return [a.detach().numpy() if isinstance(a, Tensor) else a for a in args]


@functools.cache
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked child has none of its parent's, hence the pid."""
    return ThreadPoolExecutor(threads, thread_name_prefix="csr")
