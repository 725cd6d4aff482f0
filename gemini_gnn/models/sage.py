"""GraphSAGE (Hamilton, Ying, Leskovec: Inductive Representation Learning on Large Graphs, NeurIPS 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemini_gnn.models import csr
from gemini_gnn.models.network import Network, initialise
from gemini_gnn.models.tensors import BlockTensors

# One float moved by a sparse product costs about as much as this many flops of a GEMM: 8 GB/s against 85 GFLOP/s measured
# on one Zen 4 core, and the same order on a GPU (4.8 TB/s against 60 TFLOP/s on an H200).
_FLOPS_PER_FLOAT = 40


def project_first(block: BlockTensors, in_features: int, out_features: int, input_grad: bool) -> bool:
    """Whether a mean is cheaper taken over projected rows than over the rows themselves (it is linear, so both are right).

    Forward and backward are counted; the aggregate-first way needs no sparse product backward when its input needs no gradient.
    """
    gemms = 6 if input_grad else 4  # forward, weight gradient, input gradient; 2 flops per multiply-add
    gemm = gemms * in_features * out_features
    sparse = block.num_edges * _FLOPS_PER_FLOAT
    aggregate = block.num_dst * gemm + sparse * in_features * (2 if input_grad else 1)
    project = block.num_src * gemm + sparse * out_features * 2
    return project < aggregate


class SAGEConv(nn.Module):
    """``h_v = W [aggregate(h_u : u in N(v)) || h_v] + b``, aggregate = mean or maximum per feature (no neighbor: zeros).

    The same function as PyG's ``SAGEConv``: ``weight[:, :in]`` is its ``lin_l.weight``, ``weight[:, in:]`` its ``lin_r.weight``,
    ``bias`` its ``lin_l.bias``. Edge weights are not used, there as here. Parameters belong to the layer itself, not to
    Linears inside of it, so that ZeRO-3 gathers them when the layer is called.

    Shapes:
        ``[num_src, in_features] -> [num_dst, out_features]``.
    """

    def __init__(self, in_features: int, out_features: int, aggregator: str = "mean", init: str = "xavier"):
        super().__init__()
        self.in_features, self.out_features, self.aggregator = in_features, out_features, aggregator
        self.weight = nn.Parameter(torch.empty(out_features, 2 * in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        initialise(self.weight[:, :in_features], init)
        initialise(self.weight[:, in_features:], init)

    def forward(self, block: BlockTensors, h_src: Tensor) -> Tensor:
        if self.aggregator == "max":
            beside = torch.cat([csr.maximum(block, h_src), h_src[: block.num_dst]], dim=1)
            return F.linear(beside, self.weight, self.bias)
        if not project_first(block, self.in_features, self.out_features, h_src.requires_grad):
            return F.linear(csr.mean_beside_root(block, h_src), self.weight, self.bias)
        neighbor, root = self.weight.split(self.in_features, dim=1)
        return csr.mean(block, F.linear(h_src, neighbor)) + F.linear(h_src[: block.num_dst], root, self.bias)


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
    return Network(convs, torch.relu_, dropout, layer_norm)
