"""Partitioned and replicated topologies give the same batches, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemini_gnn.errors import PartitionError
from gemini_gnn.sampling.batches import BatchPlan
from gemini_gnn.sampling.in_edges import ReplicatedInEdges
from gemini_gnn.sampling.partitioned import PartitionedInEdges
from gemini_gnn.sampling.sampler import NeighborSampler
from tests.ranks import run_ranks
from tests.sampling.test_sampling import assert_same, in_edges_of, random_edges

NODES = 120


def whole_graph(weighted: bool) -> ReplicatedInEdges:
    edges = random_edges(NODES, 1500, seed=3)
    edges = edges[edges[:, 1] != 5]  # node 5 is isolated
    weight = np.random.default_rng(4).random(len(edges)).astype(np.float32) + 0.1 if weighted else None
    return in_edges_of(edges, NODES, np.random.default_rng(2).permutation(NODES), weight)


def part_of(whole: ReplicatedInEdges, bounds: np.ndarray, part: int, exchange) -> PartitionedInEdges:
    begin, end = bounds[part], bounds[part + 1]
    colptr = whole.colptr[begin : end + 1]
    edges = slice(colptr[0], colptr[-1])
    weight = None if whole.edge_weight is None else whole.edge_weight[edges]
    return PartitionedInEdges(
        colptr, whole.row[edges], whole.original[begin:end], bounds, part, exchange, edge_weight=weight
    )


class Alone:
    """An exchange for one part that owns everything."""

    def ask(self, ids, answer, dtypes):
        counts, columns = answer(ids)
        assert [c.dtype for c in columns] == [np.dtype(d) for d in dtypes]
        return counts, columns


@pytest.mark.parametrize("weighted", [False, True])
def test_one_part_equals_replicated(weighted):
    whole = whole_graph(weighted)
    part = part_of(whole, np.array([0, NODES]), 0, Alone())
    for seeds in (np.arange(0, NODES, 5), np.empty(0, np.int64)):
        batches = [NeighborSampler(t, [4, -1, 2], 1, weighted).sample(seeds, 2, 3) for t in (whole, part)]
        assert_same(*batches)


def test_arrays_of_another_part_are_refused():
    whole = whole_graph(False)
    with pytest.raises(PartitionError, match="part 1: expected the 20 nodes"):
        PartitionedInEdges(whole.colptr, whole.row, whole.original, np.array([0, 100, NODES]), 1, Alone())


def sample_on_rank(rank: int, world: int, weighted: bool) -> int:
    import torch.distributed as dist

    from gemini_gnn.halo.exchange import HaloExchange

    whole = whole_graph(weighted)
    bounds = np.array([0, 40, NODES] if world == 2 else [0, 70, 70, NODES])  # uneven; of three ranks one owns nothing
    exchange = HaloExchange(dist.new_group(backend="gloo"), bounds, rank, chunk_bytes=4096, timeout_s=30)
    samplers = [
        NeighborSampler(in_edges, [4, 3, -1], 1, weighted)
        for in_edges in (whole, part_of(whole, bounds, rank, exchange))
    ]
    seeds = [np.arange(a, b, 3) for a, b in itertools.pairwise(bounds)]
    plan = BatchPlan(seeds, whole.original, 6, "global", seed=1)
    batches = 0
    for epoch in range(2):
        for index in range(plan.batches_per_epoch + 1):  # the last one is empty on every rank
            mine = plan.seeds(epoch, index, rank)
            assert_same(samplers[1].sample(mine, epoch, index), samplers[0].sample(mine, epoch, index))
            batches += 1
    return batches


@pytest.mark.parametrize(("world", "weighted"), [(2, False), (3, True)])
def test_ranks_that_hold_a_part_each_sample_what_replicated_ones_do(world, weighted):
    assert len(set(run_ranks(sample_on_rank, world, weighted))) == 1
