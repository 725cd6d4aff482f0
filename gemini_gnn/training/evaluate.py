"""Evaluation over all owned nodes: exact, layer by layer, or sampled when told.

Layer by layer (Hamilton et al. 2017, GraphSAGE, inference): layer i is computed for every node from the outputs of layer
i - 1 of all its in-neighbors, so a node is computed once per layer instead of once per batch that needs it. Across ranks,
the rows of remote in-neighbors come by the halo exchange, on a group of its own: training's exchange may be ahead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gemini_gnn.features.store import FeatureStore
from gemini_gnn.graph.sparse import SparseRows
from gemini_gnn.halo.exchange import HaloExchange
from gemini_gnn.models.tensors import BlockTensors, SparseFeatures, moved_features, needs_dense, to_tensors
from gemini_gnn.sampling.sampler import NeighborSampler

KEPT_EDGES = 20_000_000  # blocks of all layers are the same; keep them between layers and evaluations up to this size


class Evaluation:
    """Computes logits of this rank's nodes. Collective: every rank calls with the same model state.

    Args:
        sampler: fanouts of evaluation, hop 1 first; ``[-1]`` for the exact layer-wise mode.
        x: float32 ``[owned, features]``, dense or sparse, the features of nodes ``begin..end-1`` (new ids), maybe
            memory-mapped.
        largest_part: nodes of the largest part of any rank, by which all ranks take the same number of rounds.
    """

    def __init__(
        self,
        sampler: NeighborSampler,
        exchange: HaloExchange,
        x: np.ndarray | SparseRows,
        begin: int,
        end: int,
        largest_part: int,
        batch_size: int,
        device: torch.device,
        exact: bool,
    ):
        self.sampler, self.exchange, self.device, self.exact = sampler, exchange, device, exact
        self.x, self.begin, self.end, self.batch_size = x, begin, end, batch_size
        self.features = FeatureStore(x, begin, end, exchange, in_ram=False)
        self.rounds = -(-largest_part // batch_size)
        self._kept: list[tuple[np.ndarray, list[BlockTensors]]] = []

    @torch.no_grad()
    def logits(self, model: torch.nn.Module, embeddings: bool = False) -> torch.Tensor:
        """Float32 ``[owned, classes]`` on the CPU, in new-id order; what enters the last layer for ``embeddings``."""
        was_training = model.training
        model.eval()
        try:
            if self.exact and hasattr(model, "layers") and hasattr(model, "layer"):
                return self._layer_by_layer(model, len(model.layers) - (1 if embeddings else 0))
            return self._by_batches(model, model.embed if embeddings else model)
        finally:
            model.train(was_training)

    def _layer_by_layer(self, model: Any, layers: int) -> torch.Tensor:
        if layers == 0:
            return torch.from_numpy(self.x.dense() if isinstance(self.x, SparseRows) else np.array(self.x))
        owned = self.end - self.begin
        h: torch.Tensor | None = None  # of all owned nodes, from the layer before
        for i in range(layers):
            out = torch.empty(owned, model.out_features(i))
            for r in range(self.rounds):
                input_nodes, blocks = self._round(r)
                if h is None:
                    h_src = self._features(model, input_nodes)
                else:
                    h_src = self.exchange.rows(input_nodes, h).to(self.device)
                first = min(r * self.batch_size, owned)
                out[first : first + blocks[-1].num_dst] = model.layer(i, blocks[-1], h_src).cpu()
            h = out
        assert h is not None
        return h

    def _by_batches(self, model: torch.nn.Module, call: Any) -> torch.Tensor:
        parts = []
        for r in range(self.rounds):
            input_nodes, blocks = self._round(r)
            parts.append(call(self._features(model, input_nodes), blocks).float().cpu())
        return torch.cat(parts)

    def _features(self, model: torch.nn.Module, nodes: np.ndarray) -> torch.Tensor | SparseFeatures:
        return moved_features(self.features.gather(nodes), self.device, needs_dense(model, self.device))

    def _round(self, r: int) -> tuple[np.ndarray, list[BlockTensors]]:
        if r < len(self._kept):
            return self._kept[r]
        nodes = np.arange(
            min(self.begin + r * self.batch_size, self.end), min(self.begin + (r + 1) * self.batch_size, self.end)
        )
        # One epoch and index for all rounds: what a node draws then depends on the node alone, not on its rank or round.
        batch = self.sampler.sample(nodes, 0, 0)
        made = (batch.input_nodes, [to_tensors(block, self.device) for block in batch.blocks])
        kept_edges = sum(block.num_edges for _, blocks in self._kept for block in blocks)
        if len(self._kept) == r and kept_edges + batch.num_edges <= KEPT_EDGES:
            self._kept.append(made)
        return made
