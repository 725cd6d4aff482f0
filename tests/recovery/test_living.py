"""What does not disturb a living job. One job for all of these tests; the last thing it does is to finish."""

from __future__ import annotations

import json
import os
import signal
import socket

import psutil
import pytest

from gemini_gnn.errors import RecoveryError
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery import home, messages
from gemini_gnn.recovery.stop import stop
from tests.recovery.jobs import Job, wait_for


@pytest.fixture(scope="module")
def living(tmp_path_factory):
    run = Job(tmp_path_factory.mktemp("living") / "run")
    launch = run.launch(2, "train")
    try:
        run.training(2)
        yield run
        run.finish()
        assert run.end(launch)[0] == 0
        assert len(run.notes("training")) == len(run.notes("finished")) == 2
        assert run.events("warm_died") == [] and len(run.events("started")) == 1
        assert (run.run_dir / "logs" / f"agent-{os.uname().nodename}.log").read_text() == ""
        run.assert_nothing_left()
    finally:
        run.clean()


def test_the_same_command_is_told_that_it_runs(living):
    code, out, err = living.end(living.launch(2, "train"))
    assert (code, out) == (2, "")
    assert "already running" in err and f"pid {living.pid_of('agent')}" in err and "launch/stop.py" in err
    assert err.count("already running") == 1


def test_the_reason_is_said_although_the_slot_that_speaks_comes_last(living):
    """An end of the other slot has the launcher terminate all: it must not come first."""
    code, _, err = living.end(living.launch(2, "train", late=len(living.events("refused"))))
    assert code == 2 and err.count("already running") == 1


def test_the_same_run_directory_with_another_arena_is_told_who_has_it(living, short_path):
    """As another machine or user would be: nothing of the living job is touched, not even its status."""
    agent = living.pid_of("agent")
    code, _, err = living.end(living.launch(1, "train", arena=os.fspath(short_path)))
    assert code == 2 and "is in use by the worker agent on" in err and f"pid {agent}," in err
    status = read_status(living.run_dir)
    assert (status["state"], status["pid"], status["term"]) == ("running", agent, 1)
    wait_for(lambda: list(living.processes().values()).count("agent") == 1, "the end of the other agent")


def test_signals_of_launchers_and_terminals_do_not_reach_the_work(living):
    for note in living.notes("training"):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(note["pid"], number)
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal: not the agent's business
        os.kill(living.pid_of("agent"), number)
        os.kill(living.pid_of("warm"), number)


def test_the_agent_is_out_of_the_launchers_reach(living):
    launch = living.launches[0]
    reach = {process.pid for process in psutil.Process(launch.pid).children(recursive=True)}
    assert len(reach) == 2
    assert os.getsid(living.pid_of("agent")) != os.getsid(launch.pid)
    assert len(living.processes()) == 3 + 2 + 2  # launcher and slots, agent and warm parent, trainers


NONSENSE = {
    "nothing": b"",
    "no JSON": b"no json\n",
    "no object": b"[1, 2]\n",
    "unknown": b'{"kind": "weather"}\n',
    "of another direction": b'{"kind": "ended", "outcome": "done", "code": 0, "reason": "x"}\n',
    "cut off": b'{"kind": "stop"',
    "a field is missing": b'{"kind": "register", "protocol": %d}\n' % messages.PROTOCOL,
    "a field is of another type": b'{"kind": "stop", "protocol": %d, "reason": 1, "code": "x"}\n' % messages.PROTOCOL,
    "descriptors that did not come": b'{"descriptors": 1}\n',
    "no text": b"\xff\xfe\n",
    "nested": b"[" * 100_000 + b"\n",
    "nested in a field": b'{"kind": "stop", "protocol": %d, "reason": %s}\n'
    % (messages.PROTOCOL, b"[" * 100_000 + b"]" * 100_000),
}


@pytest.mark.parametrize("said", NONSENSE.values(), ids=NONSENSE)
def test_a_visitor_that_talks_nonsense_or_leaves(living, said):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        visitor.connect(os.fspath(living.arena / home.AGENT_SOCKET))
        visitor.sendall(said)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(os.fspath(living.arena / home.AGENT_SOCKET))
        agent = messages.connect(living.arena / home.AGENT_SOCKET)
        assert agent is not None and messages.peer(agent.sock)[0] == living.pid_of("agent")
        agent.close()


@pytest.mark.parametrize("said", [{"kind": "register"}, {"kind": "stop", "protocol": messages.PROTOCOL + 1}])
def test_a_program_of_another_version_is_refused(living, said):
    visitor = messages.connect(living.arena / home.AGENT_SOCKET)
    assert visitor is not None
    visitor.sock.sendall(json.dumps(said).encode() + b"\n")
    (answer,) = wait_for(visitor.receive, "the answer")
    assert isinstance(answer, messages.Refused) and f"pid {living.pid_of('agent')}" in answer.text
    assert f"protocol {messages.PROTOCOL}, this program {said.get('protocol')}" in answer.text
    visitor.close()


def test_stop_of_another_version_says_so(living, monkeypatch):
    monkeypatch.setattr(messages, "PROTOCOL", messages.PROTOCOL + 1)
    with pytest.raises(RecoveryError, match="use the installation of gemini_gnn that started the job"):
        stop(living.run_dir)
