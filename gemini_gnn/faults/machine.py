"""Faults of a whole machine: its power, and the file system that it shares with the others.

``power-off`` cannot be undone. So it is for hosts of the lab (docs/lab.md) alone, and looks twice. Such a host is a PID
namespace: reboot(2) in it ends its first process, and with that all others at once. In the namespace that a machine boots
into, the same call would switch the machine off. The mark of the lab names the host's namespace. A copied, an inherited or
a forgotten mark is therefore none.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import link

MARK = Path("/run/gemini-gnn-lab")  # in the host's own tmpfs; it says what /proc/self/ns/pid says there
BOOTED_INTO = "pid:[4026531836]"  # PROC_PID_INIT_INO of linux/proc_ns.h: of every machine the same
POWER_OFF = 0x4321FEDC  # LINUX_REBOOT_CMD_POWER_OFF
# Nothing of ours may be on the file system that hangs: no folder in which `sleep` is looked for, and no log that it closes.
HANG = """
PATH=/usr/bin:/bin
exec > /dev/null 2>&1
trap '' TERM INT HUP
sleep 0.3
kill -STOP "$0"
sleep "$1"
kill -CONT "$0"
"""


def check_power() -> None:
    """
    Raises:
        ConfigError: this is no host of the lab, or this process may not switch it off.
    """
    here, machine = os.readlink("/proc/self/ns/pid"), os.uname().nodename
    if here == BOOTED_INTO or not MARK.is_file() or MARK.read_text().strip() != here:
        raise ConfigError(
            f"power-off: expected a host of the lab (docs/lab.md); {machine} is none. On a real machine only what may be "
            f"undone is done: type 'cut-link {machine} --for 20s' or 'kill-agent {machine}'"
        )
    if not link.may(link.CAP_SYS_BOOT):
        raise ConfigError(f"power-off: expected the right to reboot {machine}: start the job as root")


def power_off() -> int:
    """Switch this host off in a moment; returns the pid of the child that does so.

    Raises:
        ConfigError: see :func:`check_power`.
    """
    check_power()
    command = [sys.executable, "-P", "-m", "gemini_gnn.faults.machine"]
    return os.posix_spawn(sys.executable, command, os.environ, setsid=True)


def _power_off_now() -> None:
    time.sleep(0.3)  # the answer to the visitor leaves first
    check_power()
    for _, device in socket.if_nameindex():  # a machine without power says no farewell
        subprocess.run(["ip", "link", "set", "dev", device, "down"], check=True, timeout=10)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.reboot(POWER_OFF) != 0:
        raise OSError(ctypes.get_errno(), "reboot(2)")


def file_server(folder: Path) -> int:
    """Pid of the process on this machine that serves the file system of ``folder``.

    Raises:
        ConfigError: no process of this machine does, or there is no telling which.
    """
    device, kind = _file_system(folder.resolve())
    pids = {pid for pid in os.listdir("/proc") if pid.isdigit() and _serves(Path("/proc") / pid, device)}
    if not kind.startswith("fuse") or len(pids) != 1:
        got = f"{len(pids)} processes that serve it" if kind.startswith("fuse") else f"a file system of type {kind}"
        raise ConfigError(
            f"hang-filesystem: expected {folder} on a file system that one process of {os.uname().nodename} serves, such as "
            f"sshfs; got {got}. In the lab, use the folder of `python -m tests.lab nfs up`; elsewhere, cut-link the machine"
        )
    return int(pids.pop())


def _file_system(folder: Path) -> tuple[int, str]:
    """Minor number and type of the file system that ``folder`` is or would be on."""
    best, found = Path(), (0, "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        _, _, device, _, where, *_ = fields.split(" ")
        mount = Path(where.replace("\\040", " "))
        if folder.is_relative_to(mount) and len(mount.parts) >= len(best.parts):  # of two at one place, the later one
            best, found = mount, (int(device.partition(":")[2]), source.split(" ")[0])
    return found


def _serves(process: Path, device: int) -> bool:
    try:
        for descriptor in (process / "fd").iterdir():
            if os.readlink(descriptor) == "/dev/fuse":
                told = (process / "fdinfo" / descriptor.name).read_text().partition("fuse_connection:")[2].split()
                if not told or int(told[0]) == device:  # older kernels do not tell
                    return True
    except OSError:
        return False  # gone, or another user's
    return False


def hang(server: int, seconds: float) -> int:
    """Stop the process that serves files, in a moment and for so long; returns a pid as :func:`link.cut`."""
    return link.outlive(HANG, str(server), f"{seconds:.3f}")


if __name__ == "__main__":
    _power_off_now()
