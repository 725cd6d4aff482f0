"""Blocks and draws: against a twin written to be obviously right, and against what probability says."""

from __future__ import annotations

import math
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.stats import chisquare

from gemini_gnn import hashing
from gemini_gnn.config import SamplingConfig
from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.graph.graph import from_edges
from gemini_gnn.sampling import kernels
from gemini_gnn.sampling.blocks import Batch, Block
from gemini_gnn.sampling.in_edges import ReplicatedInEdges
from gemini_gnn.sampling.sampler import NeighborSampler

MASK = (1 << 64) - 1


def in_edges_of(edges, num_nodes, original=None, weight=None) -> ReplicatedInEdges:
    """In-edges of `edges` given in original ids, stored under new ids: new id i is node ``original[i]``."""
    original = np.arange(num_nodes) if original is None else np.asarray(original)
    new_id = np.argsort(original)
    edges = np.array(edges, dtype=np.int64).reshape(-1, 2)
    colptr, row, w = from_edges(edges[:, 0], edges[:, 1], num_nodes, weight)  # canonical: ascending original source
    columns = [np.arange(colptr[v], colptr[v + 1]) for v in original]
    order = np.concatenate([np.empty(0, np.int64), *columns])
    new_colptr = np.concatenate([[0], np.cumsum([len(c) for c in columns])]).astype(np.int64)
    return ReplicatedInEdges(
        new_colptr, new_id[row[order]].astype(row.dtype), original, None if w is None else w[order]
    )


def random_edges(num_nodes: int, num_edges: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hub = rng.integers(0, max(1, num_nodes // 10), num_edges)
    target = np.where(rng.random(num_edges) < 0.4, hub, rng.integers(0, num_nodes, num_edges))
    return np.stack([rng.integers(0, num_nodes, num_edges), target], axis=1)


# -- the twin ----------------------------------------------------------------------------------------------------------


def twin_hash(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def twin_stream(*coordinates: int) -> int:
    state = 0
    for value in coordinates:
        state = twin_hash(state ^ (value & MASK))
    return state


def twin_choose(key: int, degree: int, fanout: int) -> list[int]:
    """Positions of a uniform draw without replacement (Floyd), ascending."""
    if fanout < 0 or degree <= fanout:
        return list(range(degree))
    taken: set[int] = set()
    for step, j in enumerate(range(degree - fanout, degree)):
        t = twin_hash((key + step * 0x9E3779B97F4A7C15) & MASK) * (j + 1) >> 64
        taken.add(j if t in taken else t)
    return sorted(taken)


def twin_choose_weighted(key: int, weights: list[float], fanout: int) -> tuple[list[int], list[float]]:
    """Positions, ascending, and the weights corrected for the chance of each to be drawn."""
    if fanout < 0 or len(weights) <= fanout:
        return list(range(len(weights))), weights
    cost = []
    for j, w in enumerate(weights):
        u = ((twin_hash((key + j * 0x9E3779B97F4A7C15) & MASK) >> 11) + 0.5) / 2**53
        cost.append((-math.log(u) / w, j))
    chosen = sorted(j for _, j in sorted(cost)[:fanout])
    limit = sorted(cost)[fanout][0]
    return chosen, [weights[j] / (1 - math.exp(-weights[j] * limit)) * fanout / len(weights) for j in chosen]


def twin_sample(in_edges, fanouts, seed, seeds, epoch, index, weighted=False) -> Batch:
    colptr, row = in_edges.colptr.tolist(), in_edges.row.tolist()
    weight = None if in_edges.edge_weight is None else in_edges.edge_weight.tolist()
    nodes, blocks = list(seeds), []
    where: dict[int, int] = {}
    for i, v in enumerate(nodes):
        where.setdefault(v, i)
    for hop, fanout in enumerate(fanouts, start=1):
        base = twin_stream(hashing.DRAW, seed, epoch, index, hop)
        num_dst, indptr, indices, weights = len(nodes), [0], [], []
        for v in nodes[:num_dst]:
            first, degree = colptr[v], colptr[v + 1] - colptr[v]
            key = twin_hash(base ^ int(in_edges.original[v]))
            if weighted:
                chosen, shown = twin_choose_weighted(key, weight[first : first + degree], fanout)
            else:
                chosen = twin_choose(key, degree, fanout)
                shown = [] if weight is None else [weight[first + position] for position in chosen]
            weights += shown
            for position in chosen:
                u = row[first + position]
                if u not in where:
                    where[u] = len(nodes)
                    nodes.append(u)
                indices.append(where[u])
            indptr.append(len(indices))
        matrix = csr_matrix((np.arange(len(indices)) + 1, indices, indptr), shape=(num_dst, len(nodes)))
        transposed = matrix.tocsc()  # of CSR: stable, hence destinations ascend
        degree = np.diff(in_edges.colptr)
        blocks.append(
            Block(
                num_src=len(nodes),
                num_dst=num_dst,
                indptr=np.array(indptr),
                indices=np.array(indices, dtype=np.int64),
                indptr_t=transposed.indptr,
                indices_t=transposed.indices,
                edge_t=transposed.data - 1,
                degree=degree[nodes[:num_dst]],
                src_degree=degree[nodes],
                edge_weight=None if weight is None else np.array(weights, dtype=np.float32),
            )
        )
    return Batch(epoch, index, np.array(seeds, dtype=np.int64), np.array(nodes, dtype=np.int64), blocks[::-1])


def assert_same(got: Batch, want: Batch) -> None:
    assert (got.epoch, got.index, len(got.blocks)) == (want.epoch, want.index, len(want.blocks))
    np.testing.assert_array_equal(got.seeds, want.seeds)
    np.testing.assert_array_equal(got.input_nodes, want.input_nodes)
    for a, b in zip(got.blocks, want.blocks, strict=True):
        assert (a.num_src, a.num_dst, a.num_edges) == (b.num_src, b.num_dst, b.num_edges)
        for name in ("indptr", "indices", "indptr_t", "indices_t", "edge_t", "degree", "src_degree"):
            assert getattr(a, name).dtype == np.int64
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert (a.edge_weight is None) == (b.edge_weight is None)
        if b.edge_weight is not None:
            assert a.edge_weight.dtype == np.float32
            # Corrected weights hold an exponential, which may be rounded otherwise here than there.
            np.testing.assert_allclose(a.edge_weight, b.edge_weight, rtol=1e-6)


# -- against the twin --------------------------------------------------------------------------------------------------


def test_hashes_agree_between_numpy_numba_and_the_reference_values():
    # First outputs of the published generator seeded with 1234567.
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(int(kernels.splitmix64(np.uint64(state))))
        state = (state + hashing.GOLDEN) & MASK
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    x = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    hashed = hashing.splitmix64(x)
    assert [int(kernels.splitmix64(v)) for v in x] == hashed.tolist() == [twin_hash(int(v)) for v in x]
    assert int(hashing.stream(2, 0, 5, -1)) == twin_stream(2, 0, 5, -1)
    assert int(hashing.keys(np.uint64(7), np.array([9]))[0]) == twin_hash(7 ^ 9)


@st.composite
def problems(draw):
    num_nodes = draw(st.integers(1, 12))
    node = st.integers(0, num_nodes - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=60))  # self-loops, parallel edges, isolated nodes included
    original = draw(st.permutations(range(num_nodes)))
    weight = draw(st.one_of(st.none(), st.lists(st.sampled_from([0.5, 1.0, 7.0]), min_size=60, max_size=60)))
    return dict(
        in_edges=in_edges_of(edges, num_nodes, original, None if weight is None else np.array(weight[: len(edges)])),
        fanouts=draw(st.lists(st.sampled_from([-1, 1, 2, 3, 5, 8]), min_size=1, max_size=3)),
        seed=draw(st.integers(-3, 2**63)),
        seeds=draw(st.lists(node, max_size=6)),
        epoch=draw(st.integers(0, 3)),
        index=draw(st.integers(0, 3)),
        weighted=weight is not None and draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_batches_equal_those_of_the_twin(problem):
    p = problem
    sampler = NeighborSampler(p["in_edges"], p["fanouts"], p["seed"], p["weighted"])
    want = twin_sample(**p)
    for _ in range(2):  # the second time with used work arrays
        assert_same(sampler.sample(np.array(p["seeds"], dtype=np.int64), p["epoch"], p["index"]), want)


@pytest.mark.parametrize("fanout", [1, 2, 5, 15, 40, 300, 900])
def test_every_way_to_remember_draws_equals_the_twin(fanout):
    """Degrees on both sides of every switch between bitmap and sorted list."""
    degrees = [0, 1, fanout - 1, fanout, fanout + 1, 63, 64, 65, 127, 500, 1000, 5000]
    colptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64)
    original = np.arange(len(degrees)) * 1000 + 7
    row = (np.arange(colptr[-1]) % len(degrees)).astype(np.int32)
    in_edges = ReplicatedInEdges(colptr, row, original)
    sampler = NeighborSampler(in_edges, [fanout], seed=3)
    seeds = np.arange(len(degrees))
    for index in range(3):
        assert_same(
            sampler.sample(seeds, 1, index), twin_sample(in_edges, [fanout], 3, seeds.tolist(), epoch=1, index=index)
        )


def test_larger_graph_in_both_widths_and_from_read_only_maps(tmp_path):
    in_edges = in_edges_of(random_edges(500, 6000), 500, np.random.default_rng(1).permutation(500))
    want = twin_sample(in_edges, [4, 3, 2], 9, list(range(0, 500, 7)), epoch=2, index=5)
    for kind in (np.int32, np.int64):
        for name, array in dict(c=in_edges.colptr, r=in_edges.row.astype(kind), o=in_edges.original).items():
            np.save(tmp_path / f"{name}.npy", array)
        mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "cro"]
        sampler = NeighborSampler(ReplicatedInEdges(*mapped), [4, 3, 2], seed=9)
        assert_same(sampler.sample(np.arange(0, 500, 7), 2, 5), want)


def test_kernels_compile_where_no_cache_folder_is_writable(monkeypatch):
    njit = kernels.njit

    def without_cache(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")  # what numba says
        return njit(**options)

    monkeypatch.setattr(kernels, "njit", without_cache)
    assert kernels._compiled(lambda a, b: a / b)(1.0, 0.0) == math.inf


# -- edge cases by hand ------------------------------------------------------------------------------------------------


def test_isolated_nodes_self_loops_and_parallel_edges():
    in_edges = in_edges_of([(0, 0), (1, 0), (1, 0), (2, 1)], 4)
    batch = NeighborSampler(in_edges, [-1, -1], seed=0).sample(np.array([0, 3]), 0, 0)
    near, far = batch.blocks[1], batch.blocks[0]
    assert (near.num_dst, near.num_src) == (2, 3)
    assert near.indptr.tolist() == [0, 3, 3] and near.indices.tolist() == [0, 2, 2]
    assert near.degree.tolist() == [3, 0] and near.src_degree.tolist() == [3, 0, 1]
    assert near.indptr_t.tolist() == [0, 1, 1, 3] and near.indices_t.tolist() == [0, 0, 0]
    assert (far.num_dst, far.num_src) == (3, 4)
    assert far.indptr.tolist() == [0, 3, 3, 4] and far.indices.tolist() == [0, 2, 2, 3]
    assert batch.input_nodes.tolist() == [0, 3, 1, 2]
    two = NeighborSampler(in_edges, [2], seed=0)
    drawn = {tuple(two.sample(np.array([0]), 0, i).blocks[0].indices.tolist()) for i in range(60)}
    assert drawn == {(0, 1), (1, 1)}  # the parallel edge is two edges, and each edge is drawn at most once


def test_no_seeds_and_no_edges():
    sampler = NeighborSampler(in_edges_of([], 3), [5, -1], seed=0)
    for seeds in ([], [2, 0]):
        batch = sampler.sample(np.array(seeds), 0, 0)
        assert batch.input_nodes.tolist() == seeds and batch.num_edges == 0
        for block in batch.blocks:
            assert block.num_src == block.num_dst == len(seeds)
            assert len(block.indptr) == len(block.indptr_t) == len(seeds) + 1


def test_repeated_seeds_keep_their_rows():
    sampler = NeighborSampler(in_edges_of(random_edges(20, 200), 20), [2], seed=0)
    block = sampler.sample(np.array([4, 4, 7]), 0, 0).blocks[0]
    rows = [block.indices[a:b].tolist() for a, b in zip(block.indptr[:-1], block.indptr[1:], strict=True)]
    assert block.num_dst == 3 and rows[0] == rows[1] and 1 not in block.indices


def test_a_fanout_beyond_every_degree_takes_no_room():
    weight = np.ones(10)
    for weighted in (False, True):
        sampler = NeighborSampler(star(10, weight), [10**12], seed=0, weighted=weighted)
        assert sampler.sample(np.array([0]), 0, 0).num_edges == 10


def test_the_config_group_says_what_the_schema_says():
    from omegaconf import OmegaConf

    group = OmegaConf.load(Path(__file__).parents[2] / "configs" / "sampling" / "default.yaml")
    assert OmegaConf.to_container(group) == asdict(SamplingConfig())


def test_bad_arguments_say_what_is_wrong():
    in_edges = in_edges_of([(0, 1)], 2)
    for fanouts in ([], [0], [3, -2]):
        with pytest.raises(ConfigError, match="fanouts"):
            NeighborSampler(in_edges, fanouts, seed=0)
    with pytest.raises(ConfigError, match="weighted"):
        NeighborSampler(in_edges, [1], seed=0, weighted=True)
    sampler = NeighborSampler(in_edges, [1], seed=0)
    for seed in (-1, 2):
        with pytest.raises(DataError, match=r"0\.\.1"):
            sampler.sample(np.array([seed]), 0, 0)
    with pytest.raises(DataError, match="colptr"):
        ReplicatedInEdges(np.array([0, 3]), np.array([0]), np.array([0]))
    with pytest.raises(DataError, match="original"):
        ReplicatedInEdges(np.array([0, 1]), np.array([0]), np.array([0, 1]))


# -- purity ------------------------------------------------------------------------------------------------------------


def draws_of(batch: Batch, in_edges: ReplicatedInEdges) -> list[dict[int, list[int]]]:
    """Per block, what every destination drew: original id -> original ids of its drawn sources."""
    ids, out = in_edges.original[batch.input_nodes], []
    for block in batch.blocks:
        rows = zip(block.indptr[:-1], block.indptr[1:], strict=True)
        out.append({int(ids[i]): ids[block.indices[a:b]].tolist() for i, (a, b) in enumerate(rows)})
    return out


def test_draws_depend_neither_on_the_partition_nor_on_the_number_of_ranks():
    edges, n, fanouts = random_edges(200, 4000), 200, [4, 3, 2]
    seeds = np.random.default_rng(5).choice(n, 40, replace=False)  # original ids
    one = in_edges_of(edges, n)
    want = draws_of(NeighborSampler(one, fanouts, seed=1).sample(seeds, 3, 8), one)
    for ranks in (2, 3):
        original = np.random.default_rng(ranks).permutation(n)
        in_edges = in_edges_of(edges, n, original)
        new_id = np.argsort(original)
        union: list[dict] = [{} for _ in fanouts]
        for rank in range(ranks):
            mine = np.array([s for s in new_id[seeds] if s * ranks // n == rank])
            batch = NeighborSampler(in_edges, fanouts, seed=1).sample(mine, 3, 8)
            for known, new in zip(union, draws_of(batch, in_edges), strict=True):
                for node, drawn in new.items():
                    assert known.setdefault(node, drawn) == drawn
        assert union == want


def test_seed_epoch_index_and_hop_all_matter():
    in_edges = in_edges_of(random_edges(50, 5000), 50)
    seeds = np.arange(50)
    base = NeighborSampler(in_edges, [3, 3], seed=0).sample(seeds, 0, 0)
    again = NeighborSampler(in_edges, [3, 3], seed=0).sample(seeds, 0, 0)
    assert_same(base, again)
    for seed, epoch, index in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        other = NeighborSampler(in_edges, [3, 3], seed=seed).sample(seeds, epoch, index)
        assert draws_of(other, in_edges)[1] != draws_of(base, in_edges)[1]
    assert draws_of(base, in_edges)[0] != draws_of(base, in_edges)[1]


def test_one_set_of_in_edges_serves_samplers_on_several_threads():
    in_edges = in_edges_of(random_edges(300, 9000), 300)
    want = [NeighborSampler(in_edges, [5, 5], seed=0).sample(np.arange(300), 0, i) for i in range(20)]
    got: dict[int, list[Batch]] = {}

    def work(thread: int) -> None:
        sampler = NeighborSampler(in_edges, [5, 5], seed=0)
        got[thread] = [sampler.sample(np.arange(300), 0, i) for i in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(got) == [0, 1, 2]
    for batches in got.values():
        for a, b in zip(batches, want, strict=True):
            assert_same(a, b)


def test_a_failing_hop_leaves_the_sampler_usable():
    in_edges = in_edges_of(random_edges(50, 500), 50)
    sampler = NeighborSampler(in_edges, [3, 3], seed=0)
    want = sampler.sample(np.arange(10), 0, 0)
    draw, calls = in_edges.draw, []

    def broken(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("exchange lost")
        return draw(*args)

    in_edges.draw = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="exchange lost"):
        sampler.sample(np.arange(10), 0, 0)
    del in_edges.draw
    assert_same(sampler.sample(np.arange(10), 0, 0), want)


# -- distributions -----------------------------------------------------------------------------------------------------


def star(degree: int, weight=None) -> ReplicatedInEdges:
    """Node 0 with in-edges from 1..degree."""
    return in_edges_of([(i, 0) for i in range(1, degree + 1)], degree + 1, weight=weight)


def draws_at_stars(degree: int, fanout: int, trials: int, weight=None) -> np.ndarray:
    """``[trials, fanout]`` leaf numbers 0..degree-1, from 500 nodes that share their leaves, over many batches."""
    centers = 500
    edges = np.stack([np.tile(np.arange(degree), centers), np.repeat(np.arange(centers), degree) + degree], axis=1)
    weights = None if weight is None else np.tile(weight, centers)
    in_edges = in_edges_of(edges, centers + degree, weight=weights)
    sampler = NeighborSampler(in_edges, [fanout], seed=12, weighted=weight is not None)
    seeds = np.arange(degree, degree + centers)
    batches = [sampler.sample(seeds, 0, i) for i in range(trials // centers)]
    return np.concatenate([b.input_nodes[b.blocks[0].indices].reshape(centers, fanout) for b in batches])


@pytest.mark.parametrize(("degree", "fanout"), [(10, 3), (70, 1), (300, 2), (130, 15)])
def test_uniform_draws_are_uniform_and_without_replacement(degree, fanout):
    drawn = draws_at_stars(degree, fanout, 20_000)
    assert (np.diff(drawn, axis=1) > 0).all()  # ascending: all different
    assert chisquare(np.bincount(drawn.ravel(), minlength=degree)).pvalue > 1e-3


def test_pairs_are_uniform_too():
    _, counts = np.unique(draws_at_stars(6, 2, 15_000), axis=0, return_counts=True)
    assert len(counts) == 15 and chisquare(counts).pvalue > 1e-3


def test_draws_of_neighboring_ids_and_batches_are_independent():
    one = draws_at_stars(4, 1, 20_000)[:, 0]
    for shift in (1, 500):  # the next node of the batch; the same node in the next batch
        pairs = one.reshape(-1, 2, shift)
        both = np.bincount((4 * pairs[:, 0] + pairs[:, 1]).ravel(), minlength=16)
        assert chisquare(both).pvalue > 1e-3


def test_weighted_draws_follow_successive_sampling():
    weight, trials = np.array([1.0, 2.0, 3.0, 4.0]), 20_000
    pairs, seen = np.unique(draws_at_stars(4, 2, trials, weight), axis=0, return_counts=True)
    p = weight / weight.sum()
    expected = [trials * (p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])) for a, b in pairs]
    assert len(seen) == 6 and chisquare(seen, expected).pvalue > 1e-3


def test_sums_of_weighted_messages_are_unbiased_however_the_edges_are_drawn():
    """GCN multiplies the sum over the drawn edges by degree / drawn: its mean over many draws is the sum over all."""
    rng = np.random.default_rng(4)
    weight, message = rng.pareto(1.5, 30) + 0.05, rng.normal(1.0, 2.0, 30)
    in_edges, sums = star(30, weight), {}
    for weighted in (False, True):
        sampler = NeighborSampler(in_edges, [6], seed=2, weighted=weighted)
        batches = [sampler.sample(np.array([0]), 0, i) for i in range(4000)]
        drawn = [(b.blocks[0].edge_weight, message[b.input_nodes[b.blocks[0].indices] - 1]) for b in batches]
        sums[weighted] = np.array([30 / 6 * (w @ m) for w, m in drawn])
        error = sums[weighted].mean() - weight @ message
        assert abs(error) < 4 * sums[weighted].std() / math.sqrt(len(batches))
    assert sums[True].std() < sums[False].std()  # what drawing by weight is for


def test_weighted_draws_of_a_hub_equal_the_twin():
    weight = np.random.default_rng(0).pareto(1.5, 3000).astype(np.float32) + np.float32(0.01)
    in_edges = star(3000, weight)
    for fanout in (1, 7, 64, 500):
        sampler = NeighborSampler(in_edges, [fanout], seed=1, weighted=True)
        assert_same(sampler.sample(np.array([0]), 0, 0), twin_sample(in_edges, [fanout], 1, [0], 0, 0, weighted=True))


def test_weights_ride_along_with_uniform_draws():
    weight = np.arange(1, 101, dtype=np.float32)
    sampler = NeighborSampler(star(100, weight), [10], seed=0)
    batch = sampler.sample(np.array([0]), 0, 0)
    np.testing.assert_array_equal(batch.blocks[0].edge_weight, batch.input_nodes[batch.blocks[0].indices])
