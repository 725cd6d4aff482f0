"""A stack of bipartite blocks: a sampler makes it for a model. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Block:
    """The sampled in-edges of one hop: ``num_src`` source nodes send to ``num_dst`` destination nodes.

    The destination nodes are the first ``num_dst`` source nodes, so a layer finds a node's own features there.

    Attributes:
        indptr: int64 ``[num_dst + 1]``, indices: int64 ``[edges]`` local source ids; the edges by destination (CSR),
            sources in the canonical order of the graph.
        indptr_t: int64 ``[num_src + 1]``, indices_t: int64 ``[edges]`` local destination ids; the same edges by source,
            destinations ascending. The backward pass of a CSR product is the product with this one: no atomics,
            hence deterministic.
        edge_t: int64 ``[edges]``; ``edge_t[j]`` is the CSR position of the j-th edge of the transpose.
        degree: int64 ``[num_dst]``, in-degree of the destinations in the whole graph (not the sampled one).
        src_degree: int64 ``[num_src]`` in-degree of the sources in the whole graph (GCN's normalisation needs it).
        edge_weight: float32 ``[edges]`` in CSR order, or None. Of edges drawn by weight not the weight w but
            w / p * drawn / degree, p the chance to be drawn: so that ``degree / drawn * sum(edge_weight * message)``
            estimates the sum over all in-edges without bias, however they were drawn.
    """

    num_src: int
    num_dst: int
    indptr: np.ndarray
    indices: np.ndarray
    indptr_t: np.ndarray
    indices_t: np.ndarray
    edge_t: np.ndarray
    degree: np.ndarray
    src_degree: np.ndarray
    edge_weight: np.ndarray | None = None

    @property
    def num_edges(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Batch:
    """A mini-batch: a pure function of (seed, epoch, index, rank) and the partitioned graph.

    Attributes:
        epoch, index: epoch and batch index within it.
        seeds: int64 ``[seeds]`` the seed nodes (new ids). May be empty: every rank takes part in every batch.
        input_nodes: int64 ``[inputs]`` nodes whose features the first block needs; the seeds come first.
        blocks: the block applied first (the farthest hop) comes first; the last block's destinations are the seeds.
    """

    epoch: int
    index: int
    seeds: np.ndarray
    input_nodes: np.ndarray
    blocks: list[Block] = field(default_factory=list)

    @property
    def num_edges(self) -> int:
        return sum(block.num_edges for block in self.blocks)
