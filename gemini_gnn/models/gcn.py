"""GCN (Kipf & Welling: Semi-Supervised Classification with Graph Convolutional Networks, ICLR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemini_gnn.models import csr
from gemini_gnn.models.network import Network, initialise, relu_
from gemini_gnn.models.tensors import BlockTensors, SparseFeatures


class GCNConv(nn.Module):
    """``h_v = W ( h_v / (d_v + 1) + sum_u h_u / sqrt((d_v + 1)(d_u + 1)) ) + b``, d = in-degree in the whole graph.

    With all in-neighbors this is PyG's ``GCNConv`` (a self-loop is added to every node; ``weight`` is its ``lin.weight``). On a
    sampled block the neighbor sum is multiplied by degree / sampled, which makes it an unbiased estimate of the whole sum;
    for neighbors drawn by weight too, because ``edge_weight`` of such blocks is corrected for it (see ``Block``).

    Edge weights multiply the messages; the degrees stay counts of edges, since a block carries no weighted degrees (PyG:
    ``GCNConv(normalize=False)`` with ``w / sqrt(...)`` as weights). A self-loop that the graph already has counts as one more
    edge; PyG would merge it with the added one.

    Shapes:
        ``[num_src, in_features] -> [num_dst, out_features]``.
    """

    in_bf16 = False

    def __init__(self, in_features: int, out_features: int, init: str = "xavier"):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        initialise(self.weight, init)

    def forward(self, block: BlockTensors, h_src: Tensor | SparseFeatures) -> Tensor:
        dtype = torch.float64 if h_src.dtype == torch.float64 else torch.float32
        col_scale = (block.src_degree + 1).to(dtype).rsqrt()
        own = (block.degree + 1).to(dtype)
        # clamp: a destination without sampled edges has nothing to scale
        row_scale = own.rsqrt() * block.degree.to(dtype) / csr.counts(block).clamp(min=1).to(dtype)

        def aggregate(h: Tensor | SparseFeatures) -> Tensor:
            return csr.scaled_sum(block, h, row_scale, col_scale, block.edge_weight, own.reciprocal())

        if csr.project_first(block, h_src, self.out_features):
            return aggregate(csr.linear(h_src, self.weight, in_bf16=self.in_bf16)) + self.bias
        return csr.linear(aggregate(h_src), self.weight, self.bias, self.in_bf16)


def gcn(
    in_features: int,
    hidden: int,
    num_classes: int,
    layers: int,
    *,
    dropout: float = 0.0,
    layer_norm: bool = False,
    init: str = "xavier",
) -> Network:
    """GCN with ReLU: ``layers`` convolutions, ``hidden`` wide, the last ``num_classes`` wide."""
    widths = [in_features] + [hidden] * (layers - 1) + [num_classes]
    return Network([GCNConv(widths[i], widths[i + 1], init) for i in range(layers)], relu_, dropout, layer_norm)
