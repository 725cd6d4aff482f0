"""``cut-link``: take the network device down by which this machine reaches the others, and bring it up again.

``split``: send what is for some machines to nobody, and undo that. Each machine of both sides does so, and each side then
hears nothing of the other. A wrong entry in the table of neighbors does it: frames leave for a hardware address that no
card has. As with a cut cable, a connection notices nothing but silence; it needs no firewall, and no package but iproute2.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gemini_gnn.errors import ConfigError

CAP_NET_ADMIN, CAP_SYS_BOOT = 12, 22  # linux/capability.h
NOBODY = "02:00:00:00:00:00"  # of the range for local use

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
SPLIT = """
trap '' TERM INT HUP
sleep 0.3
printf %s "$0" | ip -force -batch -
sleep "$1"
printf %s "$2" | ip -force -batch -
"""


def check(kind: str, machines: int) -> None:
    """
    Args:
        kind: of the fault, cut-link or split.

    Raises:
        ConfigError: a link of this machine cannot be cut, or there is none to cut.
    """
    expected, machine = "", os.uname().nodename
    if machines < 2:
        expected = "a job on several machines; on one machine there is no link to cut"
    elif shutil.which("ip") is None:
        expected = f"the command `ip` on {machine}: apt-get install iproute2"
    elif not may(CAP_NET_ADMIN):
        expected = f"the right to set network devices on {machine}: start the job as root, or with CAP_NET_ADMIN"
    if expected:
        raise ConfigError(f"{kind}: expected {expected}")


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
    return outlive(CUT, device, f"{seconds:.3f}")


def ways_to(machines: Sequence[str]) -> list[tuple[str, str]]:
    """The addresses of ``machines`` (names or addresses), each with the device by which this machine reaches it.

    Raises:
        ConfigError: none can be reached; or one is this machine's own, or behind a router.
    """
    found: dict[str, str] = {}
    for machine in machines:
        with contextlib.suppress(OSError):  # a name that only its own machine knows: the root gives its address, too
            for info in socket.getaddrinfo(machine, None, type=socket.SOCK_STREAM):
                if device := _way_to(machine, address := str(info[4][0])):
                    found[address] = device
    if not found:
        raise ConfigError(f"split: {os.uname().nodename} finds no way to {', '.join(machines)}: is the network up?")
    return list(found.items())


def _way_to(machine: str, address: str) -> str:
    """The device by which this machine sends to ``address`` itself; empty if there is none."""
    command = ["ip", f"-{ipaddress.ip_address(address).version}", "-j", "route", "get", address]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if asked.returncode:
        return ""
    (route,) = json.loads(asked.stdout)
    if "gateway" in route or route["dev"] == "lo":
        met = f"the router {route['gateway']} before" if "gateway" in route else "itself as"
        raise ConfigError(
            f"split: expected machines of one network; {os.uname().nodename} finds {met} {machine}, {address}. "
            "Type 'cut-link MACHINE --for 20s'"
        )
    return str(route["dev"])


def split(ways: Sequence[tuple[str, str]], seconds: float) -> int:
    """Send nothing to these addresses (see :func:`ways_to`), in a moment and for so long; returns a pid as :func:`cut`."""
    lose = "".join(f"neigh replace {address} lladdr {NOBODY} dev {dev} nud permanent\n" for address, dev in ways)
    find = "".join(f"neigh del {address} dev {dev}\n" for address, dev in ways)
    return outlive(SPLIT, lose, f"{seconds:.3f}", find)


def outlive(script: str, *arguments: str) -> int:
    """Run a shell script with ``$0``, ... in a session of its own; returns its pid.

    It has none of our environment: by the job's mark in it, whoever cleans up after a killed agent would end the child,
    and nobody would put back what it has changed.
    """
    return os.posix_spawnp("sh", ["sh", "-c", script, *arguments], {"PATH": os.environ["PATH"]}, setsid=True)


def may(capability: int) -> bool:
    """Whether this process has it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False
