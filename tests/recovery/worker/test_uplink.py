"""A worker's connection to its root: what it does when the root is silent, gone, old, or never comes. On a clock of its own."""

from __future__ import annotations

import selectors

import pytest

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.observe import terms
from gemini_gnn.recovery import messages, wire
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.recovery.worker.uplink import LATE_S, RETRY_S, Uplink

JOIN = messages.Join(0, "h0", 7, 1, 1, [], True)
WELCOME = messages.Welcome(3, 0.5, 2.0)


class Roots:
    """The other ends that an uplink has connected to, newest last."""

    def __init__(self) -> None:
        self.ends: list[messages.Channel] = []

    def local_end(self, now: float) -> messages.Channel:
        here, there = messages.pair(messages.TO_ROOT)
        self.ends.append(here)
        return messages.Channel(there, messages.TO_WORKER)


@pytest.fixture
def uplink(tmp_path):
    terms.make_run_dir(tmp_path)
    place = Place(0, 1, 0, 1, "h0", "127.0.0.1", 1, "plain")
    request = messages.Register(
        place, "m:f", {}, [], "auto", RecoveryConfig(wait_s=30.0), SnapshotConfig(), FaultsConfig(), 60.0,
        0, 0.0, {}, "/", [], [], [0], "launch", 7,
    )  # fmt: skip
    roots = Roots()
    with selectors.DefaultSelector() as selector:
        made = Uplink(request, b"", roots, Journal(tmp_path, "h0"), selector, 0.0)
        made.roots = roots
        yield made
    for end in roots.ends:
        end.close()


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


def test_a_root_that_is_silent_is_left_and_joined_again(uplink):
    welcomed(uplink, 0.0)
    look(uplink, 1.0, 1.9)
    assert uplink.welcome is not None
    look(uplink, 2.1)
    assert uplink.welcome is None and len(uplink.roots.ends) == 1
    look(uplink, 2.1 + RETRY_S)
    assert uplink.roots.ends[1].receive() == [JOIN]


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
    uplink.tell(messages.Able(False))
    look(uplink, 0.1 + RETRY_S)
    assert uplink.roots.ends[1].receive() == [JOIN]


def test_an_older_root_is_refused(uplink):
    welcomed(uplink, 0.0, term=3)
    uplink.roots.ends[0].close()
    look(uplink, 0.1, 0.3)
    uplink.roots.ends[1].send(messages.Welcome(2, 0.5, 2.0))
    uplink.roots.ends[1].send(messages.Close())
    assert look(uplink, 0.4) == [] and uplink.welcome is None and uplink.term == 3
    look(uplink, 0.6)
    uplink.roots.ends[2].send(messages.Welcome(4, 0.5, 2.0))
    look(uplink, 0.7)
    assert uplink.term == 4


def test_it_waits_longer_for_the_first_answer_and_says_what_for(uplink):
    look(uplink, 0.0)
    uplink.roots.ends[0].close()
    look(uplink, 0.1)
    assert uplink.news(1.0) == "" and uplink.given_up(59.0) == ""
    assert "waits for the root agent, on rank 0's machine at 127.0.0.1:1: connection closed" in uplink.news(6.0)
    assert uplink.news(7.0) == "", "once"
    assert "for 60 s (distributed.start_timeout_s)" in uplink.given_up(61.0)


def test_it_waits_for_a_root_that_was_lost(uplink):
    welcomed(uplink, 50.0)
    assert uplink.given_up(100.0) == ""
    uplink.roots.ends[0].close()
    look(uplink, 100.0)
    assert uplink.given_up(129.0) == "" and "for 30 s (recovery.wait_s)" in uplink.given_up(131.0)


def test_something_else_that_answers_is_not_waited_for_as_long(uplink):
    look(uplink, 0.0)
    for number in range(200):
        if uplink._channel is not None:
            uplink._channel.complaint, uplink._channel.closed = wire.Stranger("h0:1 has another job's token"), True
        look(uplink, number * 0.1)
        if uplink.given_up(number * 0.1):
            break
    assert 15.0 < number * 0.1 < 16.0 and "another job's token" in uplink.given_up(number * 0.1)
