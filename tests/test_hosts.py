"""Asking the machines of a hostfile: what ssh says, turned into what to do."""

import json

import pytest

from gemini_gnn.errors import ClusterError
from gemini_gnn.hosts import (
    KEEPALIVE,
    Answer,
    disagreements,
    forwarded,
    interpret,
    keeps_alive,
    launcher_environment,
    master_address,
    read_hostfile,
    table,
)

FACTS = {
    "machine": "h1",
    "cores": 8,
    "shm_bytes": 2**31,
    "python": "3.11.2",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "project": "/home/u/gemini_gnn",
    "first": "10.1.2.1",
    "shared": True,
}


def answer(host="h1", **changes):
    return Answer(host, 2, 0.5, FACTS | {"machine": host} | changes)


def test_an_answer_is_found_among_banners():
    said = f"Welcome to h1!\nANSWER {json.dumps(FACTS)}\n"
    assert interpret("h1", 2, 0.5, 0, said, "/here") == Answer("h1", 2, 0.5, FACTS)


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (None, "", "no answer within 20 s.*ssh -v h1 true"),
        (
            255,
            "ssh: connect to host h1 port 22: Connection refused",
            r"cannot be reached \(ssh: connect.*ssh -v h1 true",
        ),
        (255, "u@h1: Permission denied (publickey).", "ssh-copy-id h1"),
        (255, "Host key verification failed.", "ssh h1 true"),
        (127, "bash: /venv/bin/python: No such file", "same paths"),
        (0, "ANSWER " + json.dumps(FACTS | {"shared": False}), "must share a file system"),
        (0, "", "same paths"),
    ],
)
def test_what_can_be_wrong_with_a_host(code, said, expected):
    import re

    problem = interpret("h1", 2, 20, code, said, "/here").problem
    assert problem and re.search(expected, problem)


def test_machines_must_agree():
    assert disagreements([answer("h0"), answer("h1")]) == []
    (found,) = disagreements([answer("h0"), answer("h1", torch="2.9.0"), answer("h2")])
    assert found == "expected the same torch everywhere; got 2.13.0 on h0, h2; 2.9.0 on h1"
    (found,) = disagreements([answer("h0"), answer("h0-ib", machine="h0")])
    assert found == "h0 and h0-ib are one machine, h0; give it one line"


def test_the_first_machine_is_called_by_the_address_the_others_see():
    assert master_address([answer("h0", first="127.0.1.1"), answer("h1"), answer("h2")]) == "10.1.2.1"
    assert master_address([answer("h0"), answer("h1"), answer("h2", first="10.9.9.9")]) is None
    assert master_address([answer("h0", first="10.1.2.1")]) == "10.1.2.1"


def test_ssh_that_would_wait_for_ever():
    assert not keeps_alive("user u\nserveraliveinterval 0\n", {})
    assert keeps_alive("serveraliveinterval 30\n", {})
    assert keeps_alive("", {"PDSH_SSH_ARGS_APPEND": KEEPALIVE})


def test_what_travels_to_the_other_machines():
    environ = {
        "GEMINI_GNN_DATA": "/data",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "WANDB_API_KEY": "secret",
    }
    text = forwarded(environ, ["NCCL_DEBUG=WARN\n\n", "MINE=1"])
    assert text == "GEMINI_GNN_DATA=/data\nNCCL_DEBUG=INFO\nNCCL_DEBUG=WARN\nMINE=1\n"


def test_the_launcher_gives_up_dead_hosts(tmp_path):
    assert launcher_environment({"A": "1"}, tmp_path) == {
        "A": "1",
        "DS_ENV_FILE": str(tmp_path),
        "PDSH_SSH_ARGS_APPEND": KEEPALIVE,
    }
    own = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=60"}
    assert launcher_environment(own, tmp_path)["PDSH_SSH_ARGS_APPEND"] == "-o ServerAliveInterval=60"
    other = {"PDSH_SSH_ARGS_APPEND": "-p 2222"}
    assert launcher_environment(other, tmp_path)["PDSH_SSH_ARGS_APPEND"] == f"-p 2222 {KEEPALIVE}"


def test_table():
    text = table([answer("h0"), Answer("h1", 2, 20.0, {}, "no answer")])
    assert "h0                   2  8 cores, 2.0 GiB free" in text and "FAILED: no answer" in text


def test_a_hostfile_is_named_in_its_errors(tmp_path):
    with pytest.raises(ClusterError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "hosts").write_text("h0 slot=1")
    with pytest.raises(ClusterError, match="hosts: hostfile line 1"):
        read_hostfile(tmp_path / "hosts")
