"""Layout, header, tree and catalog: no files, no processes. The catalog is compared with a dumb twin."""

import json
import math
import random
import struct
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.state import generators, tree
from gemini_gnn.snapshot.store import catalog, format
from gemini_gnn.snapshot.store.catalog import Holding, SlotView
from gemini_gnn.snapshot.store.format import Header, SlotState, TensorSpec
from gemini_gnn.snapshot.store.identity import Identity

# Identity


def test_identities_are_ordered_by_term_then_generation_then_step():
    assert Identity(1, 1, 9) < Identity(1, 2, 3) < Identity(2, 1, 0)
    assert str(Identity(1, 2, 300)) == "1-2-300"


# Layout

specs = st.lists(
    st.builds(
        TensorSpec,
        st.integers(0, 10**9).map(lambda i: f"t{i}"),
        st.sampled_from(["float32", "bfloat16", "int64", "uint8", "bool"]),
        st.lists(st.integers(0, 700), max_size=3).map(tuple),
    ),
    max_size=12,
    unique_by=lambda s: s.name,
)


@given(specs)
def test_planned_tensors_are_aligned_and_do_not_overlap(tensors):
    plan = format.plan(tensors)
    end = format.PAGE
    for spec, offset in zip(plan.specs, plan.offsets, strict=True):
        assert offset % format.ALIGN == 0 and offset >= end
        assert spec.nbytes < format.LARGE or offset % format.PAGE == 0
        end = offset + spec.nbytes
    assert plan.tail_offset >= end and plan.tail_offset % format.PAGE == 0


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(SnapshotError, match="two are called 'a'"):
        format.plan([TensorSpec("a", "float32", ()), TensorSpec("a", "int64", (2,))])


def header(**changes):
    base = Header(
        SlotState.COMMITTED, Identity(1, 2, 3), 4, "rank-00004", 1, "job", bytes(range(16)), 10, bytes(16), 8192, 20
    )
    return replace(base, **changes)


def test_a_header_survives_its_encoding_and_fits_a_page():
    h = header(committed_ns=123456789)
    raw = format.encode_header(h)
    assert format.decode_header(raw + bytes(100)) == h and len(raw) == format.HEADER_BYTES <= 4096


@given(st.integers(0, format.HEADER_BYTES * 8 - 1))
def test_a_header_with_any_bit_turned_is_not_believed(bit):
    raw = bytearray(format.encode_header(header()))
    raw[bit // 8] ^= 1 << bit % 8
    try:
        assert format.decode_header(bytes(raw)) is None
    except SnapshotError as error:  # the version's own bits
        assert 8 <= bit // 8 < 12 and "format version" in str(error)


@given(st.integers(0, format.HEADER_BYTES - 1))
def test_a_header_torn_at_any_byte_is_the_old_one_or_none(cut):
    old, new = format.encode_header(header()), format.encode_header(header(identity=Identity(1, 2, 4), data_bytes=77))
    assert format.decode_header(new[:cut] + old[cut:]) in (None, header())


def test_a_tail_survives_its_encoding():
    plan = format.plan([TensorSpec("a", "float32", (3,)), TensorSpec("b", "int64", ())])
    structure = format.describe("zero1", 2, "Adam", plan)
    arrays = [np.arange(5, dtype=np.uint8), np.zeros(0, np.uint8), np.full(100, 7, np.uint8)]
    raw = format.encode_tail(format.layout_json(plan, [1], structure), {"x": [1, math.inf]}, arrays)
    manifest = format.decode_tail(memoryview(raw), plan.tail_offset)
    assert manifest.layout.specs == plan.specs[1:] and manifest.layout.offsets == plan.offsets[1:]
    assert manifest.structure == structure and manifest.tree == {"x": [1, math.inf]}
    assert [bytes(a) for a in manifest.arrays] == [a.tobytes() for a in arrays]


def test_a_manifest_of_an_earlier_release_is_read():
    """The checkpoints in existing run directories hold such; they have no format version."""
    head = b'{"layout":{"tensors":[],"topology":{"kind":"stage0 float32"}},"tree":{"rng":1},"arrays":[]}'
    manifest = format.decode_tail(memoryview(struct.pack("<Q", len(head)) + head), format.PAGE)
    assert manifest.structure == {"kind": "stage0 float32"} and manifest.tree == {"rng": 1}
    assert format.encode_tail(format.layout_json(format.plan([]), [], manifest.structure), {"rng": 1}, [])[8:] == head


@given(st.binary(max_size=200))
def test_a_tail_of_garbage_is_refused_politely(raw):
    with pytest.raises(SnapshotError, match="hold together"):
        format.decode_tail(memoryview(raw), 8192)


def test_differences_are_named():
    plan = format.plan([TensorSpec("a", "float32", (3,))])
    ours = format.describe("stage0 float32", 2, "Adam", plan)
    assert format.difference(ours, ours) == ""
    for change, words in (
        ({"world_size": 4}, "number of ranks: the snapshot has 4, this run 2"),
        ({"kind": "zero3"}, "ZeRO"),
        ({"optimizer": "SGD"}, "optimizer: the snapshot has SGD, this run Adam"),
        (
            {"tensors": [["a", "float32", [4]]]},
            r"tensor a: the snapshot has ['float32', [4]], this run ['float32', [3]]",
        ),
        ({"tensors": []}, "tensor a: this run has it"),
        ({"tensors": [*ours["tensors"], ["b", "int64", []]]}, "tensor b: the snapshot has it"),
    ):
        assert words in format.difference({**ours, **change}, ours)
        assert format.fingerprint({**ours, **change}) != format.fingerprint(ours)


# Tree

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers() | st.tuples(st.integers(), st.text(max_size=2)), inner, max_size=3)
    ),
    max_leaves=12,
)


def through(value):
    packed, arrays = tree.pack(value)
    return tree.unpack(json.loads(json.dumps(packed)), [a.tobytes() for a in arrays])


@given(trees)
def test_trees_come_back_as_they_were(value):
    back = through(value)
    assert back == value and repr(back) == repr(value)


def test_arrays_tensors_and_containers_come_back_with_their_types():
    value = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1],
        "s": np.float32(1 / 3),
        "u": np.array(["x", "yy"]),
        "t": torch.tensor([[1.5, float("nan")]], dtype=torch.bfloat16),
        "e": torch.zeros(0, 3),
        "zero": torch.tensor(5),
        "c": Counter({3: 2, 5: 1}),
        "d": deque([1, 2], maxlen=4),
        "__is__": "a key of ours",
    }
    back = through(value)
    assert np.array_equal(back["a"], value["a"]) and back["a"].dtype == np.int16
    assert back["s"] == value["s"] and back["s"].dtype == np.float32
    assert back["u"].tolist() == ["x", "yy"]
    assert back["t"].dtype == torch.bfloat16 and torch.equal(back["t"].view(torch.int16), value["t"].view(torch.int16))
    assert back["e"].shape == (0, 3) and back["zero"].item() == 5 and back["zero"].shape == ()
    assert type(back["c"]) is Counter and back["c"] == value["c"] and back["d"].maxlen == 4
    assert back["__is__"] == "a key of ours"


def test_what_cannot_be_kept_is_named():
    with pytest.raises(SnapshotError, match=r"best\.model\[1\]: expected .* got torch\.nn"):
        tree.pack({"best": {"model": [1, torch.nn.Linear(1, 1)]}})
    with pytest.raises(SnapshotError, match="dtype object"):
        tree.pack({"x": np.array([object()])})


def test_generators_go_on_where_they_were():
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), *torch.randn(3).tolist()]

    before = generators.read()
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        for _ in range(seed):
            draw()  # numpy and random keep the second of two normals for the next call
        taken = generators.read()
        expected = [draw() for _ in range(400)]  # goes round in all of them
        others = [np.arange(3)]
        packed, arrays = tree.pack(generators.values(taken), "rng", others)
        assert arrays is others and len(arrays) > 1
        generators.load(tree.unpack(json.loads(json.dumps(packed)), [a.tobytes() for a in arrays]))
        assert [draw() for _ in range(400)] == expected
    generators.load(generators.values(before))


# Catalog


def test_a_free_slot_is_taken_before_an_old_snapshot_and_the_recoverable_one_never():
    def slots(*steps):
        return [
            SlotView(
                "s", i, SlotState.VOID if s is None else SlotState.COMMITTED, None if s is None else Identity(1, 1, s)
            )
            for i, s in enumerate(steps)
        ]

    assert catalog.writable(slots(5, None, 4), Identity(1, 1, 5)) == 1
    assert catalog.writable(slots(5, 3, 4), Identity(1, 1, 5)) == 1
    assert catalog.writable(slots(5, 6, 7), Identity(1, 1, 5)) is None
    assert catalog.writable(slots(5, 6, 7), None) is None
    pinned = [replace(s, pinned=True) if s.slot == 1 else s for s in slots(5, 3, 4)]
    assert catalog.writable(pinned, Identity(1, 1, 5)) == 2


def usable(slots, *needed):
    return Holding("h0", needed, catalog.committed(slots)).usable()


class Twin:
    """A job of several ranks on real slots, and beside it a list of who committed what, in which nothing is ever lost."""

    def __init__(self, ranks):
        self.slots = [[SlotView("s", i) for i in range(catalog.OWN_SLOTS)] for _ in range(ranks)]
        self.done = [set() for _ in range(ranks)]  # since the last roll-back
        self.last = [None] * ranks
        self.writing = [None] * ranks
        self.generation, self.step = 1, 0

    def recoverable(self):
        return max(set.intersection(*self.done), default=None)

    def capture(self):
        targets = []
        for rank, slots in enumerate(self.slots):
            targets.append(None if self.writing[rank] is not None else catalog.writable(slots, self.last[rank]))
        self.step += 1
        if any(t is None for t in targets):  # the minimum of the bits
            return
        for rank, slot in enumerate(targets):
            identity = Identity(1, self.generation, self.step)
            self.slots[rank][slot] = SlotView("s", slot, SlotState.WRITING, identity)
            self.writing[rank], self.last[rank] = slot, identity

    def commit(self, rank):
        if (slot := self.writing[rank]) is not None:
            self.slots[rank][slot] = replace(self.slots[rank][slot], state=SlotState.COMMITTED)
            self.done[rank].add(self.last[rank])
            self.writing[rank] = None

    def pin(self, rank, slot):
        if self.writing[rank] != slot:
            self.slots[rank][slot] = replace(self.slots[rank][slot], pinned=not self.slots[rank][slot].pinned)

    def crash(self):
        found = [usable(s, "s") for s in self.slots]
        identity = catalog.restorable(found)
        assert identity == self.recoverable()
        self.generation += 1
        self.step = identity.step if identity else 0
        for rank, slots in enumerate(self.slots):
            slots[:] = [replace(s, pinned=False) for s in slots]
            for old in catalog.newer(slots, identity):
                slots[old.slot] = replace(old, state=SlotState.VOID)
            self.done[rank] = {i for i in self.done[rank] if identity and i <= identity}
            self.last[rank], self.writing[rank] = identity, None


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(
        st.one_of(
            st.just(("capture",)),
            st.tuples(st.just("commit"), st.integers(0, 2)),
            st.tuples(st.just("pin"), st.integers(0, 2), st.integers(0, 2)),
            st.just(("crash",)),
        ),
        max_size=40,
    ),
)
def test_what_is_restorable_is_always_the_newest_that_everybody_committed(ranks, events):
    job = Twin(ranks)
    for event, *where in events:
        if where and where[0] >= ranks:
            continue
        getattr(job, event)(*where)
        found = [usable(s, "s") for s in job.slots]
        assert catalog.restorable(found) == job.recoverable()
        for slots in job.slots:  # one identity, one slot
            names = [s.identity for s in slots if s.state is SlotState.COMMITTED]
            assert len(names) == len(set(names))
    job.crash()


def test_shards_are_combined_under_one_identity_only():
    a, b, c = Identity(1, 1, 1), Identity(1, 1, 2), Identity(1, 2, 1)
    assert catalog.restorable([{a, b}, {a}]) == a
    assert catalog.restorable([{b}, {c}]) is None and catalog.restorable([]) is None
    assert catalog.restorable([{a, b}, {a, b}], refused={b}) == a
    views = [SlotView("own", 0, SlotState.COMMITTED, b), SlotView("common", 0, SlotState.COMMITTED, a)]
    assert usable(views, "own", "common") == set() and usable(views, "own") == {b}
    assert usable(views, "own", "absent") == set()


def holdings(*machines):
    """A rank on each machine: its name, and what it holds under which identities (besides "common")."""
    return [Holding(name, (f"rank-{rank:05d}", "common"), held) for rank, (name, held) in enumerate(machines)]


def test_ranks_on_other_machines_than_their_shards_are_told_where_these_are():
    old, new = Identity(1, 1, 61), Identity(1, 1, 62)
    a = {"rank-00000": {old, new}, "common": {old, new}}
    b = {"rank-00001": {new}, "common": {new}}
    swapped = holdings(("h1", b), ("h0", a))
    assert catalog.restorable([rank.usable() for rank in swapped]) is None
    assert catalog.steps_in_memory(swapped) == 62
    assert catalog.explain(swapped) == (
        "of snapshot 1-1-62 rank 0 on h1 lacks shard rank-00000, which is on h0; "
        "rank 1 on h0 lacks shard rank-00001, which is on h1"
    )
    right = holdings(("h0", a), ("h1", b))
    assert catalog.restorable([rank.usable() for rank in right]) == new


def test_a_replaced_machine_is_named():
    new = Identity(1, 1, 62)
    replaced = holdings(("h0", {"rank-00000": {new}, "common": {new}}), ("h2", {}))
    assert catalog.explain(replaced) == (
        "of snapshot 1-1-62 rank 1 on h2 lacks shard rank-00001, which is on no machine of this job; "
        "rank 1 on h2 lacks shard common, which is on h0"
    )
    gone = holdings(("h0", {}), ("h1", {"rank-00001": set()}))
    assert catalog.steps_in_memory(gone) == 0 and "holds no snapshot" in catalog.explain(gone)
    apart = holdings(("h0", {"rank-00000": {new}}), ("h1", {"rank-00001": {Identity(1, 2, 1)}}))
    assert (
        "of snapshot 1-2-1 rank 0 on h0 lacks shard rank-00000, which is on no machine of this job"
        in catalog.explain(apart)
    )
