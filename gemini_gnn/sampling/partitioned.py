"""Sampling a graph of which this rank holds only its own part's in-edges: hops cross the border by collective exchange.

Protocol of a batch, the same on every rank: one ``ask`` per hop ("draw in-edges of these nodes", each node asked of the
rank that owns it, which draws with the kernels and random streams of ReplicatedInEdges, hence the same edges), and
one last ``ask`` for the in-degrees of the batch's nodes. A rank without seeds takes part with empty questions. If a rank
fails or a message is lost, the exchange raises on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from gemini_gnn.errors import PartitionError
from gemini_gnn.sampling.in_edges import Drawn, ReplicatedInEdges, Scratch

Answer = Callable[[np.ndarray], tuple[np.ndarray, list[np.ndarray]]]


class Exchange(Protocol):
    """The part of ``halo.HaloExchange`` that is needed here."""

    def ask(
        self, ids: np.ndarray, answer: Answer, dtypes: Sequence[np.dtype | type]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Answers of variable length from the owners of ``ids``: ``(counts [ids], columns in the order of ids)``."""


class PartitionedInEdges:
    """The in-edges of one part, and an exchange with the ranks that hold those of the others.

    Args:
        colptr: int64 ``[owned + 1]``, a slice of the graph's (it need not start at 0).
        row: int32/int64, the in-edges of the owned nodes, sources as new ids of the whole graph.
        original: integer ``[owned]`` original ids of the owned nodes.
        bounds: ``[parts + 1]``; part p owns the nodes ``bounds[p]..bounds[p + 1] - 1``.
        part: the part held here.
        exchange: collective look-up over the same bounds, used by nobody else while a batch is sampled.
        edge_weight: float, aligned with ``row``, or None; the same choice on every rank.

    Raises:
        PartitionError: the arrays are not those of this part.
    """

    def __init__(
        self,
        colptr: np.ndarray,
        row: np.ndarray,
        original: np.ndarray,
        bounds: np.ndarray,
        part: int,
        exchange: Exchange,
        edge_weight: np.ndarray | None = None,
    ) -> None:
        self.num_nodes = int(bounds[-1])
        self.begin, end = int(bounds[part]), int(bounds[part + 1])
        if len(colptr) != end - self.begin + 1:
            raise PartitionError(
                f"part {part}: expected the {end - self.begin} nodes that its bounds name; got {len(colptr) - 1}"
            )
        self.own = ReplicatedInEdges(np.asarray(colptr) - colptr[0], row, original, edge_weight)
        self.weighted = self.own.weighted
        self.exchange = exchange
        self._kinds: list[Any] = [np.int64, np.float32] if self.weighted else [np.int64]
        self._scratch = Scratch()  # for answers: the caller's scratch holds its questions

    def draw(self, nodes: np.ndarray, base: np.uint64, fanout: int, by_weight: bool, scratch: Scratch) -> Drawn:
        """As :meth:`ReplicatedInEdges.draw`. Collective."""

        def answer(asked: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
            drawn = self.own.draw(asked - self.begin, base, fanout, by_weight, self._scratch)
            columns = [drawn.neighbors] if drawn.weight is None else [drawn.neighbors, drawn.weight]
            return np.diff(drawn.indptr), columns

        counts, columns = self.exchange.ask(nodes, answer, self._kinds)
        indptr = np.zeros(len(nodes) + 1, dtype=np.int64)
        np.cumsum(counts, out=indptr[1:])
        return Drawn(indptr, columns[0], columns[1] if self.weighted else None)

    def degrees(self, nodes: np.ndarray) -> np.ndarray:
        """int64 in-degrees in the whole graph. Collective."""

        def answer(asked: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
            return np.ones(len(asked), dtype=np.int64), [self.own.degrees(asked - self.begin)]

        return self.exchange.ask(nodes, answer, [np.int64])[1][0]
