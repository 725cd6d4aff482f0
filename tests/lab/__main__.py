"""``python -m tests.lab``: a cluster on one machine, from the command line. See docs/lab.md."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.lab.lab import Lab, LabError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tests.lab", description="A cluster on one machine (root on Linux).")
    top.add_argument("--name", default="default", help="several labs can run side by side")
    commands = top.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="build it: hosts h0, h1, ...")
    up.add_argument("--hosts", type=int, default=5)
    up.add_argument("--nics", type=int, default=1, help="network cards per host")
    up.add_argument("--shm", default="4g", help="size of each host's /dev/shm")
    run = commands.add_parser("exec", help="exec h0 -- CMD: run a command on a host")
    run.add_argument("host")
    run.add_argument("argv", nargs=argparse.REMAINDER)
    for name, text in (("power-off", "pull the plug"), ("power-on", "boot it again, with empty memory")):
        commands.add_parser(name, help=text).add_argument("host")
    link = commands.add_parser("link", help="pull the network cable, or put it back")
    link.add_argument("host")
    link.add_argument("state", choices=["up", "down"])
    bandwidth = commands.add_parser("bandwidth", help="limit a link: 1gbit, 200mbit, unlimited")
    bandwidth.add_argument("host")
    bandwidth.add_argument("rate")
    nfs = commands.add_parser("nfs", help="a folder over the network, mounted on every host")
    nfs.add_argument("state", choices=["up", "down"])
    commands.add_parser("hostfile", help="print a hostfile of the lab").add_argument("--slots", type=int, default=1)
    commands.add_parser("status", help="what is on, what is off")
    commands.add_parser("down", help="end it, or what a crashed one left")
    return top


def state_folder(name: str) -> Path:
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise LabError(f"--name: expected letters, digits, - and _; got {name!r}")
    return Path(f"/tmp/gemini-lab-{os.geteuid()}") / name


def show(lab: Lab) -> None:
    print(f"lab {lab.folder.name}: {'running' if lab.alive else 'dead, take it down'}, state in {lab.folder}")
    for name, host in lab.hosts.items():
        power = "on" if lab.alive and lab.is_on(name) else "off"
        cable = "up" if host.link else "down"
        address = " ".join(lab.address(name, nic) for nic in range(lab.nics))
        print(f"  {name:5} {power:4} link {cable:5} {host.rate or 'unlimited':10} {address}  {lab.address6(name)}")
    if lab.nfs:
        print(f"  network file system: {lab.folder / 'nfs'} on every host but nas")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    folder = state_folder(args.name)
    if args.command == "up":
        show(Lab.up(folder, args.hosts, nics=args.nics, shm=args.shm))
        return 0
    if args.command == "down":
        Lab.clean(folder)
        return 0
    lab = Lab.load(folder)
    if args.command == "exec":
        command = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
        return subprocess.call(lab.command(args.host, command or ["bash"]))
    if args.command == "power-off":
        lab.power_off(args.host)
    elif args.command == "power-on":
        lab.power_on(args.host)
    elif args.command == "link":
        lab.link(args.host, args.state == "up")
    elif args.command == "bandwidth":
        lab.bandwidth(args.host, args.rate)
    elif args.command == "nfs":
        if args.state == "up":
            print(lab.nfs_up())
        else:
            lab.nfs_down()
    elif args.command == "hostfile":
        print("".join(f"{name} slots={args.slots}\n" for name in lab.hosts if name != "nas"), end="")
    elif args.command == "status":
        show(lab)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as error:
        sys.exit(f"lab: {error}")
