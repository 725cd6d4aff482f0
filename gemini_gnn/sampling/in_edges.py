"""Where the in-edges of a node come from, on a machine that can map all of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from gemini_gnn.errors import DataError
from gemini_gnn.sampling import kernels


class Scratch:
    """Named work arrays that grow and are used again: fresh megabytes per batch cost page faults.

    An array is valid until the same name is asked for again, so a scratch belongs to one caller on one thread.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, size: int, dtype: type) -> np.ndarray:
        """An array of ``size``; zero where nobody wrote since it was made."""
        held = self._arrays.get(name)
        if held is None or len(held) < size:
            held = np.zeros(max(size + size // 4, 1024), dtype=dtype)
            self._arrays[name] = held
        return held[:size]


class Drawn(NamedTuple):
    """The in-edges drawn for a list of nodes.

    Attributes:
        indptr: int64 ``[nodes + 1]``; the edges of the i-th node are ``indptr[i]:indptr[i + 1]``.
        neighbors: int64 ``[edges]`` new ids of the sources, in canonical order per node.
        weight: float32 ``[edges]`` as :attr:`Block.edge_weight`, or None for unweighted graphs.
    """

    indptr: np.ndarray
    neighbors: np.ndarray
    weight: np.ndarray | None


class InEdges(Protocol):
    """Where the in-edges of a node come from: all that a :class:`NeighborSampler` asks of a graph."""

    num_nodes: int
    weighted: bool

    def draw(self, nodes: np.ndarray, base: np.uint64, fanout: int, by_weight: bool, scratch: Scratch) -> Drawn:
        """Draw up to ``fanout`` in-edges (-1: all) of each node; ``neighbors`` may live in ``scratch``."""

    def degrees(self, nodes: np.ndarray) -> np.ndarray:
        """int64 in-degrees in the whole graph."""


class ReplicatedInEdges:
    """All in-edges of the graph, usually as memory-mapped files shared by the ranks of a machine.

    Args:
        colptr: int64 ``[nodes + 1]``; row: int32/int64 ``[edges]``: CSC of in-edges, in canonical order.
        original: integer ``[nodes]``, new id -> original id.
        edge_weight: float ``[edges]``, or None.

    Raises:
        DataError: the arrays do not belong together.
    """

    def __init__(
        self, colptr: np.ndarray, row: np.ndarray, original: np.ndarray, edge_weight: np.ndarray | None = None
    ) -> None:
        if colptr.ndim != 1 or len(colptr) < 1 or int(colptr[0]) != 0 or int(colptr[-1]) != len(row):
            ends = [int(colptr[0]), int(colptr[-1])] if colptr.size else []
            raise DataError(f"colptr: expected to go from 0 to the number of edges ({len(row)}); got {ends}")
        if len(original) != len(colptr) - 1:
            raise DataError(f"original: expected one id per node ({len(colptr) - 1}); got {len(original)}")
        if edge_weight is not None and len(edge_weight) != len(row):
            raise DataError(f"edge_weight: expected one per edge ({len(row)}); got {len(edge_weight)}")
        self.num_nodes = len(colptr) - 1
        self.weighted = edge_weight is not None
        self.colptr = _readonly(colptr, np.int64)
        self.row = _readonly(row, np.int32 if row.dtype == np.int32 else np.int64)
        self.original = _readonly(original, np.int64)
        self.edge_weight = None if edge_weight is None else _readonly(edge_weight, np.float32)

    def positions(
        self, nodes: np.ndarray, base: np.uint64, fanout: int, by_weight: bool, scratch: Scratch
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """``(indptr, positions, corrected)``: what is drawn, as positions in ``row`` (in ``scratch``), ascending per
        node; and for a draw by weight the weights that make its sums unbiased, see :func:`kernels.draw_weighted`."""
        indptr = np.empty(len(nodes) + 1, dtype=np.int64)
        first = scratch.array("first", len(nodes), np.int64)
        degree = scratch.array("degree", len(nodes), np.int64)
        key = scratch.array("key", len(nodes), np.uint64)
        kernels.look_up(self.colptr, self.original, nodes, base, fanout, indptr, first, degree, key)
        positions = scratch.array("positions", int(indptr[-1]), np.int64)
        most = min(max(fanout, 0), len(self.row))  # a longer draw takes all, without drawing
        if by_weight and fanout >= 0:
            assert self.edge_weight is not None
            heap = scratch.array("heap", most, np.float64)
            corrected = np.empty(len(positions), dtype=np.float32)
            kernels.draw_weighted(indptr, first, degree, key, self.edge_weight, positions, heap, corrected)
            return indptr, positions, corrected
        bitmap = scratch.array("bitmap", kernels.bitmap_words(fanout, len(self.row)), np.uint64)
        picks = scratch.array("picks", most, np.int64)
        kernels.draw_uniform(indptr, first, degree, key, positions, picks, bitmap)
        return indptr, positions, None

    def draw(self, nodes: np.ndarray, base: np.uint64, fanout: int, by_weight: bool, scratch: Scratch) -> Drawn:
        indptr, positions, weight = self.positions(nodes, base, fanout, by_weight, scratch)
        neighbors = scratch.array("neighbors", len(positions), np.int64)
        kernels.take(self.row, positions, neighbors)
        if self.edge_weight is not None and weight is None:
            weight = np.empty(len(positions), dtype=np.float32)
            kernels.take(self.edge_weight, positions, weight)
        return Drawn(indptr, neighbors, weight)

    def degrees(self, nodes: np.ndarray) -> np.ndarray:
        out = np.empty(len(nodes), dtype=np.int64)
        kernels.in_degrees(self.colptr, nodes, out)
        return out


def _readonly(array: np.ndarray, dtype: type) -> np.ndarray:
    """The array as a plain, contiguous, read-only ndarray without copying a map: one compiled kernel serves all."""
    plain: np.ndarray = np.ascontiguousarray(np.asarray(array), dtype=dtype).view()
    plain.flags.writeable = False
    return plain
