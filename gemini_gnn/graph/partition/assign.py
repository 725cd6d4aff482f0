"""Which part owns which node. Pure: arrays in, an assignment out; nothing is read or written here.

Both methods promise: no empty part, numbers of nodes within a few percent, and training seeds equal to +-1, because an
epoch lasts as long as the rank with the most seeds.
"""

from __future__ import annotations

import numpy as np

from gemini_gnn import hashing
from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.partition import metis
from gemini_gnn.graph.partition.quality import chunks

METHODS = ("metis", "hash")
EDGE_IMBALANCE = 0.05  # allowed to METIS when nodes, seeds and edges are balanced at once
FEW_NODES = 4  # per part; below that METIS fails aloud or leaves parts empty, and nearly every edge is cut anyway
MANY_MOVES = 0.05  # of the seeds: METIS is asked a second time
UNEVEN_NODES = 1.10  # largest part / mean: up to here the smaller cut decides, beyond it the balance


def partition_nodes(graph: Graph, method: str, parts: int, seed: int = 0, balance_edges: bool = False) -> np.ndarray:
    """The part of every node; a pure function of the arguments.

    Args:
        graph: directed; METIS sees it without directions and self-loops.
        method: "metis" (few cut edges) or "hash" (no look at the edges, balanced to +-1, cut near 1 - 1/parts).
        parts: 1 or more, at most the number of nodes.
        seed: of METIS' random numbers, or of the hash.
        balance_edges: METIS also balances the in-edges of the parts (largest/mean near 1.05) and pays with cut edges:
            the cut of graphs with hubs can double. Hash spreads every degree evenly in any case.

    Returns:
        int32 ``[nodes]``. Training seeds per part differ by one at most.

    Raises:
        PartitionError: unknown method, more parts than nodes, or METIS failed.
    """
    n = graph.num_nodes
    if method not in METHODS:
        raise PartitionError(f"partition.method: expected one of {', '.join(METHODS)}; got {method!r}")
    if parts < 1:
        raise PartitionError(f"partition.parts: expected 1 or more; got {parts}")
    if parts > n:
        raise PartitionError(
            f"{graph.name}: expected at most one part per node; got {parts} parts for {n} nodes; use fewer ranks "
            "or a smaller partition.parts"
        )
    if parts == 1:
        return np.zeros(n, dtype=np.int32)
    if method == "hash" or n < FEW_NODES * parts:
        return deal(np.diff(graph.colptr), graph.train_mask, parts, seed)
    adjacency = metis.symmetrise(graph.colptr, graph.row)
    if len(adjacency.neighbors) == 0:  # nothing to cut, and METIS would divide by the number of edges
        return deal(np.diff(graph.colptr), graph.train_mask, parts, seed)
    ones = np.ones(n, dtype=np.int64)
    if balance_edges:
        weights = np.stack([ones, graph.train_mask, np.diff(graph.colptr)], axis=1)
        raw = metis.part_graph(adjacency, parts, weights, seed=seed, imbalance=EDGE_IMBALANCE)
        return finish(adjacency, raw, graph.train_mask, parts)
    # Recursive bisection with one weight: nodes within 1 % and, at 4 to 32 parts of Computers and ego-twitter, a cut up
    # to 15 % smaller than the k-way call's.
    raw = metis.part_graph(adjacency, parts, seed=seed, recursive=True)
    best = finish(adjacency, raw, graph.train_mask, parts)
    if np.count_nonzero(best != raw) > MANY_MOVES * np.count_nonzero(graph.train_mask):
        # The seeds lie together. Moving them one by one tore holes; let METIS balance them too and take the better.
        raw = metis.part_graph(adjacency, parts, np.stack([ones, graph.train_mask], axis=1), seed=seed)
        other = finish(adjacency, raw, graph.train_mask, parts)

        def badness(assignment: np.ndarray) -> tuple[float, float]:
            uneven = np.bincount(assignment, minlength=parts).max() * parts / n
            return max(uneven, UNEVEN_NODES), cut_share(adjacency, assignment)

        best = min(best, other, key=badness)
    return best


def finish(adjacency: metis.Adjacency, assignment: np.ndarray, train_mask: np.ndarray, parts: int) -> np.ndarray:
    """Do what METIS leaves undone: make the seeds even to +-1, and fill empty parts."""
    return fill_empty(even_seeds(adjacency, assignment, train_mask, parts), train_mask, parts)


def deal(degree: np.ndarray, train_mask: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Deal the nodes out like cards, in the order of a hash of their ids.

    Seeds first, then the others, each from the highest degree (in quarter octaves) down, back and forth over the parts:
    so nodes and seeds are equal to +-1 and the edges nearly so. A part drawn for every node alone would not give that:
    Computers in 64 parts, edges max/min 1.8-2.2.

    Args:
        degree: int64 ``[nodes]``, in-degree. train_mask: bool ``[nodes]``.

    Returns:
        int32 ``[nodes]``.
    """
    n = len(degree)
    steps = np.floor(4 * np.log2(degree + 1.0))
    order = np.lexsort((hashing.seeded(np.arange(n), seed), -steps, ~train_mask))
    turn, place = np.divmod(np.arange(n), parts)
    assignment = np.empty(n, dtype=np.int32)
    assignment[order] = np.where(turn % 2, parts - 1 - place, place)
    return assignment


def even_seeds(adjacency: metis.Adjacency, assignment: np.ndarray, train_mask: np.ndarray, parts: int) -> np.ndarray:
    """Move surplus seeds until the parts hold equally many, +-1, choosing the moves that cut the fewest edges.

    A part keeps ``ceil(seeds / parts)`` seeds if it is among the fullest, else ``floor``. The price of moving seed v
    from p to q is its edges into p minus its edges into q, as they lie before the first move.

    Args:
        adjacency: symmetric. assignment: int32 ``[nodes]``. train_mask: bool ``[nodes]``.

    Returns:
        A new assignment.
    """
    count = np.bincount(assignment[train_mask], minlength=parts)
    small, larger = divmod(int(count.sum()), parts)
    target = np.full(parts, small)
    target[np.argsort(-count, kind="stable")[:larger]] += 1
    lack = target - count
    result = assignment.copy()
    receivers = np.flatnonzero(lack > 0)
    price: list[np.ndarray] = []
    moves: list[tuple[np.ndarray, int]] = []  # (seeds, receiver)
    for p in np.flatnonzero(lack < 0):
        seeds = np.flatnonzero(train_mask & (assignment == p))
        edges = edges_into_parts(adjacency, seeds, assignment, parts)
        surplus = -int(lack[p])
        for q in receivers:
            cost = edges[:, p] - edges[:, q]
            best = np.argsort(cost, kind="stable")[:surplus]  # more than this never move from p to q
            price.append(cost[best])
            moves.append((seeds[best], int(q)))
    if not moves:
        return result
    nodes = np.concatenate([seeds for seeds, _ in moves])
    to = np.concatenate([np.full(len(seeds), q) for seeds, q in moves])
    for i in np.argsort(np.concatenate(price), kind="stable"):
        v, q = nodes[i], to[i]
        p = assignment[v]
        if result[v] == p and lack[p] < 0 and lack[q] > 0:
            result[v] = q
            lack[p] += 1
            lack[q] -= 1
    assert not lack.any()
    return result


def edges_into_parts(adjacency: metis.Adjacency, nodes: np.ndarray, assignment: np.ndarray, parts: int) -> np.ndarray:
    """How many directed edges connect each of ``nodes`` with each part: float64 ``[len(nodes), parts]``."""
    result = np.empty((len(nodes), parts))
    degree = adjacency.pointers[nodes + 1] - adjacency.pointers[nodes]
    for first, last in chunks(np.concatenate([[0], np.cumsum(degree)]), 0, len(nodes)):
        some, lengths = nodes[first:last], degree[first:last]
        at = ranges(adjacency.pointers[some], lengths)
        cell = np.repeat(np.arange(last - first) * parts, lengths) + assignment[adjacency.neighbors[at]]
        weight = None if adjacency.weight is None else adjacency.weight[at]
        result[first:last] = np.bincount(cell, weight, (last - first) * parts).reshape(last - first, parts)
    return result


def cut_share(adjacency: metis.Adjacency, assignment: np.ndarray) -> float:
    """Share of the directed edges (self-loops aside) that connect different parts."""
    cut = np.repeat(assignment, np.diff(adjacency.pointers)) != assignment[adjacency.neighbors]
    if adjacency.weight is None:
        return float(np.count_nonzero(cut) / len(cut))
    return float(adjacency.weight[cut].sum() / adjacency.weight.sum())


def ranges(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``begin[i], begin[i] + 1, ... begin[i] + length[i] - 1`` for every i, one after the other: int64."""
    ends = np.cumsum(length)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(begin - (ends - length), length)


def fill_empty(assignment: np.ndarray, train_mask: np.ndarray, parts: int) -> np.ndarray:
    """Give every empty part one node that is not a seed, from the largest part that has one (tiny graphs only).

    With seeds even to +-1 and at least as many nodes as parts such a node exists: a part without any node has no seed,
    so every part has at most one seed, and a part of two nodes has one that is none.
    """
    result = assignment.copy()
    size = np.bincount(result, minlength=parts)
    for p in np.flatnonzero(size == 0):
        others = np.flatnonzero(~train_mask & (size[result] > 1))
        v = others[np.argmax(size[result[others]])]
        size[result[v]] -= 1
        size[p] += 1
        result[v] = p
    return result
