"""Several hosts on one machine: own network, hostname, process table, /dev/shm and sshd each; one shared file system.

How it is built
    The *switch* is a process in a network and a PID namespace of its own; a bridge lives there. Every host is a process
    tree in further namespaces (network, mount, UTS, PID) *inside* the switch's PID namespace, joined to the bridge by a
    veth pair. Its first process is sshd, so pdsh, ssh and the real launchers work between hosts.

Why nothing stays behind
    All of it hangs on the switch process. When that is gone the kernel kills every process of its PID namespace, and
    with the last process of a namespace go its interfaces and mounts. Nothing is created in the machine's own
    network or mount namespace: no bridge, no netns name, no line in /etc/hosts, nothing in ~/.ssh. The state folder is
    the only thing on disk. A lab with an owner (pytest) dies with it, by the kernel's parent-death signal; one made by
    the command line lives until ``down`` or a reboot. New processes wait for a word from who made them before they do
    anything and leave when that word cannot come, so a maker that is killed halfway leaves nothing either.

What may be lost
    ``lab.json`` is written after each change and under a lock. A process id in it counts only together with that
    process's start time, so remains of a crashed lab are never mistaken for somebody else's processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SSHD = "/usr/sbin/sshd"
NAS = "nas"  # the host that serves the network file system
TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "pdsh", SSHD)
GONE = "this lab's processes are gone (a reboot, or its owner died); `down`, then `up` again"
PACKAGES = "apt-get install openssh-server pdsh iproute2 util-linux sshfs"

# argv: hostname, state folder, size of /dev/shm. The first read is the maker's word that the network is ready. The mark
# allows faults to switch this host off: gemini_gnn/faults/machine.py.
BOOT = """
read -r go || exit 1
set -e
hostname "$1"
mount -t tmpfs -o "size=$3,mode=1777" tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
readlink /proc/self/ns/pid > /run/gemini-gnn-lab
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
exec /usr/sbin/sshd -D -e -f "$2/sshd_config"
"""


class LabError(Exception):
    """The lab cannot do this; the message says why and what to do."""


@dataclass
class Host:
    """One host: ``pid`` and ``started`` name its first process as seen from outside; pid 0 means powered off."""

    name: str
    number: int
    pid: int = 0
    started: int = 0
    link: bool = True
    rate: str = ""  # "" = unlimited


@dataclass
class Lab:
    """A running lab. Make one with :meth:`up`, find one again with :meth:`load`."""

    folder: Path
    subnet: int
    nics: int = 1
    shm: str = "4g"
    switch_pid: int = 0
    switch_started: int = 0
    owned: bool = False
    nfs: bool = False
    hosts: dict[str, Host] = field(default_factory=dict)
    _children: list[subprocess.Popen] = field(default_factory=list, repr=False)

    # --- life -------------------------------------------------------------------------------------------------------

    @classmethod
    def up(cls, folder: Path, hosts: int = 5, *, nics: int = 1, shm: str = "4g", owned: bool = False) -> Lab:
        """Build a lab of ``hosts`` hosts h0, h1, ... and wait until each answers ssh.

        Args:
            folder: its state (keys, lab.json); must not exist, or hold the remains of a lab that is gone.
            nics: network cards per host, eth0, eth1, ...; each in a network of its own.
            shm: size of each host's /dev/shm.
            owned: it dies with the calling thread.

        Raises:
            LabError: this machine cannot; or a lab already runs in ``folder``.
        """
        reason = missing()
        if reason:
            raise LabError(reason)
        if not 1 <= hosts <= 100 or not 1 <= nics <= 4:
            raise LabError(f"expected 1 to 100 hosts with 1 to 4 network cards; got {hosts} and {nics}")
        if (folder / "lab.json").exists() and cls.load(folder).alive:
            raise LabError(f"a lab already runs in {folder}; take it down first, or give this one another --name")
        cls.clean(folder)
        folder.mkdir(parents=True, mode=0o700)
        lab = cls(folder, zlib.crc32(str(folder).encode()) % 200, nics, shm, owned=owned)
        try:
            lab._write_files(hosts)
            lab._start_switch()
            for number in range(hosts):
                lab.hosts[f"h{number}"] = Host(f"h{number}", number)
            for name in list(lab.hosts):
                lab._boot(name)
            for name in list(lab.hosts):
                lab._wait_for_sshd(name)
            lab._release()
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def load(cls, folder: Path) -> Lab:
        """The lab whose state is in ``folder``.

        Raises:
            LabError: there is none.
        """
        try:
            state = json.loads((folder / "lab.json").read_text())
        except FileNotFoundError:
            raise LabError(f"no lab in {folder}; start one with `python -m tests.lab up --hosts 5`") from None
        hosts = {name: Host(**values) for name, values in state.pop("hosts").items()}
        return cls(folder=folder, hosts=hosts, **state)

    @classmethod
    def clean(cls, folder: Path) -> None:
        """End whatever a lab in ``folder`` left, also a crashed one. Idempotent."""
        with contextlib.suppress(LabError, ValueError, TypeError):
            cls.load(folder).down()
        if folder.exists():
            shutil.rmtree(folder)

    @property
    def alive(self) -> bool:
        return _start_time(self.switch_pid) == self.switch_started != 0

    def down(self) -> None:
        """End every process of the lab and remove its folder. Idempotent."""
        if self.alive:
            os.kill(self.switch_pid, signal.SIGKILL)
        pids = [(self.switch_pid, self.switch_started)] + [(h.pid, h.started) for h in self.hosts.values()]
        _wait(lambda: all(_start_time(p) != s or not s for p, s in pids), 20, "processes of the lab survive SIGKILL")
        for child in self._children:
            if child.stdin:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()
            child.wait(timeout=20)
        self._children.clear()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # --- use --------------------------------------------------------------------------------------------------------

    def address(self, name: str, nic: int = 0) -> str:
        return f"10.{self.subnet}.{nic}.{self._host(name).number + 1}"

    def address6(self, name: str, nic: int = 0) -> str:
        return f"fd00:{self.subnet:x}:{nic:x}::{self._host(name).number + 1:x}"

    def has_ipv6(self, name: str) -> bool:
        table = Path(f"/proc/{self._host(name).pid}/net/if_inet6")
        return table.exists() and "fd00" in table.read_text()

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """``command`` as it must be run from outside to run on that host, in the caller's working directory."""
        host = self._host(name)
        if not self.alive:
            raise LabError(GONE)
        if not self.is_on(name):  # its process id may be somebody else's by now
            raise LabError(f"{name} is powered off; `power-on {name}` first")
        enter = ["nsenter", "-t", str(host.pid), "-m", "-u", "-n", "-p", "--"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *command]

    def popen(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start ``command`` on a host, in a session of its own: :func:`kill_group` ends it with its children."""
        return subprocess.Popen(self.command(name, command), start_new_session=True, **options)

    def run(
        self, name: str, command: Sequence[str], timeout_s: float = 60, **options: Any
    ) -> subprocess.CompletedProcess:
        """Run ``command`` on a host; stdout and stderr as one text.

        Raises:
            TimeoutError: it took longer than ``timeout_s``; what it had printed is in the message. It is killed.
        """
        process = self.popen(
            name, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **options
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            kill_group(process)
            output, _ = process.communicate(timeout=20)
            raise TimeoutError(f"{name}: {shlex.join(command)} took longer than {timeout_s} s:\n{output}") from None
        finally:
            kill_group(process)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def hostfile(self, hosts: Sequence[str], slots: int = 1) -> Path:
        path = self.folder / f"hostfile-{'-'.join(hosts)}-{slots}"
        path.write_text("".join(f"{host} slots={slots}\n" for host in hosts))
        return path

    def disk(self, name: str, path: str) -> Path:
        """``path`` on a host's own disks, as it is reached from here; gone with the host's power."""
        return Path(f"/proc/{self._host(name).pid}/root{path}")

    def is_on(self, name: str) -> bool:
        """False for a host that was powered off, or whose first process was killed."""
        host = self._host(name)
        return _start_time(host.pid) == host.started != 0

    def processes(self, name: str) -> list[str]:
        """Command lines of what runs on a host, without its sshd and without this question."""
        if not self.is_on(name):
            return []
        lines = self.run(name, ["ps", "-eo", "pid=,args="]).stdout.splitlines()
        return [line.split(None, 1)[1] for line in lines if "sshd" not in line and "ps -eo" not in line]

    # --- failures ---------------------------------------------------------------------------------------------------

    def power_off(self, name: str) -> None:
        """Pull the plug: first the cable, so that no farewell gets out, then every process at once."""
        with self._lock():
            host = self._host(name)
            if not host.pid:
                return
            crashed = not self.is_on(name)  # its cards may be gone already
            self._switch([f"link set {self._port(host, nic)} down" for nic in range(self.nics)], force=crashed)
            if _start_time(host.pid) == host.started:
                os.kill(host.pid, signal.SIGKILL)
            _wait(lambda: _start_time(host.pid) != host.started, 20, f"{name} survives SIGKILL")
            # The kernel takes the cards away with the namespace, some time later; a new host needs the names now.
            self._switch([f"link del {self._port(host, nic)}" for nic in range(self.nics)], force=True)
            host.pid = host.started = 0
            self._save()

    def power_on(self, name: str) -> None:
        """Boot a host that is off: same name, address and link settings, empty memory."""
        if self._host(name).pid and not self.is_on(name):
            self.power_off(name)  # crashed: what is left of it goes first
        with self._lock():
            if self._host(name).pid:
                return
            self._boot(name)
            self._wait_for_sshd(name)
            self._release()
            if self.nfs and name != NAS:
                self._mount(name)

    def link(self, name: str, up: bool) -> None:
        """Pull a host's network cables, or put them back. Its processes go on."""
        with self._lock():
            host = self._host(name)
            host.link = up
            if host.pid:
                self._wire(host)
            self._save()

    def split(self, names: Sequence[str]) -> None:
        """Cut the network in two: ``names`` hear only each other, the others too. The files are still everybody's."""
        with self._lock():
            for nic in range(self.nics):
                other = f"split{nic}"
                self._switch([f"link add {other} type bridge", f"link set {other} up"], force=True)  # it may be there
                self._switch([f"link set {self._port(self._host(name), nic)} master {other}" for name in names])

    def heal(self) -> None:
        """One network again."""
        with self._lock():
            on = [host for host in self.hosts.values() if host.pid]
            self._switch(
                [f"link set {self._port(host, nic)} master br{nic}" for host in on for nic in range(self.nics)]
            )

    def bandwidth(self, name: str, rate: str) -> None:
        """Limit a host's links in both directions to ``rate`` as ``tc`` writes it (1gbit, 200mbit), or "unlimited"."""
        with self._lock():
            host = self._host(name)
            host.rate = "" if rate == "unlimited" else rate
            if host.rate:
                bits_per_s(rate)
            if host.pid:
                self._wire(host)
            self._save()

    def nfs_up(self) -> Path:
        """Serve a folder from a host of its own, ``nas``, and mount it on the others; returns its path there."""
        if not shutil.which("sshfs") or not os.path.exists("/dev/fuse"):
            raise LabError("the network file system needs sshfs and /dev/fuse: apt-get install sshfs")
        with self._lock():
            if NAS not in self.hosts:
                self.hosts[NAS] = Host(NAS, 200)
            if not self.hosts[NAS].pid:
                self._boot(NAS)
                self._wait_for_sshd(NAS)
                self._release()
            self.nfs = True
            self._save()
            for name, host in self.hosts.items():
                if name != NAS and host.pid:
                    self._mount(name)
        return self.folder / "nfs"

    def nfs_down(self) -> None:
        """Unmount it everywhere; the files stay on ``nas`` until the lab goes."""
        with self._lock():
            for name, host in self.hosts.items():
                if name != NAS and host.pid:
                    self.run(name, ["umount", "-l", str(self.folder / "nfs")])
            self.nfs = False
            self._save()

    # --- how ----------------------------------------------------------------------------------------------------------

    def _host(self, name: str) -> Host:
        if name not in self.hosts:
            raise LabError(f"no host {name}; this lab has {', '.join(self.hosts)}")
        return self.hosts[name]

    @staticmethod
    def _port(host: Host, nic: int) -> str:
        return f"{host.name}.{nic}"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One command at a time; state read anew, as another process may have changed it."""
        if not self.folder.exists():
            raise LabError(f"the lab in {self.folder} is gone")
        with open(self.folder / "lock", "w") as file:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    raise LabError(f"another command has held {file.name} for a minute")
                time.sleep(0.02)
            fresh = Lab.load(self.folder)
            self.hosts, self.nfs = fresh.hosts, fresh.nfs
            if not self.alive:
                raise LabError(GONE)
            yield

    def _save(self) -> None:
        state = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("folder", "hosts", "_children")
        }
        state["hosts"] = {name: dataclasses.asdict(host) for name, host in self.hosts.items()}
        path = self.folder / "lab.json"
        path.with_suffix(".new").write_text(json.dumps(state, indent=1))
        path.with_suffix(".new").replace(path)

    def _write_files(self, hosts: int) -> None:
        for key in ("key", "host_key"):
            _call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(self.folder / key)])
        names = [(f"h{n}", n + 1) for n in range(hosts)] + [(NAS, 201)]
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        for name, last in names:
            lines += [f"10.{self.subnet}.0.{last} {name}", f"fd00:{self.subnet:x}:0::{last:x} {name}-v6"]
            lines += [f"10.{self.subnet}.{nic}.{last} {name}-eth{nic}" for nic in range(1, self.nics)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.folder}/key\n IdentitiesOnly yes\n BatchMode yes\n"
            " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/key.pub\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 200\n"
            "LogLevel ERROR\nSubsystem sftp internal-sftp\nUseDNS no\nPrintMotd no\n"
        )
        for name in ("nfs", "nas-disk"):
            (self.folder / name).mkdir()

    def _spawn(self, command: Sequence[str], log: Path | None = None) -> tuple[subprocess.Popen, int]:
        """Start ``... unshare -f ...`` and return it with the id of the first process of its new PID namespace."""
        with open(log or os.devnull, "ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, cwd="/"
            )
        self._children.append(process)
        # nsenter -> unshare -> first process; or unshare -> first process
        depth = 2 if command[0] == "nsenter" else 1
        found: list[int] = []

        def first() -> bool:
            if process.poll() is not None:
                said = f": {log.read_text()[-500:]}" if log else ""
                raise LabError(f"{shlex.join(command)[:80]}... ended with {process.returncode}{said}")
            pids = [process.pid]
            for _ in range(depth):
                pids = [child for pid in pids for child in _children_of(pid)]
            found[:] = pids
            return bool(pids)

        _wait(first, 20, "the new namespace has no first process")
        return process, found[0]

    def _start_switch(self) -> None:
        die_with_us = ["setpriv", "--pdeathsig", "KILL"] if self.owned else []
        # setpriv becomes unshare by exec; the shell becomes sleep, once we have said so.
        inside = ["unshare", "-n", "-p", "-f", "--kill-child", "sh", "-c", "read -r go && exec sleep infinity"]
        _, self.switch_pid = self._spawn([*die_with_us, *inside])
        self.switch_started = _start_time(self.switch_pid)
        self._save()
        bridges = [f"link add br{nic} type bridge\nlink set br{nic} up" for nic in range(self.nics)]
        self._switch(["link set lo up", *bridges])

    def _boot(self, name: str) -> None:
        """Start a host's first process and wire it up; :meth:`_release` afterwards lets go of it."""
        host = self._host(name)
        enter = ["nsenter", "-t", str(self.switch_pid), "-p", "-n"]
        boot = ["unshare", "-n", "-m", "-u", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-c", BOOT, "boot"]
        process, host.pid = self._spawn([*enter, *boot, name, str(self.folder), self.shm], self.folder / f"{name}.log")
        host.started = _start_time(host.pid)
        self._save()
        last = host.number + 1
        commands = ["link set lo up"]
        for nic in range(self.nics):
            port = self._port(host, nic)
            self._switch(
                [f"link add {port} type veth peer name eth{nic} netns {host.pid}", f"link set {port} master br{nic}"]
            )
            # The same card after a reboot: the others remember its hardware address.
            commands += [
                f"link set eth{nic} address 02:00:{self.subnet:02x}:{nic:02x}:00:{last:02x}",
                f"addr add 10.{self.subnet}.{nic}.{last}/24 dev eth{nic}",
                f"link set eth{nic} up",
            ]
        _ip(host.pid, commands)
        # Some containers have no IPv6: a lab without it is better than none.
        sixth = [f"addr add fd00:{self.subnet:x}:{nic:x}::{last:x}/64 dev eth{nic} nodad" for nic in range(self.nics)]
        _ip(host.pid, sixth, force=True)
        self._wire(host)
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()

    def _release(self) -> None:
        """The word to go on for the switch; from here on nothing hangs on this process's pipes."""
        for process in self._children:
            if process.stdin and not process.stdin.closed:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(b"go\n")
                    process.stdin.close()

    def _wire(self, host: Host) -> None:
        """Make cables and limits what ``host`` says."""
        for nic in range(self.nics):
            port = self._port(host, nic)
            self._switch([f"link set {port} {'up' if host.link else 'down'}"])
            for pid, device in ((self.switch_pid, port), (host.pid, f"eth{nic}")):
                tc = ["nsenter", "-t", str(pid), "-n", "tc", "qdisc"]
                if host.rate:
                    # 4 ms of traffic may pass at once: less than a timer tick's worth would cost throughput.
                    burst = max(128 << 10, int(bits_per_s(host.rate) / 8 * 0.004))
                    limit = ["tbf", "rate", host.rate, "burst", str(burst), "latency", "50ms"]
                    _call([*tc, "replace", "dev", device, "root", *limit])
                else:
                    subprocess.run([*tc, "del", "dev", device, "root"], capture_output=True, timeout=20)

    def _switch(self, commands: Sequence[str], force: bool = False) -> None:
        _ip(self.switch_pid, commands, force)

    def _wait_for_sshd(self, name: str) -> None:
        host = self._host(name)

        def listening() -> bool:
            if _start_time(host.pid) != host.started:
                raise LabError(f"{name} did not boot: {(self.folder / f'{name}.log').read_text()[-500:]}")
            table = Path(f"/proc/{host.pid}/net/tcp").read_text()
            return any(" 00000000:0016 " in line and " 0A " in line for line in table.splitlines())

        _wait(listening, 20, f"no sshd on {name}")

    def _mount(self, name: str) -> None:
        where = str(self.folder / "nfs")
        if self.run(name, ["mountpoint", "-q", where]).returncode == 0:
            return
        source = f"{NAS}:{self.folder}/nas-disk"
        # In a session of its own: its ssh would end with the group of this command. Where the server loses power the mount
        # stays, and its files are back with the server: without it writes would land in the folder underneath.
        options = "cache=no,reconnect,ServerAliveInterval=5,ServerAliveCountMax=3"
        done = self.run(name, ["setsid", "--wait", "sshfs", "-o", options, source, where])
        if done.returncode or self.run(name, ["mountpoint", "-q", where]).returncode:
            raise LabError(f"{name} cannot mount {source}: {done.stdout.strip()}")


def missing() -> str | None:
    """Why a lab cannot be built on this machine, or None."""
    if platform.system() != "Linux":
        return f"the lab needs Linux namespaces; this is {platform.system()}"
    if os.geteuid() != 0:
        return "the lab needs root, for network and PID namespaces: try `sudo`"
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        return f"the lab needs {', '.join(absent)}: {PACKAGES}"
    for what, command in (
        ("namespaces", "unshare -n -m -u -p -f --mount-proc true"),
        ("bridges", "unshare -n ip link add br0 type bridge"),
        ("veth pairs", "unshare -n ip link add one type veth peer name two"),
        ("tc tbf", "unshare -n tc qdisc add dev lo root tbf rate 1gbit burst 1mb latency 50ms"),
    ):
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
        if done.returncode:
            return f"the lab needs {what}; this kernel or container refuses: {done.stderr.strip()}"
    return None


def kill_group(process: subprocess.Popen) -> None:
    """End a process started in a session of its own, with all of its process group that still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def bits_per_s(rate: str) -> float:
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    number, unit = rate[:-4], rate[-4:].lower()
    if unit not in units or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", number) or float(number) == 0:
        raise LabError(f"expected a rate like 1gbit, 200mbit or unlimited; got {rate!r}")
    return float(number) * units[unit]


def _call(command: Sequence[str], stdin: str | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, input=stdin)
    if done.returncode:
        raise LabError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()} {stdin or ''}")


def _ip(pid: int, commands: Sequence[str], force: bool = False) -> None:
    """Run ``ip`` commands in the network namespace of process ``pid``; with ``force`` whatever they answer."""
    options = ["-force"] if force else []
    enter = ["nsenter", "-t", str(pid), "-n", "ip", *options, "-batch", "-"]
    with contextlib.suppress(*([LabError] if force else [])):
        _call(enter, "\n".join(commands) + "\n")


def _start_time(pid: int) -> int:
    """Start time of a running process in clock ticks since boot; 0 when there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _children_of(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _wait(ready: Any, timeout_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise LabError(f"{otherwise} after {timeout_s:.0f} s")
        time.sleep(0.01)
