"""A worker's connection to its root: what it does when the root is silent, gone, old, or never comes. On a clock of its own."""

from __future__ import annotations

import math
import selectors

import pytest

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.observe import terms
from gemini_gnn.recovery import messages, wire
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.recovery.worker.succession import Route, Target
from gemini_gnn.recovery.worker.uplink import ATTEMPT_S, LATE_S, RETRY_S, UNREACHED_S, Lost, Uplink

JOIN = messages.Join(0, "h0", 7, 1, 1, True)
HERE, THERE = Target("h0", 1), Target("h1", 2)
WELCOME = messages.Welcome(3, 0.5, 2.0)


class Roots:
    """The other ends that an uplink has connected to, newest last, and where that was."""

    def __init__(self) -> None:
        self.ends: list[messages.Channel] = []
        self.targets: list[Target] = []

    def connect(self, address: str, port: int, expects, token: bytes) -> messages.Channel:
        here, there = messages.pair(messages.TO_ROOT)
        self.ends.append(here)
        self.targets.append(Target(address, port))
        return messages.Channel(there, expects)


@pytest.fixture
def looks(tmp_path, monkeypatch):
    """Makes an uplink that looks for its root by a route."""
    terms.make_run_dir(tmp_path)
    place = Place(0, 1, 0, 1, "h0", "127.0.0.1", 1, "plain")
    request = messages.Register(
        place, "m:f", {}, [], "auto", RecoveryConfig(wait_s=30.0), SnapshotConfig(), FaultsConfig(), 60.0,
        0, 0.0, {}, "/", [], [], [0], "launch", 7,
    )  # fmt: skip
    roots = Roots()
    monkeypatch.setattr(wire, "connect", roots.connect)
    with selectors.DefaultSelector() as selector:

        def make(route: Route, term: int = 0) -> Uplink:
            made = Uplink(request, b"", route, Journal(tmp_path, "h0"), selector, 0.0, term)
            made.roots = roots
            return made

        yield make
    for end in roots.ends:
        end.close()


@pytest.fixture
def uplink(looks):
    """Of a start: only the launcher's address is known."""
    return looks(Route(HERE, math.inf))


def look(uplink, *times):
    said = []
    for now in times:
        said += uplink.look(lambda: JOIN, now)
    return said


def welcomed(uplink, now: float, term: int = 3):
    look(uplink, now)
    uplink.roots.ends[-1].send(messages.Welcome(term, 0.5, 2.0))
    look(uplink, now)
    assert uplink.welcome is not None and uplink.term == term


def test_it_joins_first_and_tells_then(uplink):
    look(uplink, 0.0)
    uplink.tell(messages.Able(True))
    assert uplink.roots.ends[0].receive() == [JOIN, messages.Able(True)]
    welcomed(uplink, 0.1)
    uplink.roots.ends[0].send(messages.Close())
    assert look(uplink, 0.2) == [messages.Close()]


def test_a_root_that_is_silent_is_lost_and_the_uplink_is_over(uplink):
    welcomed(uplink, 0.0)
    look(uplink, 1.0, 1.9)
    assert uplink.welcome is not None and uplink.lost is None
    look(uplink, 2.1, 2.1 + RETRY_S)
    assert uplink.welcome is None and len(uplink.roots.ends) == 1
    assert uplink.lost == Lost("silent for 2.1 s", silent=True, heard_s=0.0)


def test_time_in_which_this_process_did_not_run_is_no_silence(uplink):
    welcomed(uplink, 0.0)
    look(uplink, 100.0)
    assert uplink.welcome is not None
    look(uplink, 100.1, 100.1 + LATE_S)
    assert uplink.welcome is None, "now it runs, and hears nothing"


def test_a_root_that_closes_is_gone_and_what_is_told_then_is_dropped(uplink):
    welcomed(uplink, 0.0)
    uplink.roots.ends[0].close()
    look(uplink, 0.1)
    assert uplink.welcome is None and not uplink.reaches_root
    assert uplink.lost == Lost("connection closed", silent=False, heard_s=0.0)
    uplink.tell(messages.Able(False))
    look(uplink, 0.1 + RETRY_S)
    assert len(uplink.roots.ends) == 1


@pytest.mark.parametrize(("address", "port"), [("", 0), ("h1", 2)])
def test_a_root_that_resigns_says_where_the_other_one_answers(uplink, address, port):
    welcomed(uplink, 0.0)
    uplink.roots.ends[0].send(messages.Moved(address, port))
    uplink.roots.ends[0].send(messages.Close())
    assert look(uplink, 0.1) == [], "its orders count no more"
    assert uplink.lost.moved == Target(address, port) and not uplink.lost.silent


def test_an_older_root_is_refused(looks):
    uplink = looks(Route(HERE, math.inf), term=3)
    look(uplink, 0.0)
    uplink.roots.ends[0].send(messages.Welcome(2, 0.5, 2.0))
    uplink.roots.ends[0].send(messages.Close())
    assert look(uplink, 0.1) == [] and uplink.welcome is None and uplink.term == 3 and uplink.lost is None
    look(uplink, 0.3)
    uplink.roots.ends[1].send(messages.Welcome(4, 0.5, 2.0))
    look(uplink, 0.4)
    assert uplink.term == 4 and uplink.welcome is not None


def test_a_standby_learns_of_a_new_term_from_the_roster(uplink):
    welcomed(uplink, 0.0, term=3)
    roster = messages.Roster(4, [], [0], 0, 2)
    uplink.roots.ends[0].send(roster)
    assert look(uplink, 0.1) == [roster] and uplink.term == 4


def test_those_before_this_machine_are_tried_each_for_a_moment_then_it_is_next(looks):
    route = Route(HERE, 0.0, (Target("h1", 2), Target("h2", 3)))
    uplink, now = looks(route, term=3), 0.0
    while not uplink.is_next:
        assert now < 5.0
        look(uplink, now)
        now += 0.05
    assert uplink.roots.targets == [Target("h1", 2), Target("h2", 3)]
    assert 2 * ATTEMPT_S < now < 2 * ATTEMPT_S + 0.6
    look(uplink, now, now + RETRY_S)
    assert uplink.roots.targets[-1] == HERE, "it goes on looking"


def test_a_machine_whose_kernel_does_not_answer_is_tried_for_a_shorter_time(looks, monkeypatch):
    uplink, now = looks(Route(HERE, 0.0, (THERE,)), term=3), 0.0
    monkeypatch.setattr(messages.Channel, "is_connected", False)
    while not uplink.is_next:
        assert now < 5.0
        look(uplink, now)
        now += 0.05
    assert uplink.roots.targets == [THERE]
    assert UNREACHED_S < now < UNREACHED_S + 0.3 < ATTEMPT_S


def test_where_a_connection_broke_the_lost_root_is_tried_alone_for_a_while(looks):
    uplink = looks(Route(HERE, 3.0, (THERE,)), term=3)
    for now in range(30):
        look(uplink, now / 10)
        uplink.roots.ends[-1].close()
        assert not uplink.is_next
    assert set(uplink.roots.targets) == {HERE}
    look(uplink, 3.05, 3.2)
    assert uplink.roots.targets[-1] == THERE


def test_the_holder_of_a_newer_term_is_tried_first_also_while_the_lost_root_is_waited_for(looks):
    uplink = looks(Route(HERE, 3.0), term=3)
    uplink.holder = THERE
    look(uplink, 0.0)
    assert uplink.roots.targets == [THERE]
    uplink.roots.ends[-1].send(messages.Welcome(4, 0.5, 2.0))
    look(uplink, 0.1)
    assert uplink.welcome is not None and uplink.term == 4 and uplink.target == THERE


def test_it_waits_longer_for_the_first_answer_and_says_what_for(uplink):
    look(uplink, 0.0)
    uplink.roots.ends[0].close()
    look(uplink, 0.1)
    assert uplink.news(1.0) == "" and uplink.given_up(59.0) == ""
    assert "waits for the root agent, at h0:1: connection closed" in uplink.news(6.0)
    assert uplink.news(7.0) == "", "once"
    assert "for 60 s (distributed.start_timeout_s)" in uplink.given_up(61.0)


def test_a_root_that_was_lost_is_looked_for_as_long_as_a_machine_is_waited_for(looks):
    uplink = looks(Route(HERE, 0.0), term=3)
    for tenth in range(300):
        look(uplink, tenth / 10)
        uplink.roots.ends[-1].close()
    assert uplink.given_up(29.9) == "" and "for 30 s (recovery.wait_s)" in uplink.given_up(30.1)


def test_something_else_that_answers_is_not_waited_for_as_long(uplink):
    look(uplink, 0.0)
    for number in range(200):
        if uplink._channel is not None:
            uplink._channel.complaint, uplink._channel.closed = wire.Stranger("h0:1 has another job's token"), True
        look(uplink, number * 0.1)
        if uplink.given_up(number * 0.1):
            break
    assert 15.0 < number * 0.1 < 16.0 and "another job's token" in uplink.given_up(number * 0.1)
