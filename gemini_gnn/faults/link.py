"""``cut-link``: take the network device down by which this machine reaches the others, and bring it up again."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from gemini_gnn.errors import ConfigError

CAP_NET_ADMIN = 12

# The answer to who asked leaves first, by the same link. A device that is down loses the routes that were added by hand, and
# would lose its IPv6 addresses.
CUT = """
trap '' TERM INT HUP
sleep 0.3
keep="/proc/sys/net/ipv6/conf/$0/keep_addr_on_down"
before=$(cat "$keep" 2>/dev/null) && echo 1 2>/dev/null > "$keep"
ip link set dev "$0" down
sleep "$1"
for try in 1 2 3 4 5; do ip link set dev "$0" up && break; sleep 1; done
[ -z "$before" ] || echo "$before" 2>/dev/null > "$keep"
"""


def check(machines: int) -> None:
    """
    Raises:
        ConfigError: a link of this machine cannot be cut, or there is none to cut.
    """
    expected, machine = "", os.uname().nodename
    if machines < 2:
        expected = "a job on several machines; on one machine there is no link to cut"
    elif shutil.which("ip") is None:
        expected = f"the command `ip` on {machine}: apt-get install iproute2"
    elif not _may_set_links():
        expected = f"the right to set network devices on {machine}: start the job as root, or with CAP_NET_ADMIN"
    if expected:
        raise ConfigError(f"cut-link: expected {expected}")


def device_to(address: str) -> str:
    """The network device by which this machine reaches ``address``, or that has it.

    Raises:
        ConfigError: there is none.
    """
    import psutil

    try:
        family, _, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing: only the kernel's routes are asked
            probe.connect(where)
            own = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"cut-link: {os.uname().nodename} has no way to {address} ({error.strerror})") from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name
    raise ConfigError(f"cut-link: expected a network device with the address {own} on {os.uname().nodename}")


def cut(device: str, seconds: float) -> int:
    """Cut it in a moment, for so long; returns the pid of the child that does so. It must outlive us: let it live."""
    command = ["sh", "-c", CUT, device, f"{seconds:.3f}"]
    return os.posix_spawnp("sh", command, os.environ, setsid=True)


def _may_set_links() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_NET_ADMIN & 1)
    return False
