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
from gemini_gnn.recovery.root.faults import Agent, Faults, check_able, machine_of, orders_of, reads_orders
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
        ("power-off h1", 1),
        ("corrupt-replica 2", 1),
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
        ("corrupt-replica 4", "from 0 to 3"),
        ("split h0 from h2", "one of the job's machines, h0.lab, h1.lab"),
        ("split h0 from rank:0", "on each side, and none on both"),
        ("split h0,h1 from others", "on each side, and none on both"),
    ],
)
def test_a_target_that_the_job_does_not_have(text, words):
    with pytest.raises(ConfigError, match=words):
        orders_of(fault(text), STATE)


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


def told(text, state):
    return [(machine, f"{order.target} from {order.others}") for machine, order in orders_of(fault(text), state)]


def test_each_machine_of_a_split_is_told_who_is_on_the_other_side():
    state = replace(STATE, machines=tuple(replace(HERE, name=f"h{i}") for i in range(4)), seats=(0, 1, 2, 3))
    sides = [(0, "h0,h3 from h1"), (3, "h0,h3 from h1"), (1, "h1 from h0,h3")]
    assert told("split h0,rank:7,h3 from h1", state) == sides
    away = replace(state, machines=(*state.machines[:2], replace(HERE, name="h2", here=False), state.machines[3]))
    assert told("split h0,h3 from others", away) == sides, "h2 is away"


def test_a_split_in_halves_follows_from_its_seed_and_from_those_that_are_there():
    state = replace(STATE, machines=tuple(replace(HERE, name=f"h{i}") for i in range(5)))
    halves = [told(f"split half:{seed} from others", state) for seed in range(30)]
    assert halves == [told(f"split half:{seed} from others", state) for seed in range(30)]
    assert {len(sides[0][1].partition(" ")[0].split(",")) for sides in halves} == {2}
    assert len({sides[0][1] for sides in halves}) > 5 and all(len(sides) == 5 for sides in halves)
    alone = replace(state, machines=(HERE, replace(HERE, here=False)))
    with pytest.raises(ConfigError, match="a machine or more on each side"):
        told("split half:1 from others", alone)


def test_a_file_system_hangs_on_one_machine_or_on_all():
    assert [machine for machine, _ in orders_of(fault("hang-filesystem for 2 s"), STATE)] == [0, 1]
    assert [machine for machine, _ in orders_of(fault("hang-filesystem h1 for 2 s"), STATE)] == [1]


def test_a_job_on_one_machine_has_no_copy_elsewhere():
    with pytest.raises(ConfigError, match="corrupt-replica 0: expected another machine that is here; h0.lab is alone"):
        orders_of(fault("corrupt-replica 0"), replace(STATE, machines=STATE.machines[:1]))


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


def test_a_visitor_hears_of_every_machine_of_a_split(parts):
    make, agents, workers, (visitor, person), _ = parts
    for done in (True, False):
        faults = make(allow=True)
        faults.ask("split h0 from h1", visitor, STATE, agents)
        (one,), (other,) = (worker.receive() for worker in workers)
        assert (str(one.fault), str(other.fault)) == (
            "split h0.lab from h1.lab for 10 s",
            "split h1.lab from h0.lab for 10 s",
        )
        faults.answered(messages.Committed(one.ask, True, "h0 did"))
        assert person.receive() == []
        faults.answered(messages.Committed(other.ask, done, f"h1 {'did' if done else 'may not'}"))
        assert person.receive() == [messages.Committed(0, done, f"h0 did; h1 {'did' if done else 'may not'}")]


def test_a_split_knows_the_addresses_by_which_the_root_reaches_the_machines(parts):
    make, agents, workers, (visitor, _), _ = parts
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname(), timeout=10, source_address=("127.0.0.2", 0))
        ours = messages.Channel(server.accept()[0], messages.TO_ROOT)
    make(allow=True).ask("split h0 from h1", visitor, STATE, {0: agents[0], 1: Agent(ours, 7)})
    assert [order.fault.others for order in workers[0].receive()] == ["h1.lab,127.0.0.2"]
    worker = messages.Channel(theirs, messages.TO_WORKER)
    assert [order.fault.others for order in worker.receive()] == ["h0.lab,127.0.0.1"]
    worker.close()
    ours.close()


def test_machines_are_asked_for_a_copy_one_after_the_other(parts):
    make, agents, workers, (visitor, person), _ = parts
    state = replace(STATE, machines=tuple(replace(HERE, name=f"h{i}") for i in range(4)))
    agents |= {2: agents[0], 3: agents[1]}
    for answers, said in (
        ([False, True], messages.Committed(0, True, "flipped")),
        ([False, False, False], messages.Committed(0, False, "none here; none here; none here")),
    ):
        faults, heard = make(allow=True), []
        faults.ask("corrupt-replica 3", visitor, state, agents)
        for done in answers:
            (order,) = [order for worker in workers for order in worker.receive()]
            heard.append(str(order.fault))
            assert person.receive() == []
            faults.answered(messages.Committed(order.ask, done, "flipped" if done else "none here"))
        assert person.receive() == [said] and set(heard) == {"corrupt-replica 3"}
        assert workers[0].receive() == workers[1].receive() == [], "one copy"


def test_a_machine_that_is_lost_is_not_asked_for_a_copy(parts):
    make, agents, workers, (visitor, person), _ = parts
    state = replace(STATE, machines=tuple(replace(HERE, name=f"h{i}") for i in range(3)))
    faults = make(allow=True)
    faults.ask("corrupt-replica 3", visitor, state, agents | {2: agents[0]})
    (order,) = workers[0].receive()
    faults.lost(2, "h2")
    faults.answered(messages.Committed(order.ask, False, "none here"))
    assert person.receive() == [messages.Committed(0, False, "none here")] and workers[0].receive() == []


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
