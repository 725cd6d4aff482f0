"""A model of one's own, out of PyG's layers, on the sampled blocks.

    PYTHONPATH=examples deepspeed --num_accelerators 2 launch/train.py dataset=cora model._target_=own_model.GIN \
        model.hidden=64 model.kwargs.eps=0.1 run_dir=runs/gin
    PYTHONPATH=examples python launch/evaluate.py run_dir=runs/gin

The class is called with ``in_features, hidden, num_classes, layers`` and ``model.kwargs``; the model with ``x`` ``[inputs,
in_features]``, the features of all nodes of the batch, and one block per layer, the farthest hop first. The destinations of
a block are the first of its sources, and those of the last block are the seed nodes. Returns logits ``[seeds, num_classes]``.

Where the features are sparse, ``x`` is made dense, unless the class says ``takes_sparse = True``: then it is a
``gemini_gnn.models.tensors.SparseFeatures``, with ``ptr``, ``index``, ``value`` and ``dense()``.
"""

import torch
from torch_geometric.nn import GINConv

from gemini_gnn.models.csr import destinations


class GIN(torch.nn.Module):
    """Graph isomorphism network (Xu et al.: How Powerful are Graph Neural Networks?, ICLR 2019)."""

    def __init__(self, in_features, hidden, num_classes, layers, eps=0.0):
        super().__init__()
        widths = [in_features] + [hidden] * (layers - 1) + [num_classes]
        self.convs = torch.nn.ModuleList(
            GINConv(torch.nn.Linear(widths[i], widths[i + 1]), eps=eps) for i in range(layers)
        )

    def forward(self, x, blocks):
        for i, (conv, block) in enumerate(zip(self.convs, blocks, strict=True)):
            edges = torch.stack([block.indices, destinations(block)])  # [2, edges]: from source to destination
            x = conv((x, x[: block.num_dst]), edges)
            if i + 1 < len(blocks):
                x = x.relu()
        return x
