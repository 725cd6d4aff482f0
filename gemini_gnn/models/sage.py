"""GraphSAGE (Hamilton, Ying, Leskovec: Inductive Representation Learning on Large Graphs, NeurIPS 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemini_gnn.models import csr
from gemini_gnn.models.network import Network, initialise, relu_
from gemini_gnn.models.tensors import BlockTensors, SparseFeatures


class SAGEConv(nn.Module):
    """``h_v = W [aggregate(h_u : u in N(v)) || h_v] + b``, aggregate = mean or maximum per feature (no neighbor: zeros).

    The same function as PyG's ``SAGEConv``: ``weight[:, :in]`` is its ``lin_l.weight``, ``weight[:, in:]`` its ``lin_r.weight``,
    ``bias`` its ``lin_l.bias``. Edge weights are not used, there as here. Parameters belong to the layer itself, not to
    Linears inside of it, so that ZeRO-3 gathers them when the layer is called.

    Shapes:
        ``[num_src, in_features] -> [num_dst, out_features]``.
    """

    in_bf16 = False

    def __init__(self, in_features: int, out_features: int, aggregator: str = "mean", init: str = "xavier"):
        super().__init__()
        self.in_features, self.out_features, self.aggregator = in_features, out_features, aggregator
        self.weight = nn.Parameter(torch.empty(out_features, 2 * in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        initialise(self.weight[:, :in_features], init)
        initialise(self.weight[:, in_features:], init)

    def forward(self, block: BlockTensors, h_src: Tensor | SparseFeatures) -> Tensor:
        if self.aggregator == "max":
            h_src = csr.dense(h_src)
            beside = torch.cat([csr.maximum(block, h_src), h_src[: block.num_dst]], dim=1)
            return csr.linear(beside, self.weight, self.bias, self.in_bf16)
        if not csr.project_first(block, h_src, self.out_features):
            return csr.linear(csr.mean_beside_root(block, h_src), self.weight, self.bias, self.in_bf16)
        neighbor, root = self.weight.split(self.in_features, dim=1)
        own = csr.linear(h_src[: block.num_dst], root, self.bias, self.in_bf16)
        return csr.mean(block, csr.linear(h_src, neighbor, in_bf16=self.in_bf16)) + own


def sage(
    in_features: int,
    hidden: int,
    num_classes: int,
    layers: int,
    *,
    aggregator: str = "mean",
    dropout: float = 0.0,
    layer_norm: bool = False,
    init: str = "xavier",
) -> Network:
    """GraphSAGE with ReLU: ``layers`` convolutions, ``hidden`` wide, the last ``num_classes`` wide."""
    widths = [in_features] + [hidden] * (layers - 1) + [num_classes]
    convs = [SAGEConv(widths[i], widths[i + 1], aggregator, init) for i in range(layers)]
    network = Network(convs, relu_, dropout, layer_norm)
    network.takes_sparse = aggregator == "mean"  # a maximum looks at every value
    return network
