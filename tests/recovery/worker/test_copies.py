"""A worker's part in the copies: which answers of its helpers reach the root. The helpers are lists of what they were told."""

from __future__ import annotations

import selectors
from dataclasses import replace

import pytest

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.errors import ClusterError
from gemini_gnn.recovery import board, messages
from gemini_gnn.recovery.messages import (
    Alive,
    AskCheckpoints,
    Begin,
    Checkpoints,
    Fetched,
    ListCheckpoints,
    Load,
    Peer,
    Persist,
    PersistAt,
    Persisted,
    Replicate,
    Stored,
    Survey,
)
from gemini_gnn.recovery.worker.copies import LIST_S, LOAD_S, Copies, address_towards
from gemini_gnn.recovery.worker.journal import Journal
from tests.recovery.arenas import JOB, arena_folder, step


class Fake:
    """A helper: ``told``, and what it ``says`` next."""

    def __init__(self):
        self.told, self.says, self.given_up = [], [], []

    def send(self, order):
        self.told.append(order)

    def give_up(self, *kinds):
        self.given_up += kinds

    def look(self, now):
        said, self.says = self.says, []
        return said

    def close(self):
        pass


@pytest.fixture
def copies(tmp_path):
    """Of the second of two machines, with ``root``, the list of what the root is told."""
    place = Place(1, 2, 0, 1, "h1", "127.0.0.1", 1, "plain")
    request = messages.Register(
        place, "m:f", {}, [], "auto", RecoveryConfig(), SnapshotConfig(), FaultsConfig(), 60.0,
        0, 0.0, {}, "/", [], [], [0], "launch", 7,
    )  # fmt: skip
    journal, root = Journal(tmp_path, "h1"), []
    with arena_folder() as folder, selectors.DefaultSelector() as selector:
        made = Copies(folder, JOB, request, "127.0.0.1", b"t" * 32, journal, selector, root.append)
        made.root, made.replicator, made.persister = root, Fake(), Fake()
        yield made
        made.close()
    assert journal.close(5.0)


def hear(copies, helper, *answers, now=0.0):
    """What the root is told of these answers."""
    del copies.root[:]
    helper.says += answers
    copies.look(now)
    return list(copies.root)


def test_a_visitors_look_at_storage_does_not_take_the_answer_from_the_planning(copies):
    copies.obey(AskCheckpoints(5), None, 0.0)
    copies.obey(AskCheckpoints(6), None, 1.0)
    found = [("rank-00001", step(7))]
    answer = Checkpoints([step(7)], [["rank-00001"]])
    assert hear(copies, copies.persister, answer) == [Stored(5, found), Stored(6, found)]
    assert hear(copies, copies.persister, answer) == []


def test_storage_that_does_not_answer_is_waited_for_once_per_ask(copies):
    copies.obey(AskCheckpoints(5), None, 0.0)
    copies.obey(AskCheckpoints(6), None, 1.0)
    assert hear(copies, copies.persister, now=LIST_S) == []
    (late,) = hear(copies, copies.persister, now=LIST_S + 0.5)
    assert late.number == 5 and "has not answered" in late.problem
    assert [one.number for one in hear(copies, copies.persister, now=LIST_S + 1.5)] == [6]
    copies.obey(AskCheckpoints(7), None, 50.0)
    assert copies.persister.told == [ListCheckpoints(), ListCheckpoints()]


def test_only_the_snapshot_that_is_wanted_now_counts_as_persisted(copies):
    """A slow storage may answer for one that was given up: for that of the last generation, or for that before the end."""
    copies.obey(PersistAt(7), None, 0.0)
    copies.obey(Persist(step(7), ["rank-00001"]), None, 0.0)
    copies.obey(Persist(step(9), ["rank-00001"]), None, 1.0)
    assert hear(copies, copies.persister, Persisted(step(7))) == []
    assert hear(copies, copies.persister, Persisted(step(9))) == [Persisted(step(9))]
    copies.obey(PersistAt(0), None, 2.0)
    assert hear(copies, copies.persister, Persisted(step(9))) == []


def test_a_fresh_start_copies_nothing_of_an_earlier_generation(copies):
    """Trainers killed in their first capture leave a snapshot on some machines. Its copies would never become recoverable,
    and the next one waits for that."""
    peers = [Peer("h0", "127.0.0.1", 1)]
    begin = Begin(3, 2, 2, [1], "127.0.0.1", 1, "auto", replicas=2, peers=peers, kept=[0])
    copies.begin(begin, 3, None)
    (order,) = copies.replicator.told
    assert isinstance(order, Replicate) and order.since == (3, 2, 0)
    copies.begin(
        Begin(3, 3, 2, [1], "127.0.0.1", 1, "auto", restore=step(7), replicas=2, peers=peers, kept=[0]), 3, None
    )
    assert copies.replicator.told[-1].since == step(7)


def test_a_checkpoint_that_does_not_come_is_answered_for_and_what_moves_is_waited_for(copies):
    copies.obey(Load(5, step(7), ["rank-00001"]), None, 0.0)
    assert hear(copies, copies.persister, Alive(), now=LOAD_S) == []
    assert hear(copies, copies.persister, now=2 * LOAD_S) == [] and copies.persister.given_up == []
    ((number, (miss,)),) = [(one.attempt, one.misses) for one in hear(copies, copies.persister, now=2 * LOAD_S + 1)]
    assert (number, miss.shard, miss.identity, copies.persister.given_up) == (5, "rank-00001", step(7), [Load])
    assert "has not moved a byte" in miss.text
    copies.obey(Load(6, step(6), ["rank-00001"]), None, 200.0)
    assert hear(copies, copies.persister, Fetched(6, []), now=201.0) == [Fetched(6, [])]
    assert hear(copies, copies.persister, now=900.0) == []


def test_before_a_planning_nothing_writes_into_the_arena_from_storage(copies):
    """A machine was lost while another loaded a checkpoint: the planning is begun anew, perhaps with a better snapshot."""
    copies.obey(Load(5, step(7), ["rank-00001"]), None, 0.0)
    copies.obey(Survey(6), None, 1.0)
    assert copies.persister.given_up == [Load, Persist]
    assert hear(copies, copies.persister, now=900.0) == []


def test_a_machine_without_a_way_to_the_first_one_says_so():
    with pytest.raises(
        ClusterError, match="no way to the first machine, MASTER_ADDR=255.255.255.255: Permission denied"
    ):
        address_towards("255.255.255.255")  # the kernel permits nobody to connect there


def test_ranks_of_one_machine_that_hold_different_snapshots_are_late_not_broken(copies):
    copies._ranks = [2, 3]
    copies.obey(PersistAt(7), None, 0.0)
    page = board.Board(1, 1, 9, 0, board.Phase.STEP, 0.0, 0, 0.0)
    boards = [replace(page, held=step(7)), replace(page, held=step(8))]
    copies.look_at_held(boards[:1])
    assert copies.root == [], "the other has not held one yet"
    copies.look_at_held(boards)
    copies.look_at_held(boards)
    assert copies.root == [Persisted(None)]
