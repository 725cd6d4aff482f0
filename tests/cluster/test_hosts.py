"""The machines of a hostfile or an allocation, and the launcher."""

import base64
import json

import pytest

from gemini_gnn.cluster import hosts, launcher
from gemini_gnn.cluster.hosts import (
    KEEPALIVE,
    allocated,
    forwarded,
    keeps_alive,
    launcher_environment,
    read_hostfile,
)
from gemini_gnn.cluster.launcher import Process, launch_words, runs_there, waiting_ssh
from gemini_gnn.errors import ClusterError


def test_the_machines_of_an_allocation():
    assert allocated({}) == []
    environ = {"SLURM_JOB_NODELIST": "n[1-2],n7", "SLURM_TASKS_PER_NODE": "4(x3)", "SLURM_JOB_NUM_NODES": "3"}
    assert allocated(environ) == [("n1", 4), ("n2", 4), ("n7", 4)]
    assert allocated({"SLURM_JOB_NODELIST": "n1"}) == [("n1", 1)]
    for wrong in ({"SLURM_JOB_NUM_NODES": "2"}, {"SLURM_TASKS_PER_NODE": "4(x2)"}):
        with pytest.raises(ClusterError, match="contradict each other.*another job"):
            allocated(environ | wrong)
    with pytest.raises(ClusterError, match="same number of ranks"):
        allocated(environ | {"SLURM_TASKS_PER_NODE": "4(x2),2"})


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
        hosts.run("hostfile", 2, None, ["launch/train.py"], {})


def test_a_blank_in_the_path_is_refused_for_several_machines(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: "/usr/bin/pdsh")
    (tmp_path / "my data").mkdir()
    monkeypatch.chdir(tmp_path / "my data")
    with pytest.raises(ClusterError, match="without blanks.*my data"):
        hosts.run("hostfile", 2, None, ["launch/train.py"], {})


def test_only_a_machine_that_is_not_there_loses_its_ssh():
    assert launcher.answers_no_more(255, "ssh: connect to host h1 port 22: No route to host")
    assert launcher.answers_no_more(255, "ssh: connect to host h1 port 22: Connection timed out")
    assert not launcher.answers_no_more(255, "u@h1: Permission denied (publickey).")
    assert not launcher.answers_no_more(255, "Host key verification failed.")
    assert not launcher.answers_no_more(1, "ps: timed out")


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
