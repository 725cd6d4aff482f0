"""k-hop neighbor sampling into a stack of bipartite blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import numpy as np

from gemini_gnn import hashing
from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.sampling import kernels
from gemini_gnn.sampling.blocks import Batch, Block
from gemini_gnn.sampling.in_edges import InEdges, Scratch


class NeighborSampler:
    """Samples batches: ``sampler.sample(seeds, epoch, index)``.

    At hop h every node found so far, the seeds included, draws up to ``fanouts[h]`` of its in-edges without
    replacement. The draw is a function of (seed, epoch, index, hop, original id of the node) alone, as positions in the
    node's canonical neighbor list: neither the rank, nor the partition, nor the other seeds matter.

    It owns work arrays (4 bytes per node of the graph and some per edge of the largest batch): use one sampler from one
    thread at a time, and a sampler per thread otherwise. ``in_edges`` may be shared. Making a sampler compiles the kernels
    (or loads them from disk), so the first batch costs what the others do.

    Args:
        in_edges: :class:`ReplicatedInEdges` or :class:`PartitionedInEdges`. With the latter ``sample`` is collective:
            every rank calls it with the same epoch and index, with or without seeds.
        fanouts: edges per node, hop 1 (next to the seeds) first; -1 = all.
        seed: of the draws.
        weighted: draw edges by their weight instead of uniformly. Weights reach ``Block.edge_weight`` either way,
            corrected there for how they were drawn.

    Raises:
        ConfigError: a fanout that is neither positive nor -1, or ``weighted`` without edge weights.
    """

    def __init__(self, in_edges: InEdges, fanouts: Sequence[int], seed: int, weighted: bool = False) -> None:
        check_fanouts(fanouts)
        if weighted and not in_edges.weighted:
            raise ConfigError(
                "sampling.weighted: expected a graph with edge weights; this one has none. "
                "Give the edge list a third column, or set sampling.weighted=false"
            )
        self.in_edges = in_edges
        self.fanouts = list(fanouts)
        self.seed = seed
        self.weighted = weighted
        self._scratch = Scratch()
        self._slot = np.zeros(in_edges.num_nodes, dtype=np.int32)
        kernels.warm_up(in_edges.weighted)

    def sample(self, seeds: np.ndarray, epoch: int, index: int) -> Batch:
        """The batch of these seeds.

        Args:
            seeds: integer ``[seeds]`` new ids; may be empty. A repeated seed keeps a row for each mention.
            epoch, index: which batch; with ``seed`` they select the draws.

        Raises:
            DataError: a seed that is no node of the graph.
        """
        seeds = np.ascontiguousarray(seeds, dtype=np.int64)
        check_nodes(seeds, self.in_edges.num_nodes)
        nodes = self._scratch.array("nodes", len(seeds), np.int64)
        known = len(seeds)
        hops = []  # nearest first: (num_dst, num_src, drawn, local ids of the sources)
        try:
            kernels.place_seeds(seeds, self._slot, nodes)
            for hop, fanout in enumerate(self.fanouts, start=1):
                base = hashing.stream(hashing.DRAW, self.seed, epoch, index, hop)
                drawn = self.in_edges.draw(nodes[:known], base, fanout, self.weighted, self._scratch)
                nodes = room_for(nodes, known, len(drawn.neighbors), self._scratch)
                num_dst, indices = known, np.empty(len(drawn.neighbors), dtype=np.int64)
                known = kernels.relabel(drawn.neighbors, self._slot, nodes, known, indices)
                hops.append((num_dst, known, drawn, indices))
        finally:
            kernels.forget(nodes[:known], self._slot)
        input_nodes = nodes[:known].copy()
        degree = self.in_edges.degrees(input_nodes)  # of every block's nodes: they are prefixes of the input nodes
        blocks = []
        for num_dst, num_src, drawn, indices in reversed(hops):
            indptr_t, indices_t, edge_t = transposed(drawn.indptr, indices, num_src)
            blocks.append(
                Block(
                    num_src=num_src,
                    num_dst=num_dst,
                    indptr=drawn.indptr,
                    indices=indices,
                    indptr_t=indptr_t,
                    indices_t=indices_t,
                    edge_t=edge_t,
                    degree=degree[:num_dst],
                    src_degree=degree[:num_src],
                    edge_weight=drawn.weight,
                )
            )
        return Batch(epoch=epoch, index=index, seeds=seeds, input_nodes=input_nodes, blocks=blocks)


def transposed(indptr: np.ndarray, indices: np.ndarray, num_src: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(indptr_t, indices_t, edge_t)`` of a CSR block, as :class:`Block` describes them."""
    indptr_t = np.empty(num_src + 2, dtype=np.int64)
    indices_t, edge_t = np.empty_like(indices), np.empty_like(indices)
    kernels.transpose(indptr, indices, indptr_t, indices_t, edge_t)
    return indptr_t[:-1], indices_t, edge_t


def room_for(nodes: np.ndarray, known: int, more: int, scratch: Scratch) -> np.ndarray:
    """``nodes`` with room for ``more`` behind its first ``known`` entries, which are kept."""
    if len(nodes) >= known + more:
        return nodes
    kept = nodes[:known]
    nodes = scratch.array("nodes", known + more, np.int64)
    nodes[:known] = kept  # onto itself where the array had room all along
    return nodes


def check_fanouts(fanouts: Sequence[int]) -> None:
    given = list(fanouts) if isinstance(fanouts, Iterable) else []
    if not given or not all(isinstance(f, Integral) and (f == -1 or f > 0) for f in given):
        raise ConfigError(
            "sampling.fanouts: expected a list of positive integers or -1 (all), one per hop, hop 1 first, "
            f"such as [10, 5]; got {given or fanouts!r}"
        )


def check_nodes(ids: np.ndarray, num_nodes: int, name: str = "seeds") -> None:
    """Kernels do not check bounds: a wrong id would read foreign memory."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= num_nodes):
        raise DataError(f"{name}: expected node ids in 0..{num_nodes - 1}; got {int(ids.min())}..{int(ids.max())}")
