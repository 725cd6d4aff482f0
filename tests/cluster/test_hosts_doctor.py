"""The doctor on the lab's hosts: it finds each thing that is made wrong there, and nothing else."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import pytest

from tests.lab.lab import NAS

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable

pytestmark = [pytest.mark.lab, pytest.mark.timeout(200)]

# Appended to a module of the standard library on one host: its Python believes another time.
CLOCK = "\nimport time\n_time = time.time\ntime.time = lambda: _time() + 3600\n"
# Ports of programs, and not that of sshd, towards one host; the kernels of the lab need no iptables for it.
BLOCKED = "ip rule add pref 1 to {} ipproto tcp sport 1024-65534 dport 1024-65534 blackhole"
# argv: what stays visible, though it is inside of the home of root, which nobody else may enter.
OPEN_HOME = """
set -e
for path in "$@"; do case "$path" in "$HOME"/*) mkdir -p "/run/kept$path"; mount --bind "$path" "/run/kept$path";; esac; done
mount -t tmpfs -o mode=755 tmpfs "$HOME"
for path in "$@"; do case "$path" in "$HOME"/*) mkdir -p "$path"; mount --bind "/run/kept$path" "$path";; esac; done
"""


@contextlib.contextmanager
def tampered(lab, *hosts):
    """Mounts and rules on ``hosts`` go with a reboot."""
    try:
        yield
    finally:
        for host in hosts:
            lab.power_off(host)


def do(lab, host, *command):
    done = lab.run(host, [*command])
    assert done.returncode == 0, done.stdout


def replaced(lab, host, path, text, folder):
    """On ``host`` the file ``path`` has other contents."""
    other = folder / f"{host}-{path.name}"
    other.write_text(text)
    do(lab, host, "mount", "--bind", str(other), str(path))


def doctor(lab, host, *arguments, user=()):
    """Exit code, document, what stands on the terminal, seconds."""
    out = Path(tempfile.mkdtemp(prefix="gemini-doctor-"))
    out.chmod(0o777)
    began = time.monotonic()
    try:
        command = [*user, PYTHON, "launch/doctor.py", "--json", str(out / "found.json"), *arguments]
        done = lab.run(host, command, 120, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"})
        took_s = time.monotonic() - began
        assert (out / "found.json").exists(), done.stdout
        return done.returncode, json.loads((out / "found.json").read_text()), done.stdout, took_s
    finally:
        shutil.rmtree(out)


def not_ok(document):
    """But for the launcher: it depends on the ssh of the distribution, which may have a limit of its own."""
    found = [one for one in document["findings"] if one["verdict"] != "ok" and one["check"] != "launcher"]
    return {(one["verdict"], one["subject"], one["check"]) for one in found}


def left(lab, hosts):
    return [line for host in hosts for line in lab.processes(host) if "doctor" in line]


def test_each_fault_is_found_and_nothing_else(lab, tmp_path):
    hosts = ["h0", "h1", "h2", "h3", "h4"]
    for host in hosts:  # the same for all, so that the busy machine below does not decide which link is slow
        lab.bandwidth(host, "1gbit")
    shared = lab.nfs_up()  # sshfs: a lock holds only on the machine that took it
    before = set(os.listdir(lab.folder / "nas-disk"))  # of tests before this one
    torch = next(path for path in metadata.files("torch") if path.name == "METADATA").locate()
    with tampered(lab, "h1", "h2"):
        replaced(lab, "h1", Path(torch), "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n", tmp_path)
        replaced(lab, "h2", Path(json.__file__), Path(json.__file__).read_text() + CLOCK, tmp_path)
        do(lab, "h2", "sh", "-c", "mount -o remount,size=300m /dev/shm && fallocate -l 200M /dev/shm/full")
        do(lab, "h2", "mount", "-t", "tmpfs", "tmpfs", str(shared))
        do(lab, "h1", *BLOCKED.format(lab.address("h0")).split())
        lab.bandwidth("h3", "100mbit")
        lab.power_off("h4")
        code, document, said, took_s = doctor(lab, "h0", f"run_dir={shared}/run", "--hostfile", lab.hostfile(hosts))
        assert left(lab, hosts) == []
    assert not_ok(document) == {
        ("bad", "h4", "reach"),
        ("bad", "h1", "torch"),
        ("bad", "h2", "clock"),
        ("bad", "h2", "/dev/shm"),
        ("bad", "h2", "run_dir"),
        ("bad", "h0 -> h1", "ports"),
        ("bad", "h1 -> h0", "ports"),
        ("remark", "h3", "bandwidth"),
        ("remark", "h1, h3", "locks"),
        ("remark", "all", "collectives"),
    }, said
    assert code == 1 and document["verdict"] == "bad"
    assert "ssh -v h4 true" in said and "pip install torch==" in said and "sudo timedatectl" in said
    assert set(os.listdir(lab.folder / "nas-disk")) == before, "it leaves nothing in the run directory"
    assert took_s < 60
    lab.nfs_down()


def test_a_user_who_is_not_root_finds_nothing_wrong(lab):
    """With an sshd, a key and a home of this user's own."""
    hosts, uid, folder = ["h0", "h1"], 47110, Path(tempfile.mkdtemp(prefix="gemini-doctor-"))
    keys = folder / "home" / ".ssh"
    keys.mkdir(parents=True)
    do(lab, "h0", "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / "key"))
    (keys / "authorized_keys").write_text((keys / "key.pub").read_text())
    (keys / "config").write_text(f"Host *\n Port 2222\n IdentityFile {keys}/key\n ServerAliveInterval 5\n")
    (folder / "passwd").write_text(
        Path("/etc/passwd").read_text().rstrip("\n") + f"\ntrainee:x:{uid}:{uid}::{folder}/home:/bin/sh\n"
    )
    settings = (lab.folder / "sshd_config").read_text().replace(f"{lab.folder}/key.pub", f"{keys}/authorized_keys")
    (folder / "sshd_config").write_text(f"Port 2222\n{settings}")
    hostfile = Path(shutil.copy(lab.hostfile(hosts), folder / "hostfile"))
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, uid)
    try:
        with tampered(lab, *hosts):
            for host in hosts:
                lab.bandwidth(host, "1gbit")
                do(lab, host, "mount", "--bind", str(folder / "passwd"), "/etc/passwd")
                do(lab, host, "/usr/sbin/sshd", "-f", str(folder / "sshd_config"))
                do(lab, host, "sh", "-c", OPEN_HOME, "sh", sys.base_prefix, sys.prefix, str(ROOT))
            user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "env", f"HOME={folder}/home"]
            user += ["USER=trainee"]
            arguments = ["--hostfile", str(hostfile), f"run_dir={folder}/run"]
            code, document, said, _ = doctor(lab, "h0", *arguments, user=user)
        assert [machine["facts"].get("user") for machine in document["machines"]] == ["trainee"] * 2, said
        assert not_ok(document) == set() and code == 0, said
        assert "all-reduce and all_to_all over 2 ranks with gloo" in said
    finally:
        shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("word", ["links between", "an all-reduce"])
def test_a_host_that_loses_power_meanwhile_costs_seconds(lab, tmp_path, word):
    hosts = ["h0", "h1", "h2"]
    command = [PYTHON, "-u", "launch/doctor.py", "--hostfile", str(lab.hostfile(hosts)), f"run_dir={tmp_path}"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    began, said = time.monotonic(), ""
    with lab.popen("h0", command, **options) as process:
        for line in process.stdout:
            said += line
            if word in line and lab.is_on("h1"):
                lab.power_off("h1")
    assert process.returncode == 1 and "went away meanwhile" in said and "ssh -v h1 true" in said
    assert "bad: h1; type" in said and time.monotonic() - began < 90, said
    assert left(lab, hosts) == [] and os.listdir(tmp_path) == []


@pytest.mark.long
def test_a_file_server_that_is_off_is_named_and_holds_nothing_up(lab):
    hosts, shared = ["h0", "h1"], lab.nfs_up()
    lab.link(NAS, False)
    try:
        arguments = ["--hostfile", str(lab.hostfile(hosts)), f"run_dir={shared}"]
        code, document, said, took_s = doctor(lab, "h0", *arguments)
    finally:
        lab.link(NAS, True)
        lab.nfs_down()
    assert code == 1 and ("bad", "h0", "run_dir") in not_ok(document), said
    assert "all-reduce and all_to_all over 2 ranks" in said and took_s < 90 and left(lab, hosts) == []
