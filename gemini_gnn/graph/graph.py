"""A homogeneous graph in host memory."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np

from gemini_gnn.errors import DataError
from gemini_gnn.graph.sparse import SparseRows


@dataclass(frozen=True)
class Graph:
    """A graph as its in-edges in compressed sparse column form, with node data. Messages flow source -> target.

    Attributes:
        name: what logs and folders call it.
        colptr: int64 ``[nodes + 1]``; the in-edges of node ``v`` are ``row[colptr[v]:colptr[v + 1]]``.
        row: int32 or int64 ``[edges]``, source of each in-edge, ascending within a column (the canonical order:
            what a sampler draws is a position in it, so it must not depend on how the graph was read).
        x: float32 ``[nodes, features]``, dense or :class:`SparseRows`.
        y: int64 ``[nodes]`` with -1 for unlabelled nodes, or uint8 ``[nodes, classes]`` (multi-label).
        num_classes: number of classes (columns of a multi-label ``y``).
        train_mask, val_mask, test_mask: bool ``[nodes]``.
        edge_weight: float32 ``[edges]`` aligned with ``row``, or None.
        node_ids: the ids the user knows the nodes by (int64 or unicode ``[nodes]``), or None for 0..nodes-1.
    """

    name: str
    colptr: np.ndarray
    row: np.ndarray
    x: np.ndarray | SparseRows
    y: np.ndarray
    num_classes: int
    train_mask: np.ndarray
    val_mask: np.ndarray
    test_mask: np.ndarray
    edge_weight: np.ndarray | None = None
    node_ids: np.ndarray | None = None
    notes: dict[str, str] = field(default_factory=dict)  # provenance shown in logs: file, split, normalisation

    @property
    def num_nodes(self) -> int:
        return len(self.colptr) - 1

    @property
    def num_edges(self) -> int:
        return len(self.row)

    @property
    def multi_label(self) -> bool:
        return self.y.ndim == 2

    def validate(self, labels: bool = True) -> None:
        """Check every promise of the class docstring.

        Args:
            labels: False for a graph that is only to be partitioned or sampled: its training split may be empty.

        Raises:
            DataError: naming the array, what was expected and what it holds.
        """
        n = self.num_nodes
        if n <= 0:
            raise DataError(f"{self.name}: expected at least one node; got none")
        if self.colptr.dtype != np.int64 or self.colptr[0] != 0 or self.colptr[-1] != len(self.row):
            raise DataError(f"{self.name}: colptr must be int64, start at 0 and end at the number of edges")
        if np.any(np.diff(self.colptr) < 0):
            raise DataError(f"{self.name}: colptr must not decrease")
        if len(self.row) and (int(self.row.min()) < 0 or int(self.row.max()) >= n):
            raise DataError(
                f"{self.name}: node ids must lie in 0..{n - 1}; got {int(self.row.min())}..{int(self.row.max())}"
            )
        step = np.diff(self.row)
        step[self.colptr[1:-1][(self.colptr[1:-1] > 0) & (self.colptr[1:-1] < len(self.row))] - 1] = 0
        if np.any(step < 0):
            raise DataError(f"{self.name}: the sources of each node's in-edges must ascend")
        if self.x.ndim != 2 or len(self.x) != n:
            raise DataError(f"{self.name}: expected features [{n}, width]; got {list(self.x.shape)}")
        if self.x.dtype != np.float32:
            raise DataError(f"{self.name}: expected float32 features; got {self.x.dtype}")
        if isinstance(self.x, SparseRows):
            ids = range(n) if self.node_ids is None else self.node_ids
            self.x.validate(f"{self.name}: features", lambda node: str(ids[node]))
        elif not (finite := np.isfinite(self.x).all(axis=1)).all():
            bad = int(np.argmin(finite))
            raise DataError(
                f"{self.name}: features of {int((~finite).sum())} nodes are NaN or infinite, first node {bad}"
            )
        if len(self.y) != n:
            raise DataError(f"{self.name}: expected one label row per node ({n}); got {len(self.y)}")
        if self.y.ndim == 1 and len(self.y) and (int(self.y.min()) < -1 or int(self.y.max()) >= self.num_classes):
            raise DataError(
                f"{self.name}: labels must lie in 0..{self.num_classes - 1} (-1: unlabelled); "
                f"got {int(self.y.min())}..{int(self.y.max())}"
            )
        if self.y.ndim == 2 and self.y.shape[1] != self.num_classes:
            raise DataError(f"{self.name}: expected {self.num_classes} label columns; got {self.y.shape[1]}")
        for name in ("train_mask", "val_mask", "test_mask"):
            mask = getattr(self, name)
            if mask.dtype != np.bool_ or mask.shape != (n,):
                raise DataError(f"{self.name}: expected {name} bool [{n}]; got {mask.dtype} {list(mask.shape)}")
        if labels and not self.train_mask.any():
            raise DataError(
                f"{self.name}: the training split is empty; choose another dataset.split or give dataset.splits"
            )
        if self.edge_weight is not None:
            w = self.edge_weight
            if w.shape != self.row.shape or not (np.isfinite(w).all() and (w > 0).all()):
                raise DataError(f"{self.name}: edge weights must be positive, finite, one per edge")


def one_way_share(colptr: np.ndarray, row: np.ndarray, original: np.ndarray, samples: int = 256) -> float:
    """Share of the edges whose reverse is not in the graph; self-loops are left out.

    Of a sample, the same each time: an edge costs two binary searches, however large the graph is.

    Args:
        colptr, row: in-edges, the sources of each column ascending by ``original``.
        original: integer ``[nodes]``.
    """
    colptr, row, original = np.asarray(colptr), np.asarray(row), np.asarray(original)  # not memmap: its items are slow
    one_way = seen = 0
    for edge in np.random.default_rng(0).integers(len(row), size=samples if len(row) else 0):
        source, target = int(row[edge]), int(np.searchsorted(colptr, edge, side="right")) - 1
        if source == target:
            continue
        into_source = row[colptr[source] : colptr[source + 1]]
        at = bisect_left(into_source, original[target], key=original.__getitem__)
        seen += 1
        one_way += at == len(into_source) or into_source[at] != target
    return one_way / max(seen, 1)


def from_edges(source: np.ndarray, target: np.ndarray, num_nodes: int, weight: np.ndarray | None = None):
    """CSC of in-edges in canonical order from an edge list.

    Args:
        source, target: integer ``[edges]``; duplicates are kept, as parallel edges.
        num_nodes: ids must lie in ``0..num_nodes-1``.
        weight: float ``[edges]`` or None.

    Returns:
        ``(colptr int64, row int32/int64, weight float32 or None)``.
    """
    from scipy.sparse import coo_matrix

    kind = np.int32 if num_nodes < 2**31 else np.int64
    position = np.arange(len(source), dtype=np.int64)
    # Two stable bucket passes (by source, then by target) instead of one comparison sort: linear in the edges.
    by_source = coo_matrix((position, (source, position)), shape=(num_nodes, max(len(source), 1))).tocsr().data
    picked = target[by_source]
    by_target = coo_matrix((position, (picked, position)), shape=(num_nodes, max(len(source), 1))).tocsr().data
    order = by_source[by_target]
    colptr = np.zeros(num_nodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(target, minlength=num_nodes), out=colptr[1:])
    row = source[order].astype(kind, copy=False)
    return colptr, row, None if weight is None else weight[order].astype(np.float32, copy=False)
