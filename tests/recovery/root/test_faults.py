"""Which machine commits a fault, when, and the answers; no processes."""

from __future__ import annotations

import selectors
import socket
from dataclasses import replace

import pytest

from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import injection
from gemini_gnn.faults.schedule import parse_command
from gemini_gnn.recovery import messages
from gemini_gnn.recovery.board import Board, Phase
from gemini_gnn.recovery.root import state as job
from gemini_gnn.recovery.root.faults import Agent, Faults, check_able, machine_of, reads_orders
from gemini_gnn.recovery.root.ledger import Ledger
from gemini_gnn.recovery.root.restoring import Storage
from gemini_gnn.recovery.root.service import Root
from gemini_gnn.recovery.worker.journal import Journal

HERE = job.Machine(here=True, ready=True)
STATE = job.State(
    (replace(HERE, name="h0.lab"), replace(HERE, name="h1.lab")),
    (0, 1),
    2,
    phase=job.Phase.RUNNING,
    generation=1,
    alive=frozenset(range(4)),
    listening=frozenset({0, 1, 3}),
)


def fault(text):
    return parse_command(text.split())


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        ("kill-root", 0),
        ("kill-rank 1", 0),
        ("stop-rank 2", 1),
        ("kill-agent rank:3", 1),
        ("kill-warm h1", 1),
        ("cut-link h1.lab for 2 s", 1),
    ],
)
def test_the_machine_of_a_fault(text, machine):
    assert machine_of(fault(text), STATE) == machine


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kill-rank 4", "from 0 to 3"),
        ("kill-agent rank:4", "from 0 to 3"),
        ("kill-agent h2", "one of the job's machines, h0.lab, h1.lab"),
    ],
)
def test_a_target_that_the_job_does_not_have(text, words):
    with pytest.raises(ConfigError, match=words):
        machine_of(fault(text), STATE)


def test_two_machines_of_one_name_are_told_apart_by_the_whole():
    state = replace(STATE, machines=(replace(HERE, name="h1.a"), replace(HERE, name="h1.b")))
    assert machine_of(fault("kill-warm h1.b"), state) == 1
    with pytest.raises(ConfigError, match=r"h1\.a, h1\.b"):
        machine_of(fault("kill-warm h1"), state)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("kill-warm h1", {"phase": job.Phase.ENDED}, "the job has ended"),
        ("kill-rank 2", {"machines": (STATE.machines[0], replace(STATE.machines[1], here=False))}, "h1.lab is away"),
        ("kill-rank 2", {"alive": frozenset({0})}, "rank 2 has no trainer now .the job is running"),
        ("raise-rank 2", {}, "rank 2 reads no orders"),
    ],
)
def test_what_cannot_be_done_now(text, changes, words):
    state = replace(STATE, **changes)
    with pytest.raises(ConfigError, match=words):
        check_able(fault(text), machine_of(fault(text), state), state)
    check_able(fault("kill-rank 0"), 0, STATE)


def test_trainers_do_what_no_signal_does():
    ordered = ["raise-rank 1", "oom-rank 1", "hang-collective 1", "kill-rank 1 in backward", "stop-rank 1 in forward"]
    assert all(reads_orders(fault(text)) for text in ordered)
    assert not any(reads_orders(fault(text)) for text in ("kill-rank 1", "stop-rank 1", "kill-agent h1", "kill-root"))


# --- orders and answers -------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "events").mkdir()
    journal, channels = Journal(tmp_path, "h0"), []

    def end(expects):
        here, there = socket.socketpair()
        channels.extend((messages.Channel(here, expects), messages.Channel(there, expects)))
        return channels[-2], channels[-1]

    def make(**settings):
        return Faults(FaultsConfig(**settings), 4, tmp_path, journal)

    workers = [end(messages.TO_WORKER) for _ in range(2)]
    agents = {number: Agent(ours, 100 + number) for number, (ours, _) in enumerate(workers)}
    yield make, agents, [theirs for _, theirs in workers], end((messages.Committed,)), tmp_path
    for channel in channels:
        channel.close()


def board(step, phase=Phase.FORWARD, generation=1):
    return Board(1, generation, step, 0, phase, 0.0, 9, 0.1)


def test_the_answer_of_the_worker_goes_to_the_visitor_who_asked(parts):
    make, agents, workers, (visitor, person), _ = parts
    faults = make()
    faults.ask("kill-rank 3", visitor, STATE, agents)
    (order,) = workers[1].receive()
    assert str(order.fault) == "kill-rank 3" and workers[0].receive() == [] and person.receive() == []
    faults.answered(messages.Committed(order.ask, True, "SIGKILL to rank 3"))
    assert person.receive() == [messages.Committed(0, True, "SIGKILL to rank 3")]
    faults.answered(messages.Committed(order.ask, True, "again"))
    assert person.receive() == []


def test_a_visitor_hears_of_a_worker_that_is_lost_and_of_the_death_of_an_agent(parts):
    make, agents, workers, (visitor, person), _ = parts
    faults = make()
    faults.ask("kill-warm h1", visitor, STATE, agents)
    faults.lost(0, "h0")
    assert person.receive() == []
    faults.lost(1, "h1")
    (answer,) = person.receive()
    assert not answer.done and "h1 was gone before it answered" in answer.text
    faults.ask("kill-agent h1", visitor, STATE, agents)
    assert person.receive() == [messages.Committed(0, True, "SIGKILL to the worker agent, pid 101 on h1.lab")]
    faults.lost(1, "h1")
    assert person.receive() == [] and len(workers[1].receive()) == 2


def test_a_visitor_is_refused_in_words(parts):
    make, agents, workers, (visitor, person), _ = parts
    for text, words in (
        ("nonsense", "expected one of"),
        ("stop-rank 1", "faults.allow=true"),
        ("kill-rank 9", "0 to 3"),
    ):
        make().ask(text, visitor, STATE, agents)
        (answer,) = person.receive()
        assert not answer.done and words in answer.text
    assert workers[0].receive() == workers[1].receive() == []


def test_the_schedule_waits_for_its_step_and_its_machine_and_strikes_once(parts):
    make, agents, workers, _, run_dir = parts
    settings = {"at": ["kill-agent h1 @ step 5", "kill-rank 1 @ step 1", "kill-root @ 30 s"]}
    faults = make(**settings)
    assert faults.look([board(9, Phase.START_UP)], STATE, agents) == [] and not (run_dir / "faults").exists()
    assert faults.look([board(9, generation=0)], STATE, agents) == [], "of trainers that are gone"
    faults.look([board(4)], STATE, agents, 0.0)
    faults.look([board(5)], STATE, {0: agents[0]}, 0.0)
    assert workers[0].receive() == workers[1].receive() == [] == list((run_dir / "faults").glob("kill*"))
    faults.look([board(6)], STATE, agents, 0.0)
    assert [str(order.fault) for order in workers[1].receive()] == ["kill-agent h1 @ step 5"]
    faults.look([board(7)], STATE, agents, 31.0)
    assert [str(order.fault) for order in workers[0].receive()] == ["kill-root @ 30 s"]
    again = make(**settings)
    again.look([board(8)], STATE, agents, 40.0)
    assert workers[0].receive() == workers[1].receive() == []
    assert injection.committed(run_dir) == {"begun", "kill-agent-h1-step-5.1", "kill-root-30-s.1"}


def test_a_machine_of_the_schedule_that_does_not_exist_is_said_once(parts):
    make, agents, *_ = parts
    faults = make(at=["kill-agent h7 @ step 1"])
    assert "h7" in faults.look([board(2)], STATE, agents)[0]
    assert faults.look([board(2)], STATE, agents) == []


def test_a_run_directory_that_is_lost_ends_the_faults_and_not_the_job(parts, monkeypatch):
    make, agents, workers, *_ = parts
    faults = make(at=["kill-agent h1 @ step 5"])

    def refuse(*_args, **_details):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(injection, "claim", refuse)
    (said,) = faults.look([board(6)], STATE, agents, 0.0)
    assert "faults: No space left on device" in said and workers[1].receive() == []
    assert faults.look([board(7)], STATE, agents, 1.0) == []


# --- visitors of the root -----------------------------------------------------------------------------------------------


def test_a_visitor_may_wait_for_longer_than_a_worker_may_be_silent(tmp_path):
    (tmp_path / "events").mkdir()
    journal = Journal(tmp_path, "h0")
    root = Root(
        term=1,
        start="start",
        beats=None,
        state=job.forming(1, 2),
        settings=RecoveryConfig(),
        resume="auto",
        launched=(2, 2),
        record={},
        address="127.0.0.1",
        token=b"",
        listener=None,
        ledger=Ledger(1, [], None),
        journal=journal,
        faults=Faults(FaultsConfig(), 2, tmp_path, journal),
        snapshot=SnapshotConfig(),
        storage=Storage.NEVER,
        selector=selectors.DefaultSelector(),
        now=0.0,
    )
    ours, theirs = socket.socketpair()
    person = messages.Channel(theirs, messages.TO_SLOT)
    root.visit(messages.Channel(ours, messages.TO_AGENT), messages.Inject("kill-rank 0"), 0.0)
    (answer,) = person.receive()
    assert not answer.done and "machine 1 is away" in answer.text
    silent = root.local_end(0.0)
    for tick in range(41):
        root.tick(tick / 2)
    assert len(root.links) == 1, "20 s later: one that never said what it is has gone"
    assert silent.receive() == []
    (visitor,) = root.close()
    visitor.send(messages.Ended("stopped", 143, "launch/stop.py"))
    assert [type(one) for one in person.receive()] == [messages.Ended]
    visitor.close()
    person.close()
    silent.close()
