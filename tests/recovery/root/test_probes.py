"""Which machines a new root takes for lost: those whose kernels do not answer."""

from __future__ import annotations

import socket

import pytest

from gemini_gnn.recovery.messages import Member
from gemini_gnn.recovery.root.probes import PATIENCE_S, Probes


@pytest.fixture
def silent():
    """A port whose kernel answers nothing: it takes one connection that nobody accepts, and no more."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.create_connection(full.getsockname(), timeout=10),
    ):
        yield full.getsockname()[1]


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as made:
        yield made


def looks(members: dict[int, Member]) -> list[int]:
    probes = Probes(members, 0.0)
    found = [probes.look(now) for now in (0.1, PATIENCE_S, PATIENCE_S + 0.01, PATIENCE_S + 0.02)]
    assert found[:2] == [[], []] and found[3] == [], "at its time, and once"
    assert not probes.under_way
    return found[2]


def test_a_kernel_that_answers_lives_also_if_no_agent_does(listener):
    port = listener.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    assert looks({1: Member("h1", "127.0.0.1", port), 2: Member("h2", "127.0.0.1", free)}) == []


def test_one_that_does_not_answer_is_lost(listener, silent):
    assert looks({1: Member("h1", "127.0.0.1", silent), 2: Member("h2", "127.0.0.1", listener.getsockname()[1])}) == [1]


def test_one_that_never_joined_is_not_asked():
    probes = Probes({1: Member("", "", 0), 2: Member("h2", "", 7)}, 0.0)
    assert not probes.under_way and probes.look(PATIENCE_S + 1) == []


def test_closed_probes_ask_nobody(silent):
    probes = Probes({1: Member("h1", "127.0.0.1", silent)}, 0.0)
    probes.close()
    assert not probes.under_way and probes.look(PATIENCE_S + 1) == []
