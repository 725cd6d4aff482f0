"""The harm of a fault on purpose, done by the worker agent of its machine."""

from __future__ import annotations

import os
import signal

from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import injection, link
from gemini_gnn.faults.schedule import OF_RANK, Fault
from gemini_gnn.recovery import messages
from gemini_gnn.recovery.root.faults import reads_orders
from gemini_gnn.recovery.worker.children import Children


def commit(fault: Fault, children: Children, *, master_addr: str, machines: int) -> str:
    """Do the harm; returns to which process. Does not return from the death of this agent.

    Args:
        master_addr, machines: of the job.

    Raises:
        ConfigError: it cannot be done here.
    """
    machine = os.uname().nodename
    if fault.kind in OF_RANK:
        return f"{_to_trainer(fault, children)} on {machine}"
    if fault.kind == "cut-link":
        link.check(machines)
        device = link.device_to(master_addr)
        children.spared.add(link.cut(device, fault.for_s or 0.0))
        return f"{device} of {machine} is down for {fault.for_s:g} s"
    if fault.kind == "kill-warm":
        if children.warm is None:
            raise ConfigError(f"{fault}: {machine} has no warm parent now; try again")
        os.kill(children.warm.pid, signal.SIGKILL)  # our child, not reaped: the number is its own
        return f"SIGKILL to the warm parent, pid {children.warm.pid} on {machine}"
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
