"""What a generation resumes from: questions and answers, scripted and in any order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_gnn.recovery.root import restoring
from gemini_gnn.recovery.root.restoring import Kind, Storage
from gemini_gnn.snapshot.replicas.plan import DISK, Copy, Get, needs_of
from gemini_gnn.snapshot.store.identity import Identity, shard_of

OLD, NEW = Identity(1, 1, 10), Identity(1, 1, 11)
RANKS = ((0,), (1,))


def copies(place: int, identity: Identity, *ranks: int) -> list[Copy]:
    return [Copy(shard_of(rank), identity, place) for rank in ranks]


def kinds(asks):
    return [(ask.machine, ask.kind) for ask in asks]


def begun(storage: Storage = Storage.IF_NEEDED):
    return restoring.begin(RANKS, 7, storage)


def test_where_every_machine_has_its_own_nothing_is_fetched():
    state, asks = begun()
    assert kinds(asks) == [(0, Kind.HOLDS), (1, Kind.HOLDS)] and [ask.number for ask in asks] == [7, 8]
    state, asks = restoring.answered(state, 8, copies(1, NEW, 1) + copies(1, OLD, 1))
    assert asks == [] and not state.done
    state, asks = restoring.answered(state, 7, copies(0, NEW, 0))
    assert asks == [] and state.done and state.identity == NEW


def test_hosts_in_another_order_get_their_shards_from_each_other():
    state, _ = begun()
    state, _ = restoring.answered(state, 7, copies(0, NEW, 1))
    state, asks = restoring.answered(state, 8, copies(1, NEW, 0))
    assert kinds(asks) == [(0, Kind.MEMORY), (1, Kind.MEMORY)]
    assert [ask.gets for ask in asks] == [(Get(0, shard_of(0), 1),), (Get(1, shard_of(1), 0),)]
    state, _ = restoring.answered(state, asks[0].number)
    state, more = restoring.answered(state, asks[1].number)
    assert more == [] and state.done and state.identity == NEW


def test_a_damaged_copy_is_replaced_by_another_and_then_by_an_older_snapshot():
    state, _ = begun()
    state, _ = restoring.answered(state, 7, copies(0, OLD, 0, 1) + copies(0, NEW, 0, 1))
    state, (ask,) = restoring.answered(state, 8)
    assert (ask.machine, ask.identity) == (1, NEW)
    state, (listing,) = restoring.answered(state, ask.number, misses=ask.gets)
    assert listing.kind is Kind.MEMORY and listing.identity == OLD, "no other copy of the new one"
    state, more = restoring.answered(state, listing.number)
    assert more == [] and state.identity == OLD


def test_storage_is_looked_at_when_memory_lacks_a_shard():
    state, _ = begun()
    state, _ = restoring.answered(state, 7, copies(0, NEW, 0))
    state, (ask,) = restoring.answered(state, 8)
    assert (ask.machine, ask.kind) == (0, Kind.CHECKPOINTS)
    state, asks = restoring.answered(state, ask.number, copies(DISK, OLD, 0, 1))
    assert kinds(asks) == [(0, Kind.STORAGE), (1, Kind.STORAGE)]
    for one in asks:
        state, more = restoring.answered(state, one.number)
    assert more == [] and state.done and state.identity == OLD


def test_nothing_anywhere_is_nothing():
    state, _ = begun(Storage.AT_ONCE)
    for number in (9, 7, 8):
        assert not state.done
        state, asks = restoring.answered(state, number)
        assert asks == []
    assert state.done and state.identity is None


def test_a_fresh_start_asks_no_storage():
    state, _ = begun(Storage.NEVER)
    state, _ = restoring.answered(state, 7)
    state, asks = restoring.answered(state, 8)
    assert asks == [] and state.done and state.identity is None


def test_the_answer_to_an_earlier_planning_is_nobodys():
    state, _ = begun()
    assert restoring.answered(state, 3, copies(0, NEW, 0, 1)) == (state, [])


@settings(max_examples=200, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 2), st.sampled_from([OLD, NEW]), st.integers(-1, 2)), max_size=16),
    st.data(),
)
def test_any_order_of_answers_ends_with_what_is_there(held, data):
    """Copies fail at random. In the end every machine holds its shards of one snapshot, or none has all its shards left."""
    ranks = ((0,), (1,), (2,))
    there = {Copy(shard_of(rank), identity, place) for rank, identity, place in held}
    bad = data.draw(st.sets(st.sampled_from(sorted(there)))) if there else set()
    state, waiting = restoring.begin(ranks, 0, data.draw(st.sampled_from([Storage.AT_ONCE, Storage.IF_NEEDED])))
    waiting, asked = list(waiting), len(waiting)
    while waiting:
        ask = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        found, misses = [], []
        if ask.kind is Kind.HOLDS:
            found = [one for one in there if one.place == ask.machine]
        elif ask.kind is Kind.CHECKPOINTS:
            found = [one for one in there if one.place == DISK]
        for get in ask.gets:
            copy = Copy(get.shard, ask.identity, get.source)
            assert copy in there, "asked for what nobody holds"
            if copy in bad:
                misses.append(get)
            else:
                there.add(Copy(get.shard, ask.identity, get.machine))
        state, asks = restoring.answered(state, ask.number, found, misses)
        waiting, asked = waiting + asks, asked + len(asks)
        assert asked < 100
    assert state.done
    good = there - {one for one in bad if one in state.refused}
    if state.identity is not None:
        for machine, shards in enumerate(needs_of(good, ranks)):
            assert all(Copy(shard, state.identity, machine) in good for shard in shards)
    else:
        for identity in (OLD, NEW):
            assert not all(any((c.shard, c.identity) == (shard_of(r), identity) for c in good) for r in range(3))
