"""The sampler for PyG's own loaders: no pyg-lib, no torch-sparse.

loader = NodeLoader(data, PyGSampler(data, [10, 10], seed=0), input_nodes=data.train_mask, batch_size=512)
for batch in loader:
    loss(model(batch.x, batch.edge_index)[: batch.batch_size], batch.y[: batch.batch_size])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch_geometric.data import Data
from torch_geometric.sampler import BaseSampler, EdgeSamplerInput, NodeSamplerInput, SamplerOutput

from gemini_gnn import hashing
from gemini_gnn.errors import DataError
from gemini_gnn.sampling import kernels
from gemini_gnn.sampling.in_edges import ReplicatedInEdges, Scratch
from gemini_gnn.sampling.sampler import check_fanouts, check_nodes, room_for


class PyGSampler(BaseSampler):
    """k-hop sampling without replacement of a homogeneous ``Data`` for ``torch_geometric.loader.NodeLoader``.

    As PyG's ``NeighborLoader`` does, each node draws in-edges once, at the hop after it was found, and all edges make up
    one subgraph: seeds first, then nodes hop by hop, edges hop by hop, so ``trim_to_layer`` works with
    ``num_sampled_nodes`` and ``num_sampled_edges``. (:class:`NeighborSampler` draws every known node anew at each hop,
    because its blocks must not depend on which other seeds a rank has.)

    A batch is a function of (seed, its seed nodes, number of batches drawn so far). DataLoader workers count their own
    batches, and PyTorch's per-epoch worker seed takes part, so ``torch.manual_seed`` is needed to repeat a run with workers.

    Args:
        data: with ``edge_index`` int64 ``[2, edges]``; messages flow from row 0 to row 1.
        fanouts: edges per node, hop 1 first; -1 = all.
        seed: of the draws.
        weight: name of an edge attribute ``[edges]`` to draw by instead of uniformly, or None.

    Raises:
        DataError: no ``edge_index`` (also: an ``adj_t``), ids out of range, no such weights, or not positive ones.
        ConfigError: fanouts that are no list, or neither positive nor -1.
    """

    def __init__(self, data: Data, fanouts: Sequence[int], seed: int = 0, weight: str | None = None) -> None:
        check_fanouts(fanouts)
        if not isinstance(data, Data) or "edge_index" not in data:
            raise DataError(
                f"expected a homogeneous torch_geometric Data with edge_index; got {type(data).__name__}. Of a data set give "
                "one graph, dataset[0]; an adj_t is turned back by `data.edge_index = torch.stack(data.adj_t.t().coo()[:2])`"
            )
        if weight is not None and not (isinstance(weight, str) and isinstance(data.get(weight), torch.Tensor)):
            raise DataError(
                f"weight: expected the name of an edge attribute to draw by, or None; got "
                f"{repr(weight) if isinstance(weight, str) else type(weight).__name__}. This data has "
                f"{', '.join(name for name in data.edge_attrs() if name != 'edge_index') or 'no edge attributes'}"
            )
        num_nodes = int(data.num_nodes or 0)
        source, target = data.edge_index.cpu().numpy()
        check_nodes(source, num_nodes, "edge_index[0]")
        check_nodes(target, num_nodes, "edge_index[1]")
        # Edges grouped by target, in the order of `data` within a group; _edge leads back to it.
        # Half the width where it suffices: reading both at random is half of what a batch costs.
        width = np.int32 if max(num_nodes, len(source)) < 2**31 else np.int64
        self._edge = np.argsort(target, kind="stable").astype(width)
        self._edge.flags.writeable = False  # as the kernels expect what they only read
        colptr = np.zeros(num_nodes + 1, dtype=np.int64)
        np.cumsum(np.bincount(target, minlength=num_nodes), out=colptr[1:])
        edge_weight = None
        if weight is not None:
            edge_weight = data[weight].detach().cpu().numpy().reshape(-1)
            if len(edge_weight) != len(source) or not (np.isfinite(edge_weight).all() and (edge_weight > 0).all()):
                raise DataError(f"{weight}: expected a positive, finite weight per edge to draw by")
            edge_weight = edge_weight[self._edge]
        self.fanouts = list(fanouts)
        self.seed = seed
        self._in_edges = ReplicatedInEdges(colptr, source[self._edge].astype(width), np.arange(num_nodes), edge_weight)
        self._scratch = Scratch()
        self._slot = np.zeros(num_nodes, dtype=np.int32)
        self._drawn = 0  # batches so far
        kernels.warm_up(self._in_edges.weighted)

    def sample_from_nodes(self, index: NodeSamplerInput, **kwargs) -> SamplerOutput:
        """The subgraph around ``index.node``; ``edge`` are positions in the data's ``edge_index``."""
        if index.time is not None:
            raise NotImplementedError("PyGSampler does not look at timestamps; leave out input_time")
        seeds = np.ascontiguousarray(index.node.cpu().numpy(), dtype=np.int64)
        check_nodes(seeds, self._in_edges.num_nodes)
        worker = torch.utils.data.get_worker_info()
        content = np.bitwise_xor.reduce(hashing.splitmix64(seeds.astype(np.uint64)), initial=np.uint64(0))
        batch = (self.seed, worker.seed if worker else 0, self._drawn, int(content))
        self._drawn += 1

        in_edges, scratch, slot = self._in_edges, self._scratch, self._slot
        nodes = scratch.array("nodes", len(seeds), np.int64)
        before, known = 0, len(seeds)
        node_counts, edge_counts, rows, cols, edges = [known], [], [], [], []
        try:
            kernels.place_seeds(seeds, slot, nodes)
            for hop, fanout in enumerate(self.fanouts, start=1):
                base = hashing.stream(hashing.LOADER, *batch, hop)
                by_weight = in_edges.weighted
                indptr, positions, _ = in_edges.positions(nodes[before:known], base, fanout, by_weight, scratch)
                neighbors = scratch.array("neighbors", len(positions), np.int64)
                kernels.take(in_edges.row, positions, neighbors)
                nodes = room_for(nodes, known, len(positions), scratch)
                indices = np.empty(len(positions), dtype=np.int64)
                cols.append(np.repeat(np.arange(before, known), np.diff(indptr)))
                before, known = known, kernels.relabel(neighbors, slot, nodes, known, indices)
                rows.append(indices)
                edge = np.empty(len(positions), dtype=np.int64)
                kernels.take(self._edge, positions, edge)
                edges.append(edge)
                node_counts.append(known - before)
                edge_counts.append(len(positions))
        finally:
            kernels.forget(nodes[:known], slot)
        return SamplerOutput(
            node=torch.from_numpy(nodes[:known].copy()),
            row=torch.from_numpy(np.concatenate(rows)),
            col=torch.from_numpy(np.concatenate(cols)),
            edge=torch.from_numpy(np.concatenate(edges)),
            num_sampled_nodes=node_counts,
            num_sampled_edges=edge_counts,
            metadata=(index.input_id, index.time),
        )

    def sample_from_edges(self, index: EdgeSamplerInput, neg_sampling=None) -> SamplerOutput:
        raise NotImplementedError("PyGSampler samples around nodes; for link prediction use PyG's own samplers")
