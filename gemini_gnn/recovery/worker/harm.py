"""The harm of a fault on purpose, done by the worker agent of its machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import injection, link, machine
from gemini_gnn.faults.schedule import OF_RANK, Fault
from gemini_gnn.recovery import messages, processes
from gemini_gnn.recovery.root.faults import reads_orders
from gemini_gnn.recovery.worker.children import Children
from gemini_gnn.snapshot.store import arena, format
from gemini_gnn.snapshot.store.identity import shard_of

FILL = """
cat /dev/zero 2> /dev/null
sleep "$0"
"""


def check(kinds: Iterable[str], machines: int) -> None:
    """
    Args:
        machines: of the job.

    Raises:
        ConfigError: this machine lacks what one of these faults needs.
    """
    for kind in kinds:
        if kind in ("cut-link", "split"):
            link.check(kind, machines)
        elif kind == "power-off":
            machine.check_power()


def commit(fault: Fault, children: Children, *, master_addr: str, machines: int) -> str:
    """Do the harm; returns to which process. Does not return from the death of this agent.

    Args:
        master_addr, machines: of the job.

    Raises:
        ConfigError: it cannot be done here.
    """
    name, seconds = os.uname().nodename, fault.for_s or 0.0
    check([fault.kind], machines)
    if fault.kind in OF_RANK:
        return f"{_to_trainer(fault, children)} on {name}"
    if fault.kind == "cut-link":
        device = link.device_to(master_addr)
        children.spared.add(link.cut(device, seconds))
        return f"{device} of {name} is down for {seconds:g} s"
    if fault.kind == "split":
        children.spared.add(link.split(link.ways_to(fault.others.split(",")), seconds))
        return f"{name} sends nothing to {fault.others} for {seconds:g} s"
    if fault.kind == "power-off":
        children.spared.add(machine.power_off())
        return f"{name} loses its power"
    if fault.kind == "hang-filesystem":
        server = machine.file_server(children.journal.run_dir)
        children.spared.add(machine.hang(server, seconds))
        return f"the file system of the run directory, pid {server}, does not answer {name} for {seconds:g} s"
    if fault.kind == "fill-shm":
        _fill(children, seconds)
        return f"the file system of {children.arena} on {name} is full for {seconds:g} s"
    if fault.kind == "corrupt-replica":
        return f"{_to_replica(fault, children)} on {name}"
    if fault.kind == "kill-warm":
        if children.warm is None:
            raise ConfigError(f"{fault}: {name} has no warm parent now; try again")
        os.kill(children.warm.pid, signal.SIGKILL)  # our child, not reaped: the number is its own
        return f"SIGKILL to the warm parent, pid {children.warm.pid} on {name}"
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _to_trainer(fault: Fault, children: Children) -> str:
    trainer = children.trainers.get(int(fault.target))
    if trainer is None or trainer.pid is None:
        raise ConfigError(f"{fault}: rank {fault.target} has no trainer now; try again")
    who = f"rank {fault.target}, pid {trainer.pid}"
    if reads_orders(fault):
        if fault.kind == "oom-rank":
            injection.memory_to_fill()  # the trainers are in this agent's cgroup
        trainer.channel.send(messages.Commit(fault))
        return f"{fault.kind} ordered from {who}"
    number = signal.SIGKILL if fault.kind == "kill-rank" else signal.SIGSTOP
    os.kill(trainer.pid, number)
    return f"{number.name} to {who}"


def _fill(children: Children, seconds: float) -> None:
    """Fill the file system of the arena with a file that has no name: it goes with the child that holds it, however that ends.

    The child has the job's mark and is not spared, so it ends with the job.
    """
    where = os.statvfs(children.arena)
    free, room = where.f_bavail * where.f_frsize, arena.room(children.arena)
    if room.available < free:
        raise ConfigError(
            f"fill-shm: {os.uname().nodename} would run out of memory: {children.arena} has room for {free >> 20} MiB, and "
            f"{room.limit} leaves {room.available >> 20} MiB. Make the file system smaller first: mount -o remount,size=..."
        )
    file = os.open(children.arena, os.O_TMPFILE | os.O_WRONLY, 0o600)
    try:
        environment = {**os.environ, **dict([processes.mark(children.arena)])}
        command = ["sh", "-c", FILL, f"{seconds:.3f}"]
        os.posix_spawnp("sh", command, environment, setsid=True, file_actions=[(os.POSIX_SPAWN_DUP2, file, 1)])
    finally:
        os.close(file)


def _to_replica(fault: Fault, children: Children) -> str:
    shard = shard_of(int(fault.target))
    files = arena.slots(children.arena)
    try:
        views = [(file, file.view()) for file in files if file.shard == shard]
        whole = [
            (view.identity, file) for file, view in views if view.state is format.SlotState.COMMITTED and view.identity
        ]
        if not whole:
            raise ConfigError(f"{fault}: {os.uname().nodename} keeps no copy of {shard}")
        identity, newest = max(whole, key=lambda one: one[0])
        with open(newest.path, "r+b", buffering=0) as slot:
            (byte,) = os.pread(slot.fileno(), 1, format.PAGE)  # the first of the tensors
            os.pwrite(slot.fileno(), bytes([byte ^ 1]), format.PAGE)
        return f"a byte of snapshot {identity} flipped in {newest.path}"
    finally:
        for one in files:
            one.close()
