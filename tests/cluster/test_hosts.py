"""Asking the machines of a hostfile: what ssh says, turned into what to do."""

import base64
import json

import pytest

from gemini_gnn.cluster import hosts, launcher
from gemini_gnn.cluster.hosts import (
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
from gemini_gnn.cluster.launcher import Process, launch_words, runs_there, waiting_ssh
from gemini_gnn.errors import ClusterError

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


def test_a_launcher_without_pdsh_is_not_started(monkeypatch):
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: None)
    with pytest.raises(ClusterError, match="apt-get install pdsh"):
        hosts.run("hostfile", [answer("h0"), answer("h1")], ["launch/train.py"], {})


def test_a_blank_in_the_path_is_refused_for_several_machines(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: "/usr/bin/pdsh")
    (tmp_path / "my data").mkdir()
    monkeypatch.chdir(tmp_path / "my data")
    with pytest.raises(ClusterError, match="without blanks.*my data"):
        hosts.run("hostfile", [answer("h0"), answer("h1")], ["launch/train.py"], {})


def test_only_a_machine_that_is_not_there_loses_its_ssh():
    assert launcher.answers_no_more(255, "ssh: connect to host h1 port 22: No route to host")
    assert launcher.answers_no_more(255, "ssh: connect to host h1 port 22: Connection timed out")
    assert not launcher.answers_no_more(255, "u@h1: Permission denied (publickey).")
    assert not launcher.answers_no_more(255, "Host key verification failed.")
    assert not launcher.answers_no_more(1, "ps: timed out")


def test_table():
    text = table([answer("h0"), Answer("h1", 2, 20.0, {}, "no answer")])
    assert "h0                   2  8 cores, 2.0 GiB free" in text and "FAILED: no answer" in text


def test_a_hostfile_is_named_in_its_errors(tmp_path):
    with pytest.raises(ClusterError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "hosts").write_text("h0 slot=1")
    with pytest.raises(ClusterError, match="hosts: hostfile line 1"):
        read_hostfile(tmp_path / "hosts")


# --- what the launcher waits for --------------------------------------------------------------------------------------


def launch(node, *arguments, port=29500, world=("h0", "u@h1", "h2")):
    encoded = base64.urlsafe_b64encode(json.dumps({host: [0] for host in world}).encode()).decode()
    words = f"/venv/bin/python -u -m deepspeed.launcher.launch --world_info={encoded} --node_rank={node}"
    return [*words.split(), "--master_addr=10.0.0.1", f"--master_port={port}", "launch/train.py", *arguments]


def ssh(*options, command):
    return ["ssh", "-oConnectTimeout=10", "-2", "-a", "-x", *options, "export A=h1; ", "cd /project;", *command]


# A launching machine, h0, as psutil shows it: the launcher with its pdsh and two ssh clients, sshd with the slot processes.
QUOTED = ['dataset.root="/my data"', "run_dir=r"]
MACHINE = {
    10: Process(1, ["python", "deepspeed", "--hostfile", "hosts", "launch/train.py"]),
    11: Process(10, ["pdsh", "-S", "-f", "1024", "-w", "h0 h1 h2", *launch("%n", *QUOTED)]),
    12: Process(11, ssh("h0", command=launch(0, *QUOTED))),
    13: Process(11, ssh("-l", "u", "h1", command=launch(1, *QUOTED))),
    14: Process(11, ssh("h2", command=launch(2, *QUOTED))),
    20: Process(1, ["sshd: u@notty"]),
    21: Process(20, launch(0, "dataset.root=/my data", "run_dir=r")),
    22: Process(21, ["python", "launch/train.py", "dataset.root=/my data", "run_dir=r"]),
}


def test_the_ssh_that_the_launcher_waits_for():
    assert [(w.pid, w.host) for w in waiting_ssh(22, MACHINE)] == [(13, "h1"), (14, "h2")]
    asked = waiting_ssh(22, MACHINE)[0].ask
    assert asked[0] == "ssh" and asked[-4:] == ["-l", "u", "h1", "ps -eww -o args="], "as the launcher logged in"
    assert "-oBatchMode=yes" in asked and "-oConnectTimeout=10" in asked


@pytest.mark.parametrize(
    "others",
    [
        {14: Process(11, ssh("h2", command=launch(2, *QUOTED, port=29501)))},  # another job of the same hosts
        {14: Process(11, ssh("h2", command=launch(2, "run_dir=other")))},
        {14: Process(1, ssh("h2", command=launch(2, *QUOTED)))},  # not pdsh's: somebody typed it, or pdsh has ended
        {14: Process(11, ["vi", *launch(2, *QUOTED)])},
        {14: Process(11, ["ssh", "h2", "top"])},
    ],
)
def test_an_ssh_that_is_not_of_this_launch_is_left_alone(others):
    assert [w.pid for w in waiting_ssh(22, MACHINE | others)] == [13]


def test_a_machine_that_did_not_launch_finds_nothing():
    elsewhere = {pid: process for pid, process in MACHINE.items() if pid >= 20}
    assert waiting_ssh(22, elsewhere) == []
    assert waiting_ssh(22, {22: MACHINE[22]}) == [], "started by hand"


def test_a_job_is_seen_among_what_runs_on_a_machine():
    words = launch_words(MACHINE[13].argv)
    there = " ".join(launch(1, "dataset.root=/my data", "run_dir=r"))
    assert runs_there(f"sshd: u@notty\n{there}\nps -eww -o args=\n", words)
    assert not runs_there("sshd: u@notty\n", words)
    assert not runs_there(there.replace("29500", "29501"), words)
    assert not runs_there("", words)
