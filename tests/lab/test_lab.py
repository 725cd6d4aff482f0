"""The lab is a cluster: hosts are apart where machines are, fail as machines fail, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.lab import Lab, LabError, missing
from tests.lab import lab as lab_module
from tests.lab.__main__ import state_folder
from tests.lab.lab import bits_per_s

PYTHON = sys.executable
ROOT = Path(__file__).parents[2]
needs_lab = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LISTEN = """
import socket, sys
both = socket.has_dualstack_ipv6()
server = socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
print(server.getsockname()[1], flush=True)
peer, _ = server.accept()
print("accepted", flush=True)
total = 0
while data := peer.recv(1 << 20):
    total += len(data)
peer.sendall(str(total).encode())
"""


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# --- pure -------------------------------------------------------------------------------------------------------------


def test_rates():
    assert bits_per_s("1gbit") == 1e9 and bits_per_s("2.5Mbit") == 2.5e6
    for wrong in ("fast", "1gb", "gbit", "1 000", "0gbit", "-1gbit", "nangbit", "1e3mbit"):
        with pytest.raises(LabError, match="expected a rate"):
            bits_per_s(wrong)


def test_names_cannot_leave_their_folder():
    assert state_folder("a-b_1").name == "a-b_1"
    for wrong in ("", "..", "a/b"):
        with pytest.raises(LabError, match="--name"):
            state_folder(wrong)


def test_says_why_it_cannot_be_built(monkeypatch):
    monkeypatch.setattr(lab_module.platform, "system", lambda: "Darwin")
    assert "Darwin" in missing()
    monkeypatch.undo()
    monkeypatch.setattr(lab_module.os, "geteuid", lambda: 1000)
    assert "root" in missing()
    monkeypatch.setattr(lab_module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module.shutil, "which", lambda tool: None if tool == "pdsh" else "/bin/true")
    assert "pdsh" in missing() and "apt-get" in missing()


def test_a_lab_that_is_not_there(tmp_path):
    with pytest.raises(LabError, match="no lab in"):
        Lab.load(tmp_path)
    Lab.clean(tmp_path / "never")


# --- hosts are apart where machines are -------------------------------------------------------------------------------


@pytest.mark.lab
def test_own_name_network_memory_and_processes(lab):
    Path("/dev/shm/of-the-machine").write_text("")
    try:
        for name in ("h0", "h3"):
            script = "hostname; ls /dev/shm; cat /proc/1/comm; hostname -I"
            said = lab.run(name, ["sh", "-c", script]).stdout.split()
            assert said[:3] == [name, "sshd", lab.address(name)]
    finally:
        os.unlink("/dev/shm/of-the-machine")
    lab.run("h0", ["touch", "/dev/shm/mine"])
    assert "mine" not in lab.run("h1", ["ls", "/dev/shm"]).stdout
    lab.run("h0", ["rm", "/dev/shm/mine"])


@pytest.mark.lab
def test_ssh_and_pdsh_between_hosts(lab):
    done = lab.run("h0", ["pdsh", "-S", "-R", "ssh", "-w", "h[0-3]", "hostname"])
    assert done.returncode == 0
    assert sorted(done.stdout.split("\n")[:-1]) == [f"h{i}: h{i}" for i in range(4)]
    if lab.has_ipv6("h0"):
        assert lab.run("h0", ["ssh", "h1-v6", "hostname"]).stdout == "h1\n"
    assert lab.run("h0", ["pdsh", "-S", "-R", "ssh", "-w", "h[0-3]", "exit %n"]).returncode == 3


@pytest.mark.lab
def test_a_command_that_takes_too_long_is_ended(lab):
    with pytest.raises(TimeoutError, match="before\n"):
        lab.run("h0", ["sh", "-c", "echo before; sleep 600"], timeout_s=0.5)
    wait_until(lambda: not lab.processes("h0"))


# --- they fail as machines fail ---------------------------------------------------------------------------------------


def connect(lab, source, target, on=None):
    """A process on ``target`` that counts what a process on ``source`` sends; the latter obeys its stdin.

    ``on``: the host, where ``target`` is another name of it.
    """
    script = (
        "import socket, sys, time\n"
        f"peer = socket.create_connection(('{target}', int(sys.argv[1])), timeout=10)\n"
        "print('connected', flush=True)\n"
        "exec(sys.stdin.readline())\n"
    )
    server = lab.popen(on or target, [PYTHON, "-c", LISTEN], stdout=subprocess.PIPE, text=True)
    port = server.stdout.readline().strip()
    command = [PYTHON, "-c", script, port]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    client = lab.popen(source, command, text=True, **pipes)
    assert client.stdout.readline() == "connected\n" and server.stdout.readline() == "accepted\n"
    return server, client


def finish(*processes):
    for process in processes:
        lab_module.kill_group(process)
        process.communicate(timeout=20)


@pytest.mark.lab
def test_a_machine_without_power_says_nothing(lab):
    server, client = connect(lab, "h1", "h2")
    try:
        lab.power_off("h2")
        server.wait(timeout=20)
        # No FIN, no RST: the peer sees neither an end of file nor a reset, only silence.
        said, _ = client.communicate("peer.settimeout(1); print('got', peer.recv(1))\n", timeout=20)
    finally:
        finish(server, client)
    assert lab.processes("h2") == []
    assert "got" not in said and "TimeoutError" in said
    done = lab.run("h1", ["ssh", "-o", "ConnectTimeout=1", "h2", "true"])
    assert done.returncode == 255 and "timed out" in done.stdout
    with pytest.raises(LabError, match="powered off"):
        lab.run("h2", ["true"])


@pytest.mark.lab
def test_power_on_boots_with_empty_memory(lab):
    lab.run("h2", ["touch", "/dev/shm/before"])
    lab.power_off("h2")
    lab.power_off("h2")
    lab.power_on("h2")
    lab.power_on("h2")
    assert lab.run("h1", ["ssh", "-o", "ConnectTimeout=10", "h2", "hostname; ls /dev/shm"]).stdout == "h2\n"


@pytest.mark.lab
def test_a_host_whose_first_process_died_is_off(lab):
    """Its process id may be somebody else's by then, whose machine a command would run on."""
    os.kill(lab.hosts["h2"].pid, signal.SIGKILL)
    wait_until(lambda: not lab.is_on("h2"))
    assert lab.processes("h2") == []
    with pytest.raises(LabError, match="h2 is powered off"):
        lab.command("h2", ["true"])
    lab.power_on("h2")
    assert lab.run("h1", ["ssh", "-o", "ConnectTimeout=10", "h2", "hostname"]).stdout == "h2\n"


@pytest.mark.lab
def test_a_connection_survives_a_short_partition(lab):
    server, client = connect(lab, "h1", "h2")
    try:
        lab.link("h2", False)
        done = lab.run("h1", ["ssh", "-o", "ConnectTimeout=1", "h2", "true"])
        assert done.returncode == 255
        assert lab.run("h2", ["hostname"]).stdout == "h2\n", "the host itself goes on"
        lab.link("h2", True)
        ask = "peer.settimeout(30); peer.sendall(b'x' * 1000); peer.shutdown(1); print(peer.recv(10).decode())\n"
        said, _ = client.communicate(ask, timeout=40)
        assert said == "1000\n"
    finally:
        finish(server, client)


@pytest.mark.lab
def test_bandwidth_is_limited_both_ways(lab):
    lab.bandwidth("h1", "100mbit")
    for source, target in (("h1", "h2"), ("h2", "h1")):
        server, client = connect(lab, source, target)
        try:
            ask = (
                "t = time.monotonic(); peer.settimeout(60); peer.sendall(bytes(10_000_000)); peer.shutdown(1); "
                "peer.recv(10); print(time.monotonic() - t)\n"
            )
            said, _ = client.communicate(ask, timeout=60)
        finally:
            finish(server, client)
        # 10 MB at 100 Mbit/s is 0.8 s; the burst may pass at once, a busy machine may take longer.
        assert 0.7 < float(said) < 8


@pytest.mark.lab
def test_network_file_system(lab):
    folder = lab.nfs_up()
    try:
        assert lab.run("h0", ["sh", "-c", f"echo from h0 > {folder}/file"]).returncode == 0
        assert lab.run("h3", ["cat", f"{folder}/file"]).stdout == "from h0\n"
        assert not (folder / "file").exists(), "it is a mount of the hosts, not the shared disk"
        lab.power_off("h3")
        lab.power_on("h3")
        assert lab.run("h3", ["cat", f"{folder}/file"]).stdout == "from h0\n"
        lab.power_off("nas")
        lab.power_on("nas")
        # What was asked of the dead server is an error; the mount stays, and the next question finds the new one.
        wait_until(lambda: lab.run("h3", ["cat", f"{folder}/file"]).stdout == "from h0\n")
    finally:
        lab.nfs_down()
    assert lab.run("h3", ["ls", str(folder)]).stdout == ""


# --- and leave nothing behind -----------------------------------------------------------------------------------------


def machine_state():
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
    mounts = "".join(line for line in Path("/proc/mounts").read_text().splitlines(True) if "/run/user" not in line)
    return links, mounts, Path("/etc/hosts").read_text(), sorted(os.listdir("/run"))


def processes_of(folder):
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(str(folder) in c for c in p.info["cmdline"] or [])]


@pytest.mark.lab
@needs_lab
def test_the_machine_itself_stays_as_it_is(tmp_path):
    before = machine_state()
    with Lab.up(tmp_path / "a", hosts=2, nics=2, owned=True) as lab:
        assert machine_state() == before
        assert lab.run("h0", ["ssh", "h1-eth1", "hostname -I"]).stdout.split()[:2] == [
            lab.address("h1"),
            lab.address("h1", 1),
        ]
        ask = "from gemini_gnn.cluster.place import interface_to as i; print(i('h1'), i('h1-eth1'))"
        assert lab.run("h0", [PYTHON, "-c", ask]).stdout == "eth0 eth1\n"
        with pytest.raises(LabError, match="already runs"):
            Lab.up(tmp_path / "a", hosts=2)
        with pytest.raises(LabError, match="no host h7; this lab has h0, h1"):
            lab.power_off("h7")
    assert machine_state() == before
    assert not (tmp_path / "a").exists() and not processes_of(tmp_path)
    lab.down()


@pytest.mark.lab
@needs_lab
@pytest.mark.parametrize("crash", ["after", "during"])
def test_a_lab_dies_with_its_owner(tmp_path, crash):
    """Killed when the lab is up (an owned one), and halfway through building it (any)."""
    script = f"""
import os, signal, sys
from pathlib import Path
from tests.lab import Lab
if "{crash}" == "during":
    boot = Lab._boot
    Lab._boot = lambda self, name: os.kill(os.getpid(), 9) if name == "h1" else boot(self, name)
lab = Lab.up(Path(sys.argv[1]), hosts=2, owned="{crash}" == "after")
print("up", flush=True)
sys.stdin.read()
"""
    folder = tmp_path / "lab"
    with subprocess.Popen(
        [PYTHON, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as owner:
        said = owner.stdout.readline()
        assert said == ("up\n" if crash == "after" else "")
        owner.kill()
    assert owner.returncode == -signal.SIGKILL
    state = json.loads((folder / "lab.json").read_text())
    assert state["switch_pid"] and state["hosts"]["h0"]["pid"]
    wait_until(lambda: not processes_of(folder) and not Lab.load(folder).alive)
    for use in (lambda lab: lab.link("h0", False), lambda lab: lab.command("h0", ["true"])):
        with pytest.raises(LabError, match="processes are gone"):
            use(Lab.load(folder))
    Lab.clean(folder)
    assert not folder.exists()


@pytest.mark.lab
@needs_lab
def test_command_line():
    name = f"test-{os.getpid()}"

    def run(*words):
        return subprocess.run(
            [PYTHON, "-m", "tests.lab", "--name", name, *words], capture_output=True, text=True, timeout=60, cwd=ROOT
        )

    try:
        assert run("up", "--hosts", "0").stderr.startswith("lab: expected 1 to 100 hosts")
        assert "h1    on" in run("up", "--hosts", "2").stdout
        assert run("exec", "h1", "--", "sh", "-c", "hostname; pwd; exit 3").stdout == f"h1\n{ROOT}\n"
        assert run("exec", "h1", "--", "sh", "-c", "exit 3").returncode == 3
        assert run("hostfile", "--slots", "2").stdout == "h0 slots=2\nh1 slots=2\n"
        for words in (("power-off", "h1"), ("link", "h0", "down"), ("bandwidth", "h0", "1gbit")):
            assert run(*words).returncode == 0
        status = run("status").stdout
        assert "h1    off" in status and "link down" in status and "1gbit" in status
        refused = run("bandwidth", "h0", "0gbit")
        assert refused.returncode == 1 and refused.stderr.startswith("lab: expected a rate")
        assert run("exec", "h1", "--", "true").stderr.startswith("lab: h1 is powered off")
        assert run("power-on", "h1").returncode == run("link", "h0", "up").returncode == 0
        folder = run("nfs", "up").stdout.strip()
        assert run("exec", "h1", "--", "sh", "-c", f"echo from h1 > {folder}/file").returncode == 0
        assert run("exec", "h0", "--", "cat", f"{folder}/file").stdout == "from h1\n"
        assert "network file system" in run("status").stdout
        assert run("nfs", "down").returncode == 0
        assert run("exec", "h0", "--", "ls", folder).stdout == ""
    finally:
        run("down")
    assert run("down").returncode == 0
    assert run("status").stderr.startswith("lab: no lab in")
    assert not state_folder(name).exists()


@pytest.mark.lab
def test_interfaces_of_a_machine_with_several(lab):
    """What the address and interface selection of the training sees on a host, over IPv4 and IPv6."""
    ask = "from gemini_gnn.cluster.place import interface_to as i; import sys; print(*[i(a) for a in sys.argv[1:]])"
    targets = ["h0", lab.address("h0"), "h1", *([lab.address6("h0"), "h1-v6"] if lab.has_ipv6("h0") else [])]
    found = lab.run("h0", [PYTHON, "-c", ask, *targets, "127.0.0.1"]).stdout.split()
    assert found == ["eth0"] * len(targets) + ["lo"]
    lost = lab.run("h0", [PYTHON, "-c", ask, "192.0.2.1"])
    assert "h0 finds no way to the first machine, 192.0.2.1" in lost.stdout
