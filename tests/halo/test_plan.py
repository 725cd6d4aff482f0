import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemini_gnn.halo import plan

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda owned: sum(owned) > 0)


def bounds_of(owned):
    return np.concatenate([[0], np.cumsum(owned)]).astype(np.int64)


@given(sizes, st.data())
def test_split_puts_every_id_where_its_owner_is(owned, data):
    bounds = bounds_of(owned)
    rank = data.draw(st.integers(0, len(owned) - 1))
    ids = np.array(data.draw(st.lists(st.integers(0, sum(owned) - 1), max_size=30)), dtype=np.int64)
    split = plan.split(ids, bounds, rank)
    owner = [next(r for r in range(len(owned)) if bounds[r] <= v < bounds[r + 1]) for v in ids]  # the dumb twin
    assert split.own.tolist() == [i for i, r in enumerate(owner) if r == rank]
    assert split.own_local.tolist() == [ids[i] - bounds[rank] for i in split.own]
    far = [i for r in range(len(owned)) if r != rank for i in range(len(ids)) if owner[i] == r]
    assert split.remote.tolist() == far
    assert split.remote_ids.tolist() == ids[far].tolist()
    assert split.counts.tolist() == [owner.count(r) if r != rank else 0 for r in range(len(owned))]
    assert len(split) == len(ids)


@given(
    st.integers(1, 5).flatmap(lambda world: hnp.arrays(np.int64, (world, world), elements=st.integers(0, 12))),
    st.integers(1, 7),
)
def test_rounds_agree_and_move_everything_once(matrix, limit):
    world = len(matrix)
    per_rank = [list(plan.rounds(matrix, rank, limit)) for rank in range(world)]
    needed = -(-int(matrix.max()) // limit)
    assert {len(rounds) for rounds in per_rank} == {needed}
    # entry e of rank i's send buffer is (i, e); what arrives must be what the receiver expects at that place
    arrived = [np.full((matrix[:, rank].sum(), 2), -1) for rank in range(world)]
    for index in range(needed):
        turns = [rounds[index] for rounds in per_rank]
        for i in range(world):
            assert turns[i].send_counts == [turns[j].receive_counts[i] for j in range(world)]
            assert max(turns[i].send_counts) <= limit
        sent = [np.arange(matrix[i].sum())[turns[i].send] for i in range(world)]
        for j in range(world):
            pieces = []
            for i in range(world):
                start = sum(turns[i].send_counts[:j])
                pieces += [(i, e) for e in sent[i][start : start + turns[i].send_counts[j]]]
            assert (arrived[j][turns[j].receive] == -1).all()
            arrived[j][turns[j].receive] = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    for j in range(world):
        starts = np.cumsum(matrix, axis=1) - matrix
        expected = [(i, starts[i, j] + k) for i in range(world) for k in range(matrix[i, j])]
        assert arrived[j].tolist() == [list(pair) for pair in expected]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=10))
def test_ranges_are_concatenated_aranges(pairs):
    starts, lengths = [p[0] for p in pairs], [p[1] for p in pairs]
    expected = [v for start, length in pairs for v in range(start, start + length)]
    assert plan.ranges(np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)).tolist() == expected


@given(st.lists(st.integers(0, 4), max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_segments_return_to_the_order_of_the_ids(counts, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    segments = [[(i, k) for k in range(counts[i])] for i in range(len(counts))]
    column = [entry for i in order for entry in segments[i]]
    by_id, positions = plan.segment_order(
        np.array(order, dtype=np.int64), np.array([counts[i] for i in order], dtype=np.int64)
    )
    assert by_id.tolist() == counts
    assert [column[p] for p in positions] == [entry for segment in segments for entry in segment]


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6))
def test_group_sums(groups):
    values = np.array([v for g in groups for v in g], dtype=np.int64)
    assert plan.group_sums(values, np.array([len(g) for g in groups])).tolist() == [sum(g) for g in groups]


def test_a_rank_that_owns_nothing_owns_nothing():
    bounds = np.array([0, 0, 4, 4, 6, 6])
    assert plan.owners(np.arange(6), bounds).tolist() == [1, 1, 1, 1, 3, 3]


def test_ids_outside_the_graph():
    with pytest.raises(ValueError, match=r"0\.\.5; got -1\.\.3"):
        plan.split(np.array([3, -1]), np.array([0, 3, 6]), 0)
    with pytest.raises(ValueError, match=r"0\.\.5; got 6\.\.6"):
        plan.by_owner(np.array([6]), np.array([0, 3, 6]))
    for bad in ([1, 2], [0, 3, 2], [0]):
        with pytest.raises(ValueError, match="bounds"):
            plan.check_bounds(np.array(bad))


def test_a_message_holds_at_least_one_entry():
    assert plan.limit(512, 4096) == 8 and plan.limit(8192, 4096) == 1 and plan.limit(0, 10) == 10
