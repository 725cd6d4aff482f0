"""A stack of layers on a stack of blocks: what GraphSAGE, GCN and GAT have in common. Knows no ranks and no sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemini_gnn import memory
from gemini_gnn.models import csr
from gemini_gnn.models.tensors import BlockTensors, SparseFeatures


class Network(nn.Module):
    """Graph convolutions with LayerNorm (optional), activation and dropout between them.

    Layer ``i`` turns the rows of a block's sources into rows of its destinations, so the rows shrink from layer to layer to
    the seed nodes. ``forward`` is nothing but a fold of :meth:`layer`; exact inference over a whole graph runs the same
    :meth:`layer` on blocks that hold all in-neighbors, layer by layer.

    Args:
        layers: convolutions, called as ``conv(block, h_src) -> h_dst``; each tells its width as ``out_features``.
        activation: after every layer but the last. May work in place (fresh rows of 100 MB cost more in page faults than
            in arithmetic).
        dropout: probability, after the activation.
        layer_norm: normalise each hidden row before the activation (Ba et al. 2016).

    Attributes:
        takes_sparse: ``x`` may be sparse features; a model that does not say so is given dense ones.
    """

    takes_sparse = True

    def __init__(
        self,
        layers: Sequence[nn.Module],
        activation: Callable[[Tensor], Tensor],
        dropout: float = 0.0,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        widths = [self.out_features(i) for i in range(len(layers) - 1)] if layer_norm else []
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def multiply_in_bf16(self) -> None:
        """From now on, the dense products of all layers: see :mod:`gemini_gnn.models.bf16`."""
        for conv in self.layers:
            conv.in_bf16 = True  # type: ignore[assignment]

    def out_features(self, i: int) -> int:
        """Width of the rows that layer ``i`` returns."""
        return int(self.layers[i].out_features)  # type: ignore[arg-type]

    def layer(self, i: int, block: BlockTensors, h_src: Tensor | SparseFeatures) -> Tensor:
        """All of layer ``i``, activation and dropout included: ``[num_src, f_i] -> [num_dst, out_features(i)]``."""
        conv = self.layers[i]
        h = conv(block, h_src.to(conv.bias.dtype))  # features are float32 on disk, weights may be bfloat16
        if i == len(self.layers) - 1:
            return h
        if self.norms:
            h = self.norms[i](h)
        return self.dropout(self.activation(h))

    def forward(self, x: Tensor | SparseFeatures, blocks: list[BlockTensors]) -> Tensor:
        """Logits of the seed nodes.

        Args:
            x: ``[inputs, in_features]``, features of the batch's input nodes.
            blocks: one per layer, the farthest hop first.

        Returns:
            ``[seeds, classes]``.
        """
        self._check(x, blocks)
        for i, block in enumerate(blocks):
            x = self.layer(i, block, x)
        return x

    def embed(self, x: Tensor | SparseFeatures, blocks: list[BlockTensors]) -> Tensor:
        """The seed nodes' rows that enter the last layer, ``[seeds, out_features(-2)]`` (with one layer: their features)."""
        self._check(x, blocks)
        for i, block in enumerate(blocks[:-1]):
            x = self.layer(i, block, x)
        return csr.dense(x[: blocks[-1].num_dst])

    def _check(self, x: Tensor | SparseFeatures, blocks: list[BlockTensors]) -> None:
        if len(blocks) != len(self.layers):
            raise ValueError(f"expected one block per layer ({len(self.layers)}); got {len(blocks)}")
        if x.shape[0] != blocks[0].num_src:
            raise ValueError(f"expected a row per input node of the batch ({blocks[0].num_src}); got {x.shape[0]}")


def relu_(h: Tensor) -> Tensor:
    """``torch.relu_``; on the CPU its gradient lies in held memory. Fresh pages cost ten times the arithmetic."""
    return _ReLU.apply(h) if h.device.type == "cpu" else torch.relu_(h)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.mark_dirty(h)
        ctx.save_for_backward(torch.relu_(h))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=memory.empty(h.shape, h.dtype))


def initialise(weight: Tensor, init: str) -> None:
    """Xavier (Glorot & Bengio 2010) or Kaiming (He et al. 2015) uniform, in place; ``weight`` is ``[out, in]``."""
    with torch.no_grad():
        if init == "kaiming":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(weight)
