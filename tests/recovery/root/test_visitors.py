"""A visitor that asks for the catalog of a job is in nobody's way."""

import pytest

from gemini_gnn.recovery import messages
from gemini_gnn.recovery.root.copies import VISIT_S
from gemini_gnn.snapshot.store.identity import Identity
from tests.recovery.root.test_service import root

__all__ = ["root"]  # the fixture: two machines of two ranks each

SHARDS = [(f"rank-0000{rank}", Identity(1, 1, step)) for step in (5, 6, 7) for rank in range(4)]


@pytest.fixture
def asked(root, tmp_path):
    """What the machines are asked, in order: machine and message."""
    (tmp_path / "events").mkdir(exist_ok=True)  # a journal may have made it
    root.copies.peers = {machine: messages.Peer(f"h{machine}", f"10.0.0.{machine}", 9) for machine in (0, 1)}
    found = []
    root.copies.send = lambda machine, message: found.append((machine, message))
    return found


@pytest.fixture
def visitor():
    theirs, here = messages.pair(messages.TO_ROOT)
    here = messages.Channel(here, messages.TO_SLOT)
    yield theirs, here
    theirs.close()
    here.close()


def number_of(asked, machine, kind):
    (number,) = [vars(message).get("number") for to, message in asked if to == machine and isinstance(message, kind)]
    return number


def test_a_planning_gets_its_own_answers_while_a_visitor_waits_for_storage(root, asked, visitor):
    """Machine 0 has all shards, machine 1 none. Two of three copies that it fetches turn out damaged."""
    copies = root.copies
    assert not copies.plan([0, 1])
    copies.inspect(visitor[0], [0, 1], 0.0)
    for machine, shards in ((0, SHARDS), (1, [])):
        assert not copies.hear(machine, messages.Holds(number_of(asked, machine, messages.Look), shards), 0.0)
        assert not copies.hear(machine, messages.Holds(number_of(asked, machine, messages.Survey), shards), 0.0)
    for step in (7, 6, 5):
        machine, fetch = asked[-1]
        assert machine == 1 and {(one.shard, one.identity.step) for one in fetch.wanted} == {
            ("rank-00002", step),
            ("rank-00003", step),
        }
        damaged = [messages.Miss(*wanted, "h0", True, "damaged") for wanted in SHARDS if wanted[1].step == step > 5]
        over = copies.hear(1, messages.Fetched(fetch.attempt, damaged), 0.0)
    assert over and copies.identity == Identity(1, 1, 5)
    copies.answer_visitors(0.0)
    assert not visitor[1].receive(), "storage is still waited for"
    copies.hear(0, messages.Stored(number_of(asked, 0, messages.AskCheckpoints), []), 0.0)
    copies.answer_visitors(0.0)
    (said,) = visitor[1].wait(1.0)
    assert "yes, chosen      h1 gets rank-00002 from h0, h1 gets rank-00003 from h0" in said.snapshots
    assert (said.replicas, said.silent) == (2, [])


def test_a_visitor_hears_of_machines_that_are_away_or_say_nothing(root, asked, visitor):
    copies = root.copies
    copies.inspect(visitor[0], [0], 0.0)
    assert [(machine, type(message)) for machine, message in asked] == [
        (0, messages.Look),
        (0, messages.AskCheckpoints),
    ]
    copies.answer_visitors(VISIT_S)
    assert not visitor[1].receive(), "it is still waited for"
    copies.answer_visitors(VISIT_S + 0.1)
    (said,) = visitor[1].wait(1.0)
    assert said.silent == ["h0", "h1"] and said.snapshots.startswith("no snapshot")
    assert not copies.hear(0, messages.Holds(number_of(asked, 0, messages.Look), SHARDS), 9.0), "nobody's any more"
