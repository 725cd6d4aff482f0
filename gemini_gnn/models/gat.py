"""GAT (Velickovic et al.: Graph Attention Networks, ICLR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemini_gnn.errors import ConfigError
from gemini_gnn.models import csr
from gemini_gnn.models.network import Network, initialise
from gemini_gnn.models.tensors import BlockTensors, SparseFeatures

_SLOPE = 0.2  # of LeakyReLU, as in the paper


class GATConv(nn.Module):
    """``h_v = sum over u in N(v) + {v} of a_vu W h_u + b``, ``a_v = softmax(LeakyReLU(s . W h_u + t . W h_v))`` per head.

    With all in-neighbors this is PyG's ``GATConv``: ``weight`` is its ``lin.weight``; ``att_src`` and ``att_dst`` are its own
    without the leading dimension. On a sampled block the softmax runs over the sampled neighbors and the node itself. Edge
    weights are not used. A self-loop that the graph already has is left out, since every node gets one anyway (as in PyG).

    Args:
        out_features: width of the result: ``heads * c`` when ``concat``, else ``c`` (the mean over the heads).
        dropout: probability with which an attention weight is dropped in training.

    Shapes:
        ``[num_src, in_features] -> [num_dst, out_features]``.
    """

    in_bf16 = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        heads: int = 1,
        concat: bool = True,
        dropout: float = 0.0,
        init: str = "xavier",
    ):
        super().__init__()
        if concat and out_features % heads:
            raise ConfigError(
                f"model.hidden: expected a multiple of model.heads={heads}, whose outputs lie side by side; got {out_features}"
            )
        self.in_features, self.out_features, self.heads, self.concat, self.dropout = (
            in_features,
            out_features,
            heads,
            concat,
            dropout,
        )
        c = out_features // heads if concat else out_features
        self.weight = nn.Parameter(torch.empty(heads * c, in_features))
        self.att_src = nn.Parameter(torch.empty(heads, c))
        self.att_dst = nn.Parameter(torch.empty(heads, c))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for parameter in (self.weight, self.att_src, self.att_dst):
            initialise(parameter, init)

    def forward(self, block: BlockTensors, h_src: Tensor | SparseFeatures) -> Tensor:
        rows = block.num_dst
        z = csr.linear(h_src, self.weight, in_bf16=self.in_bf16)
        by_head = z.view(block.num_src, self.heads, self.att_src.shape[1])
        score_src = (by_head * self.att_src).sum(-1)
        score_dst = (by_head[:rows] * self.att_dst).sum(-1)

        to_edge = csr.source_to_edge(block, score_src) + csr.destination_to_edge(block, score_dst)
        score = F.leaky_relu(to_edge, _SLOPE)
        loop = (block.indices == csr.destinations(block))[:, None]
        score = score.masked_fill(loop, float("-inf"))
        own = F.leaky_relu(score_src[:rows] + score_dst, _SLOPE)
        # Softmax over the edges and the added self-loop; subtracting the maximum changes nothing but the range of exp.
        top = torch.maximum(csr.edge_maximum(block, score), own.detach())
        weight = (score - csr.destination_to_edge(block, top)).exp()
        own = (own - top).exp()
        total = csr.edge_sum(block, weight) + own
        weight = F.dropout(weight / csr.destination_to_edge(block, total), self.dropout, self.training)
        own = F.dropout(own / total, self.dropout, self.training)

        h = csr.attention_sum(block, weight, z) + (own[:, :, None] * by_head[:rows]).flatten(1)
        if not self.concat:
            h = h.view(rows, self.heads, self.out_features).mean(1)
        return h + self.bias


def gat(
    in_features: int,
    hidden: int,
    num_classes: int,
    layers: int,
    *,
    heads: int = 4,
    dropout: float = 0.0,
    layer_norm: bool = False,
    init: str = "xavier",
) -> Network:
    """GAT with ELU: hidden layers ``hidden`` wide, all heads side by side; the last one ``num_classes`` wide, their mean."""
    widths = [in_features] + [hidden] * (layers - 1)
    convs = [GATConv(widths[i], hidden, heads, True, dropout, init) for i in range(layers - 1)]
    convs.append(GATConv(widths[-1], num_classes, heads, False, dropout, init))
    return Network(convs, F.elu_, dropout, layer_norm)
