"""One part of a partitioned graph: what one rank owns, and what it needs of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.sparse import SparseRows


@dataclass(frozen=True)
class GraphShard:
    """One part: views into the arrays of a ``PartitionedGraph``.

    Attributes:
        part: its number. begin, end: it owns the new ids ``begin..end - 1``. bounds: of all parts, int64 ``[parts+1]``.
        original: int64 ``[owned]`` original ids.
        colptr: int64 ``[owned + 1]``, offsets into the edges of the *whole* graph: those of the part begin at
            ``colptr[0]``.
        row: ``[edges of the part]`` new ids of the sources. edge_weight: float32, aligned, or None.
        halo: ``[halo nodes]`` new ids of remote in-neighbors, ascending.
        x, y, train_mask, val_mask, test_mask: rows of the owned nodes.
        num_classes: of the graph.
    """

    part: int
    begin: int
    end: int
    bounds: np.ndarray
    original: np.ndarray
    colptr: np.ndarray
    row: np.ndarray
    edge_weight: np.ndarray | None
    halo: np.ndarray
    x: np.ndarray | SparseRows
    y: np.ndarray
    train_mask: np.ndarray
    val_mask: np.ndarray
    test_mask: np.ndarray
    num_classes: int

    @property
    def owned(self) -> range:
        """New ids of the owned nodes."""
        return range(self.begin, self.end)

    @property
    def num_nodes(self) -> int:
        return self.end - self.begin

    @property
    def num_edges(self) -> int:
        return len(self.row)

    @property
    def multi_label(self) -> bool:
        return self.y.ndim == 2

    def in_neighbors(self, node: int) -> np.ndarray:
        """New ids of the sources of the in-edges of an owned node, in canonical order.

        Raises:
            PartitionError: the node belongs to another part.
        """
        if not self.begin <= node < self.end:
            owner = int(np.searchsorted(self.bounds, node, side="right")) - 1
            raise PartitionError(
                f"expected a node of part {self.part} ({self.begin}..{self.end - 1}); got {node}, owned by part {owner}"
            )
        first, last = self.colptr[node - self.begin : node - self.begin + 2] - self.colptr[0]
        return self.row[first:last]
