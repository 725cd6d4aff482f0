"""What a job is restored from, against brute force over all that is held."""

from collections import Counter
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.snapshot.replicas.placement import placement
from gemini_gnn.snapshot.replicas.plan import (
    DISK,
    MOST_NAMED,
    Copy,
    Get,
    Plan,
    describe,
    needs_of,
    obsolete,
    plan,
    recoverable,
    replicated,
)
from gemini_gnn.snapshot.store import catalog
from gemini_gnn.snapshot.store.catalog import SlotView
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import Identity, shard_of

A, B, C = Identity(1, 1, 10), Identity(1, 1, 11), Identity(1, 2, 5)


def held(*places, identity=A, shards=("rank-00000",)):
    return [Copy(shard, identity, place) for shard in shards for place in places]


@st.composite
def catalogs(draw):
    """Copies, ranks by machine, and copies that are refused."""
    machines = draw(st.integers(1, 8))
    local = draw(st.integers(1, 2))
    ranks_of = [range(m * local, (m + 1) * local) for m in range(machines)]
    shards = [shard_of(rank) for rank in range(machines * local)] + ["common"] * draw(st.booleans())
    all_copies = [Copy(*one) for one in product(shards, (A, B, C), range(DISK, machines))]
    if draw(st.booleans()):  # nearly everything is there, else nearly nothing is ever restorable
        copies = set(all_copies) - set(draw(st.lists(st.sampled_from(all_copies))))
    else:
        copies = set(draw(st.lists(st.sampled_from(all_copies))))
    return copies, ranks_of, set(draw(st.lists(st.sampled_from(all_copies), max_size=8)))


def by_hand(copies, good, ranks_of):
    """Identities under which every shard of every rank is somewhere."""
    common = ["common"] if any(copy.shard == "common" for copy in copies) else []
    needed = [shard_of(rank) for ranks in ranks_of for rank in ranks] + common
    return {i for i in (A, B, C) if all(any(c.shard == s and c.identity == i for c in good) for s in needed)}


@given(catalogs())
def test_the_newest_identity_of_which_every_shard_is_somewhere(case):
    copies, ranks_of, refused = case
    needs = needs_of(copies, ranks_of)
    good = copies - refused
    found = plan(copies, needs, refused)
    assert (found.identity if found else None) == max(by_hand(copies, good, ranks_of), default=None)
    if found:
        gets = {(get.machine, get.shard) for get in found.fetches}
        lacking = {(m, s) for m, shards in enumerate(needs) for s in shards if Copy(s, found.identity, m) not in good}
        assert gets == lacking and len(found.fetches) == len(lacking), "only what a machine lacks, and once"
        for machine, shard, source in found.fetches:
            assert Copy(shard, found.identity, source) in good and source != machine
            memory = [c for c in good if c.shard == shard and c.identity == found.identity and c.place != DISK]
            assert (source == DISK) == (not memory)
    assert plan(list(copies)[::-1], needs, refused) == found, "the order of the copies is of no matter"


@given(catalogs())
def test_after_its_fetches_the_plan_needs_none(case):
    copies, ranks_of, refused = case
    needs = needs_of(copies, ranks_of)
    found = plan(copies, needs, refused)
    if found:
        then = copies - refused | {Copy(get.shard, found.identity, get.machine) for get in found.fetches}
        assert plan(then, needs) == Plan(found.identity, ())


def test_memory_is_asked_before_the_disk_and_an_idle_machine_before_a_busy_one():
    shards = [shard_of(rank) for rank in range(6)]
    needs = [set(), set(), set(), set(shards)]
    copies = held(0, 1, 2, DISK, shards=shards)
    found = plan(copies, needs)
    assert Counter(get.source for get in found.fetches) == {0: 2, 1: 2, 2: 2}
    only = held(0, shards=shards[:2]) + held(0, 1, shards=shards[2:4])
    assert plan(only, [set(), set(), set(shards[:4])]).fetches == (
        Get(2, "rank-00000", 0),
        Get(2, "rank-00001", 0),
        Get(2, "rank-00002", 1),
        Get(2, "rank-00003", 1),
    )
    assert plan(held(DISK), [{"rank-00000"}]) == Plan(A, (Get(0, "rank-00000", DISK),))


def test_hosts_in_another_order_exchange_their_shards():
    copies = held(0, shards=["rank-00001"]) + held(1, shards=["rank-00000"])
    assert plan(copies, needs_of(copies, [[0], [1]])).fetches == (Get(0, "rank-00000", 1), Get(1, "rank-00001", 0))


def test_a_damaged_copy_is_replaced_by_a_good_one_and_else_the_snapshot_before_is_taken():
    needs = [{"rank-00000"}, {"rank-00001"}]
    whole = held(0, 1, shards=["rank-00000", "rank-00001"])
    newer = held(0, identity=B) + held(1, identity=B, shards=["rank-00001"])
    copies = whole + newer
    assert plan(copies, needs) == Plan(B, ())
    assert plan(copies, needs, [newer[0]]) == Plan(A, ())
    assert plan([*copies, Copy("rank-00000", B, DISK)], needs, [newer[0]]) == Plan(B, (Get(0, "rank-00000", DISK),))
    assert plan(whole, needs, whole[:2]) is None


def test_every_machine_needs_the_common_shard_if_any_snapshot_has_one():
    own = held(0, identity=B) + held(1, identity=B, shards=["rank-00001"])
    assert needs_of(own, [[0], [1]]) == [{"rank-00000"}, {"rank-00001"}]
    common = held(0) + held(1, shards=["rank-00001"]) + held(1, shards=["common"])
    needs = needs_of(own + common, [[0], [1]])
    assert needs == [{"rank-00000", "common"}, {"rank-00001", "common"}]
    assert plan(own + common, needs) == Plan(A, (Get(0, "common", 1),)), "B lacks it"


def test_nothing_can_be_restored_from_nothing():
    assert plan([], needs_of([], [[0], [1]])) is None


# Recoverable


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.sets(st.sampled_from((A, B, C))), min_size=n, max_size=n)))
def test_recoverable_is_the_newest_that_every_machine_has_reported(reports):
    by_machine = {m: found for m, found in enumerate(reports) if found}
    everywhere = [i for i in (A, B, C) if all(i in found for found in reports)]
    assert recoverable(by_machine, len(reports)) == max(everywhere, default=None)


def test_machines_that_report_different_snapshots_have_none_in_common():
    assert recoverable({0: {A}, 1: {B}}, 2) is None
    assert recoverable({0: {A, B}, 1: {A}}, 2) == A
    assert recoverable({0: {A}}, 2) is None and recoverable({}, 0) is None


# Before a generation


@given(catalogs(), st.integers(1, 4), st.sampled_from((A, B, C)))
def test_replicated_is_the_newest_with_every_copy_in_memory(case, replicas, newest):
    copies, ranks_of, _ = case
    needs = needs_of(copies, ranks_of)
    holders = placement(len(ranks_of), min(replicas, len(ranks_of)))
    there = [
        i
        for i in (A, B, C)
        if i <= newest
        and all(
            Copy(shard_of(r), i, p) in copies for m, ranks in enumerate(ranks_of) for r in ranks for p in holders[m]
        )
        and ("common" not in needs[0] or all(Copy("common", i, m) in copies for m in range(len(ranks_of))))
    ]
    assert replicated(copies, needs, holders, newest) == max(there, default=None)


views = st.lists(
    st.builds(
        SlotView,
        st.just("rank-00000"),
        st.integers(0, 2),
        st.sampled_from(SlotState),
        st.sampled_from((None, A, B, C, Identity(1, 1, 12))),
    ),
    max_size=3,
    unique_by=lambda s: s.slot,
)


@given(views, st.sampled_from((A, B, C)), st.sampled_from((None, A, B, C)))
def test_a_generation_begins_with_what_is_restored_and_what_has_all_its_copies(slots, restored, kept):
    if kept is not None and kept > restored:
        kept = restored
    gone = obsolete(slots, restored, kept)
    left = {s.identity for s in slots if s not in gone and s.state is SlotState.COMMITTED}
    assert left == {
        s.identity
        for s in slots
        if s.state is SlotState.COMMITTED
        and s.identity is not None
        and (s.identity == restored or (kept is not None and s.identity <= kept))
    }
    assert set(catalog.newer(slots, restored)) <= set(gone) and len(set(gone)) == len(gone)
    assert all(s.state is not SlotState.VOID for s in gone)


# The words


def test_what_is_held_is_said_in_a_table():
    copies = [
        *held(0, identity=C),
        *held(0, identity=B),
        *held(0, identity=B, shards=["rank-00001"]),
        *held(0, identity=A),
        *held(1, identity=A, shards=["rank-00001"]),
    ]
    needs = needs_of(copies, [[0], [1]])
    assert describe(plan(copies, needs), copies, needs, ["h1", "h2"]).splitlines() == [
        "snapshot  can be restored  shards",
        "1-2-5     no               nowhere: rank-00001",
        "1-1-11    yes, chosen      h2 gets rank-00001 from h1",
        "1-1-10    yes              every machine has its own",
    ]


def test_what_cannot_be_restored_is_said_too():
    many = [shard_of(rank) for rank in range(MOST_NAMED + 3)]
    table = describe(None, held(DISK, shards=["common"]), [set(many)], ["h1"])
    assert "1-1-10    no               nowhere: rank-00000, rank-00001," in table and "rank-00007, and 3 more" in table
    assert table.endswith("\nno snapshot can be restored")
    assert describe(None, [], [set(many)], ["h1"]) == "no snapshot: neither in the memory of these machines nor on disk"
    assert describe(None, held(DISK), [{"rank-00000"}], ["h1"]).splitlines()[1].endswith("h1 gets rank-00000 from disk")
