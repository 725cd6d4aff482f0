"""Which root a worker serves: what it does not let get lost when another one takes over."""

from __future__ import annotations

import selectors
from typing import cast

import pytest

from gemini_gnn.recovery import messages
from gemini_gnn.recovery.worker.allegiance import Allegiance
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.recovery.worker.uplink import Uplink


class Line:
    """In place of an uplink: a root that has welcomed this machine, or not yet."""

    lost = None
    reaches_root, is_next = True, False

    def __init__(self, term: int | None):
        self.welcome = None if term is None else messages.Welcome(term, 0.5, 2.0)
        self.told: list[messages.Message] = []

    def tell(self, message):
        self.told.append(message)

    def look(self, join, now):
        return []


@pytest.fixture
def allegiance(tmp_path):
    with selectors.DefaultSelector() as selector:
        one = Allegiance(tmp_path, tmp_path, cast(Journal, None), selector)
        one._request = cast(messages.Register, object())
        yield one


def look(allegiance: Allegiance) -> None:
    allegiance.look(lambda: None, lambda: None, 1.0)


def test_a_request_to_stop_outlives_the_root_that_it_was_told(allegiance):
    """A root may lose its term before it ends the job: the next one hears of the request as soon as it answers, once."""
    first, second = Line(3), Line(None)
    stop = messages.Stop("SIGINT", 130)
    allegiance.uplink = cast(Uplink, first)
    look(allegiance)
    allegiance.ask_to_stop(stop)
    look(allegiance)
    assert first.told == [stop]

    allegiance.uplink = cast(Uplink, second)
    look(allegiance)
    assert second.told == []
    second.welcome = messages.Welcome(4, 0.5, 2.0)
    look(allegiance)
    look(allegiance)
    assert second.told == [stop] and first.told == [stop]
    again = messages.Stop("SIGINT", 130, force=True)
    allegiance.ask_to_stop(again)
    second.welcome = messages.Welcome(5, 0.5, 2.0)
    look(allegiance)
    assert second.told == [stop, again, again]


def test_a_root_is_asked_to_stop_only_by_a_machine_that_was(allegiance):
    line = Line(3)
    allegiance.uplink = cast(Uplink, line)
    look(allegiance)
    assert line.told == []
