"""``x W^T + b`` of float32 tensors, multiplied in bfloat16: half the bytes, and twice the flops where
the processor has instructions for it.

Operands are rounded to bfloat16, products are summed in float32, and each sum is rounded once more.
So a result is off by at most ``3 * 2**-8`` of the sum of the absolute values of its terms, to first
order: 2**-8 for each operand and for the result. Tensors that come in, go out and are
gradients stay float32; the weight's gradient is summed over pieces in float32.

Rows are multiplied in pieces of few sizes, the last one padded with zeros. oneDNN compiles a kernel
for each shape and keeps a thousand of them: batches, which differ in size, would compile at each
step and hold 0.8 GB of kernels in the end. A piece also stays in the cache between cast and product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemini_gnn import memory

_PIECE = 2048  # rows
_STEP = 256  # the last piece has a multiple of so many


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in float32, of bfloat16 products; differentiable in all three.

    Args:
        x: float32 ``[rows, in]``.
        weight: float32 ``[out, in]``.
        bias: float32 ``[out]``; it is added in float32.
    """
    if x.device.type == "cpu":
        return _Linear.apply(x, weight, bias)
    out = F.linear(x.bfloat16(), weight.bfloat16()).float()
    return out if bias is None else out + bias


def slow_here(device: torch.device) -> bool:
    """Whether ``device`` lacks instructions for bfloat16 products: there they take longer than float32 ones."""
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and not any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rows, w = len(x), weight.bfloat16()
        low = memory.empty((-(-rows // _STEP) * _STEP, x.shape[1]), torch.bfloat16)
        low[rows:] = 0
        out = memory.empty((rows, len(w)), torch.float32)
        product = torch.empty(_PIECE, len(w), dtype=torch.bfloat16)
        for begin, end, padded in _pieces(rows):
            low[begin:end].copy_(x[begin:end])
            torch.mm(low[begin:padded], w.T, out=product[: padded - begin])
            out[begin:end].copy_(product[: end - begin])
            if bias is not None:
                out[begin:end].add_(bias)
        ctx.save_for_backward(low, w)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (low, w), rows = ctx.saved_tensors, len(grad)
        wanted, _, with_bias = ctx.needs_input_grad
        x_grad = memory.empty((rows, w.shape[1]), torch.float32) if wanted else None
        weight_grad, bias_grad = torch.zeros(w.shape), torch.zeros(len(w)) if with_bias else None
        piece = torch.empty(_PIECE, len(w), dtype=torch.bfloat16)
        part = torch.empty(w.shape, dtype=torch.bfloat16)
        product = torch.empty(_PIECE, w.shape[1], dtype=torch.bfloat16)
        for begin, end, padded in _pieces(rows):
            g = piece[: padded - begin]
            g[: end - begin].copy_(grad[begin:end])
            g[end - begin :] = 0
            weight_grad += torch.mm(g.T, low[begin:padded], out=part)
            if bias_grad is not None:
                bias_grad += grad[begin:end].sum(0)
            if x_grad is not None:
                torch.mm(g, w, out=product[: len(g)])
                x_grad[begin:end].copy_(product[: end - begin])
        return x_grad, weight_grad, bias_grad


def _pieces(rows: int) -> Iterator[tuple[int, int, int]]:
    """``begin, end`` of each piece, and where it ends with its padding."""
    for begin in range(0, rows, _PIECE):
        end = min(begin + _PIECE, rows)
        yield begin, end, begin + -(-(end - begin) // _STEP) * _STEP
