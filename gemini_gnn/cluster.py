"""Who is in the job: one place that learns it, from DeepSpeed's launcher, from SLURM's srun, or from nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job.

    Attributes:
        rank, world_size: global trainer index and their number.
        local_rank, local_world_size: the same on this machine.
        machine: hostname.
        master_addr, master_port: where the rendezvous store of the process groups listens.
        launcher: "deepspeed" | "slurm" | "plain".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    machine: str
    master_addr: str
    master_port: int
    launcher: str


def discover(environ: Mapping[str, str]) -> Place:
    """The place of this process, from its environment alone."""
    import socket

    rank, world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    return Place(
        rank=rank,
        world_size=world,
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        local_world_size=int(environ.get("LOCAL_SIZE", world)),
        machine=socket.gethostname(),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(environ.get("MASTER_PORT", 0)),
        launcher="deepspeed" if "RANK" in environ else "plain",
    )
