"""Captures of a job whose shards have copies on peers: what is overwritten when, what is held, what is waited for.

No agent runs here: ``Peers`` says what the agents would.
"""

import logging
import os
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_gnn.errors import DamagedSnapshot, SnapshotError
from gemini_gnn.observe.errors import is_consequence
from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.capture import snapshots as capturing
from gemini_gnn.snapshot.store import arena
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import Identity
from tests.ranks import run_ranks
from tests.snapshot.plain_training import arena_folder, context_of, parts, slots_of, step


@pytest.fixture
def folder():
    with arena_folder() as path:
        yield path


class Peers:
    """What the agents tell a trainer, and hear from it.

    Attributes:
        at_once: what is committed has its copies at once.
        recoverable: newest snapshot with all its copies. persist_at: as in ``Context``. held: all that was told as held.
    """

    def __init__(self, replicas=2):
        self.replicas, self.at_once, self.newest = replicas, True, None
        self.recoverable, self.persist_at, self.held = None, 0, []

    def committed(self, *identity):
        self.newest = Identity(*identity)
        if self.at_once:
            self.recoverable = self.newest

    def context(self, folder, **options):
        return replace(
            context_of(folder, **options),
            replicas=self.replicas,
            committed=self.committed,
            recoverable=lambda: self.recoverable,
            persist_at=lambda: self.persist_at,
            hold=lambda *identity: self.held.append(identity),
        )


def kept(folder):
    return [number for number, _ in slots_of(folder, "rank-00000")]


def steps(snapshots, training, numbers):
    """Steps of which each is copied before the next; which of them were captured."""
    captured = []
    for number in numbers:
        before = snapshots.stats.captures
        step(*training)
        snapshots.wait()
        captured += [number] * (snapshots.stats.captures - before)
    return captured


def test_only_a_snapshot_older_than_the_recoverable_one_is_overwritten(folder):
    training, peers = parts(), Peers()
    with closing(attach(training, context=peers.context(folder))) as snapshots:
        peers.at_once = False
        assert steps(snapshots, training, range(1, 6)) == [1, 2], "0 is all that a lost machine would leave"
        assert kept(folder) == [0, 1, 2] and snapshots.stats.skipped == 3 and snapshots.recoverable == (1, 1, 0)
        peers.recoverable = Identity(1, 1, 1)
        assert steps(snapshots, training, range(6, 9)) == [6] and kept(folder) == [1, 2, 6]
        peers.recoverable = Identity(1, 1, 6)
        assert steps(snapshots, training, range(9, 12)) == [9, 10] and kept(folder) == [6, 9, 10]


def test_after_a_restore_nothing_is_overwritten_before_it_has_its_copies_again(folder):
    training, peers = parts(), Peers()
    with closing(attach(training, context=peers.context(folder))) as snapshots:
        steps(snapshots, training, range(1, 4))
    training, peers = parts(), Peers()
    peers.at_once = False
    with closing(attach(training, context=peers.context(folder, generation=2))) as snapshots:
        assert snapshots.restored == (1, 1, 3) and snapshots.recoverable is None
        assert steps(snapshots, training, range(4, 6)) == [] and kept(folder) == [1, 2, 3]
        peers.recoverable = snapshots.restored
        assert steps(snapshots, training, range(6, 9)) == [6, 7]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["step", "copied", "persist", "release"]), max_size=30), st.sampled_from([1, 2]))
def test_the_recoverable_and_the_held_snapshot_are_always_there(events, replicas):
    with arena_folder() as folder:
        training, peers = parts(), Peers(replicas)
        with closing(attach(training, context=peers.context(folder))) as snapshots:
            peers.at_once = False
            for event in events:
                if event == "step":
                    steps(snapshots, training, [1])
                elif event == "copied":
                    peers.recoverable = peers.newest
                elif event == "persist":
                    peers.persist_at = peers.persist_at or snapshots.steps + 1
                else:
                    peers.persist_at = 0
                there = kept(folder)
                assert peers.newest.step in there
                assert replicas == 1 or peers.recoverable.step in there
                held = [number for _, _, number in peers.held if 0 < peers.persist_at <= number]
                assert len(held) <= 1 and set(held) <= set(there)


def test_a_held_slot_is_no_way_round_a_pinned_one(folder):
    training, peers = parts(), Peers(replicas=1)
    peers.persist_at = 1
    with closing(attach(training, context=peers.context(folder))) as snapshots:
        assert steps(snapshots, training, [1, 2]) == [1, 2] and peers.held == [(1, 1, 1)]
        (_, oldest), *_ = slots_of(folder, "rank-00000")
        assert oldest.lock(exclusive=False), "somebody reads the snapshot of step 0"
        assert steps(snapshots, training, [3]) == [] and kept(folder) == [0, 1, 2]
        peers.persist_at = 0
        assert steps(snapshots, training, [4]) == [4] and kept(folder) == [0, 2, 4]
        oldest.close()


def counted(folder, replicas, lag, asked):
    """Captures of 60 steps, where copies take ``lag`` steps; from step 20 to 50 a snapshot is held, if it is ``asked``."""
    training, peers = parts(), Peers(replicas)
    with closing(attach(training, context=peers.context(folder))) as snapshots:
        peers.at_once = False
        sending = None  # one snapshot at a time, in order
        sent, queue = {0}, []
        for number in range(1, 61):
            peers.persist_at = 20 if asked and 20 <= number < 50 else 0
            if steps(snapshots, training, [number]):
                queue.append(number)
            if sending is None and queue:
                sending = queue.pop(0), number + lag
            if sending is not None and sending[1] <= number:
                sent.add(sending[0])
                peers.recoverable, sending = Identity(1, 1, sending[0]), None
        return snapshots.stats.captures, peers.held


@pytest.mark.parametrize(
    ("replicas", "lag", "free", "held"), [(1, 0, 61, 61), (2, 0, 61, 61), (2, 1, 32, 32), (2, 5, 12, 12)]
)
def test_what_a_hold_costs(folder, replicas, lag, free, held):
    """Captures out of 61, without and with a hold of 30 steps."""
    without, _ = counted(folder, replicas, lag, asked=False)
    arena.remove(folder)
    beside, told = counted(folder, replicas, lag, asked=True)
    print(f"{replicas} replicas, copies take {lag} steps: {without} captures without a hold, {beside} with it")
    assert (without, beside) == (free, held)
    assert len(told) == 1 and told[0][2] >= 20


def test_training_begins_when_its_first_snapshot_has_its_copies(folder):
    peers = Peers()
    peers.at_once = False
    waits = threading.Event()

    class Slow(Peers):
        """The copies arrive when they are waited for."""

        def context(self, folder, **options):
            return replace(super().context(folder, **options), recoverable=self.look)

        def look(self):
            if waits.is_set():
                return self.newest
            if self.newest is not None:
                waits.set()
            return None

    with closing(attach(parts(), context=Slow().context(folder))) as snapshots:
        assert waits.is_set() and snapshots.recoverable == (1, 1, 0)
    with pytest.raises(
        SnapshotError,
        match=r"first snapshot 1-1-0 on 2 machines within 0 s; .*logs/agent-\*\.log names the two machines.*firewall",
    ):
        attach(parts(), context=peers.context(folder, resume="never"), timeout_s=0.2)


def test_an_orderly_stop_is_not_kept_waiting_by_copies(folder, monkeypatch):
    """Of the last step they may be missing, not of those that a free slot depends on."""
    monkeypatch.setattr(capturing, "FINAL_COPIES_S", 0.1)
    training, peers = parts(), Peers()
    with closing(attach(training, context=peers.context(folder), every=10, timeout_s=0.3)) as snapshots:
        peers.at_once = False
        steps(snapshots, training, [1])
        snapshots.final(1)
        assert snapshots.last == (1, 1, 1) and snapshots.recoverable == (1, 1, 0)
        steps(snapshots, training, [2])
        snapshots.final(2)
        with pytest.raises(
            SnapshotError, match=r"copies to peers were not done: 1-1-0 is the newest .* resumes from 1-1-2"
        ):
            snapshots.final(3)


def one_rank_late_case(rank, world, root):
    """Copies of one rank's shards are late: no rank captures, and none waits for another."""
    training, peers = parts(), Peers()
    with closing(attach(training, context=peers.context(Path(root) / "job", rank=rank, world=world))) as snapshots:
        peers.at_once = rank == 0
        for number in range(1, 6):
            step(*training)
            snapshots.wait()
            torch.distributed.barrier()
            assert snapshots.stats.captures == 1 + min(number, 2)
        peers.at_once, peers.recoverable = True, Identity(1, 1, 2)
        step(*training)
        assert snapshots.stats.captures == 4 and snapshots.stats.skipped == 3


def no_copies_on_one_rank_case(rank, world, root):
    """What one rank waits for in vain ends the start on all, with the same words."""
    peers = Peers()
    peers.at_once = rank == 0
    with pytest.raises(SnapshotError, match="copies did not arrive"):
        attach(parts(), context=peers.context(Path(root) / "job", rank=rank, world=world), timeout_s=1.0)


@pytest.fixture
def root():
    with arena_folder() as path:
        yield str(arena.make_folder(path))


@pytest.mark.parametrize("case", [one_rank_late_case, no_copies_on_one_rank_case])
def test_on_two_ranks(case, root):
    run_ranks(case, 2, root, timeout_s=60)


def test_the_automatic_interval_is_kept_and_said(folder, caplog):
    """Of a failure a year (31 Ms) and any cost, the next snapshot is not due within this test."""
    caplog.set_level(logging.INFO)
    training, peers = parts(), Peers()
    with closing(attach(training, context=peers.context(folder), every="auto", mtbf_s=31e6)) as snapshots:
        assert steps(snapshots, training, range(1, 20)) == [1, 2, 3]
        assert snapshots.stats.skipped == 0, "it was not due"
        (said,) = caplog.messages[-1:]
        assert "a failure is expected every 31000000 s; it is on its peers after" in said
        snapshots.final(19)
        assert snapshots.last == (1, 1, 19)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": "often"}, {"every": "auto", "mtbf_s": 0}])
def test_an_impossible_interval_is_refused(folder, options):
    with pytest.raises(SnapshotError, match="expected"):
        attach(parts(), context=context_of(folder), **options)


def keeps(root, rank, generation, peers):
    """One rank on each of two machines, which keep each other's shards."""
    here = peers.context(Path(root) / f"h{rank}", generation=generation, rank=rank, world=2)
    return replace(here, local_rank=0, local_world_size=1, kept=(1 - rank,))


def kept_case(rank, world, root):
    """A machine reserves two slots for each shard it keeps, of the size its owner has; it was an owner once."""
    folder, own, other = Path(root) / f"h{rank}", f"rank-{rank:05d}", f"rank-{1 - rank:05d}"
    arena.make_folder(folder)
    foreign = folder / "rank-00007.2"
    foreign.write_bytes(b"of a machine that is away")

    def begin(generation):
        module, optimizer = parts(seed=rank, width=5 + 500 * rank)
        attach((module, optimizer), context=keeps(root, rank, generation, Peers())).close()
        torch.distributed.barrier()

    begin(1)
    slots = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(slots) == {f"{own}.{i}" for i in range(3)} | {f"{other}.{i}" for i in range(2)} | {foreign.name}
    assert slots[f"{other}.0"] == slots[f"{other}.1"] == (Path(root) / f"h{1 - rank}" / f"{other}.0").stat().st_size
    assert slots[f"{other}.0"] != slots[f"{own}.0"]
    torch.distributed.barrier()

    (_, newest), *_ = slots_of(folder, own)
    for slot, number in enumerate((3, 4, 5)):  # as of an owner that committed these steps
        with closing(arena.SlotFile(folder, other, slot, create=True)) as file:
            identity = Identity(1, 1, number)
            file.write_header(replace(newest.header(), identity=identity, shard=other, slot=slot, structure=bytes(16)))
    newest.close()
    torch.distributed.barrier()
    begin(2)
    assert (folder / f"{other}.2").exists(), "the newest copy on this machine"
    with closing(arena.SlotFile(folder, other, 0)) as file:
        file.write_header(replace(file.header(), identity=Identity(1, 2, 6)))
    begin(3)
    assert not (folder / f"{other}.2").exists() and (folder / f"{other}.1").exists()
    assert foreign.read_bytes() == b"of a machine that is away"


def damaged_case(rank, world, root):
    """What one rank finds damaged is void before anybody hears of it; all end together and may begin again."""
    folder, peers = Path(root) / f"h{rank}", Peers()
    training = parts(seed=rank)
    with closing(attach(training, context=keeps(root, rank, 1, peers))) as snapshots:
        steps(snapshots, training, [1])
        torch.distributed.barrier()
        steps(snapshots, training, [2])
    torch.distributed.barrier()
    _, file = slots_of(folder, f"rank-{rank:05d}")[-1]
    good = file.path.read_bytes()
    if rank == 1:
        with open(file.path, "r+b") as raw:
            raw.seek(4096)
            raw.write(b"damage")
    torch.distributed.barrier()
    with pytest.raises(DamagedSnapshot) as caught:
        attach(parts(seed=rank), context=keeps(root, rank, 2, peers))
    path = Path(root) / "h1" / "rank-00001"
    assert str(caught.value).startswith(
        f"snapshot 1-1-2 cannot be restored from memory: rank 1 on {os.uname().nodename}: "
    )
    assert f"{path}." in str(caught.value) and "do not fit their checksum" in str(caught.value)
    assert "fetches a good copy" in str(caught.value) and caught.value.exit_code == 2
    assert is_consequence(caught.value), "the job goes on"
    assert file.header().state is (SlotState.VOID if rank == 1 else SlotState.COMMITTED)
    torch.distributed.barrier()
    if rank == 1:
        file.path.write_bytes(good)  # as the agents do
    file.close()
    torch.distributed.barrier()
    with closing(attach(parts(seed=rank), context=keeps(root, rank, 3, peers))) as snapshots:
        assert snapshots.restored == (1, 1, 2)


def too_small_case(rank, world, root):
    """The slots for others count: here they are what there is no room for."""
    room = arena.room
    arena.room = lambda where: replace(room(where), available=4_000_000)  # its own three slots have 3.2 MB
    with pytest.raises(SnapshotError, match=r"need 5\.\d MB more host memory on this machine, available are 4\.0 MB"):
        attach(parts(seed=rank), context=keeps(root, rank, 1, Peers()))


@pytest.mark.parametrize("case", [kept_case, damaged_case, too_small_case])
def test_on_two_machines(case, root):
    run_ranks(case, 2, root, timeout_s=60)


def test_the_memory_of_kept_shards_is_said(folder, caplog):
    caplog.set_level(logging.INFO)
    peers = Peers()
    attach(parts(), context=replace(peers.context(folder), kept=(0,))).close()
    (said,) = [words for words in caplog.messages if "host memory needed" in words]
    assert "3 slots of each own shard, 2 of each of 1 shards kept for other machines" in said
