"""Faults of whole machines, done in the lab: what other machines see of them, and that they are undone. Refused elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import machine
from tests.lab import LabError
from tests.lab.test_lab import PYTHON, connect, finish, wait_until

# --- here, on no host of the lab ------------------------------------------------------------------------------------------

HERE = os.readlink("/proc/self/ns/pid")


@pytest.mark.parametrize(
    ("namespace", "mark"),
    [
        (machine.BOOTED_INTO, machine.BOOTED_INTO),
        (machine.BOOTED_INTO, None),
        ("pid:[4026532999]", None),
        ("pid:[4026532999]", "pid:[4026532998]"),
        ("pid:[4026532999]", ""),
    ],
    ids=["a machine with a mark", "a machine", "a container", "another host's mark", "an empty mark"],
)
def test_only_hosts_of_the_lab_lose_their_power(tmp_path, monkeypatch, namespace, mark):
    monkeypatch.setattr(machine, "MARK", tmp_path / "mark")
    monkeypatch.setattr(machine.os, "readlink", lambda path: namespace)
    monkeypatch.setattr(machine.os, "posix_spawn", lambda *_, **__: pytest.fail("a process was started"))
    if mark is not None:
        machine.MARK.write_text(f"{mark}\n")
    with pytest.raises(ConfigError, match="power-off: expected a host of the lab .* only what may be undone is done"):
        machine.power_off()


def test_a_host_of_the_lab_needs_the_right_to_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MARK", tmp_path / "mark")
    monkeypatch.setattr(machine.os, "readlink", lambda path: "pid:[4026532999]")
    monkeypatch.setattr(machine.link, "may", lambda capability: capability != 22)
    machine.MARK.write_text("pid:[4026532999]\n")
    with pytest.raises(ConfigError, match="the right to reboot"):
        machine.check_power()
    monkeypatch.setattr(machine.link, "may", lambda capability: True)
    machine.check_power()


def test_this_machine_keeps_its_power(tmp_path):
    """By the call, by the process that would do it, and at the start of a job."""
    if machine.MARK.exists():
        pytest.skip("these tests run on a host of the lab")
    with pytest.raises(ConfigError, match="power-off: expected a host of the lab"):
        machine.check_power()
    settings = [f"run_dir={tmp_path / 'run'}", "faults.allow=true", "faults.at=[power-off rank:0 @ step 5]"]
    for command in (["-m", "gemini_gnn.faults.machine"], ["launch/train.py", *settings]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and "power-off: expected a host of the lab" in done.stderr, done
    assert not (tmp_path / "run").exists()


def test_a_file_system_that_no_process_here_serves_does_not_hang():
    with pytest.raises(
        ConfigError, match="hang-filesystem: expected /proc .*; got a file system of type proc.* cut-link"
    ):
        machine.file_server(Path("/proc"))


# --- in the lab -----------------------------------------------------------------------------------------------------------


def order(lab, host, call):
    """Have the harm of ``call`` done on ``host``. The child that does it is left alone, as by an agent that is killed."""
    code = f"from gemini_gnn.faults import link, machine; from pathlib import Path; {call}"
    return lab.popen(host, [PYTHON, "-c", code])


@pytest.mark.lab
def test_a_split_is_silence_in_both_directions_and_ends(lab):
    """Over IPv4 and, where there is one, IPv6."""
    v6 = [f"{name}-v6" for name in ("h0", "h1", "h2", "h3") if lab.has_ipv6(name)]
    one, other = ["h0", "h1", *v6[:2]], ["h2", "h3", *v6[2:]]
    across = [connect(lab, "h0", name, on="h2") for name in ("h2", *v6[2:3])]
    beside, back = connect(lab, "h0", "h1"), connect(lab, "h2", "h0")
    try:
        sides = (("h0", other), ("h1", other), ("h2", one), ("h3", one))
        orders = [order(lab, host, f"link.split(link.ways_to({others}), 6)") for host, others in sides]
        assert [process.wait(timeout=30) for process in orders] == [0] * 4
        probe = "import socket\ntry: socket.create_connection(('{}', 22), {}); print('heard')\nexcept OSError as e: print(e)"

        def asked(host, name, patience_s):
            return lab.run(host, [PYTHON, "-S", "-c", probe.format(name, patience_s)]).stdout

        for host, name in (("h0", "h3"), ("h2", "h1")):
            wait_until(lambda h=host, n=name: asked(h, n, 0.3) == "timed out\n")  # no refusal: silence
        begin = time.monotonic()
        say = "peer.settimeout(30); peer.sendall(b'x' * 1000); peer.shutdown(1); print(peer.recv(10).decode())\n"
        for _, client in (*across, back):
            client.stdin.write(say)
            client.stdin.flush()
        assert beside[1].communicate(say, timeout=40)[0] == "1000\n"
        assert asked("h0", "h1", 5) == asked("h3", "h2", 5) == "heard\n", "on one side all is as before"
        assert all(asked("h1", name, 0.3) == "timed out\n" for name in v6[2:])
        for _server, client in (*across, back):
            assert client.communicate(timeout=40)[0] == "1000\n", "what was said meanwhile arrives"
        assert time.monotonic() - begin > 1.0
        wait_until(lambda: asked("h0", "h3", 5) == asked("h2", "h1", 5) == "heard\n")
        for host in ("h0", "h1", "h2", "h3"):
            wait_until(lambda h=host: "02:00:00:00:00:00" not in lab.run(h, ["ip", "neigh"]).stdout)
    finally:
        finish(*(process for pair in (*across, beside, back) for process in pair))


@pytest.mark.lab
def test_a_host_that_loses_its_power_says_nothing_and_is_off(lab):
    server, client = connect(lab, "h1", "h2")
    lab.run("h2", ["touch", "/dev/shm/before"])
    try:
        order(lab, "h2", "machine.power_off()").wait(timeout=30)
        wait_until(lambda: not lab.is_on("h2"))
        server.wait(timeout=20)
        said, _ = client.communicate("peer.settimeout(1); print('got', peer.recv(1))\n", timeout=20)
    finally:
        finish(server, client)
    assert "got" not in said and "TimeoutError" in said, "no farewell: no end of file, no reset"
    assert lab.alive and all(lab.is_on(name) for name in ("h0", "h1", "h3"))
    with pytest.raises(LabError, match="h2 is powered off"):
        lab.run("h2", ["true"])
    lab.power_on("h2")
    assert lab.run("h1", ["ssh", "-o", "ConnectTimeout=10", "h2", "hostname; ls /dev/shm"]).stdout == "h2\n"


@pytest.mark.lab
def test_a_file_system_hangs_on_one_host_and_answers_again(lab):
    folder = lab.nfs_up()
    try:
        lab.run("h1", ["sh", "-c", f"echo here > {folder}/file"])
        log = f"import os; log = os.open('{folder}/log', os.O_CREAT | os.O_WRONLY); os.dup2(log, 1); os.dup2(log, 2)"
        call = f"machine.hang(machine.file_server(Path('{folder}/run')), 3)"
        order(lab, "h1", f"{log}; {call}").wait(timeout=30)  # as agents, whose logs are in the run directory

        def reads(host, patience_s):
            return lab.run(host, ["timeout", str(patience_s), "cat", f"{folder}/file"]).stdout

        wait_until(lambda: reads("h1", 0.3) == "")
        assert reads("h2", 10) == "here\n"
        assert reads("h1", 20) == "here\n", "it waited, and then it was read"
    finally:
        lab.nfs_down()
