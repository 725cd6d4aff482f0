"""The process groups of a generation.

Who owns what: the training thread uses ``world`` (gradients, status) and ``evaluation``; the background thread of the
prefetcher uses ``halo`` alone. Collectives of one group are issued by one thread: one order on all ranks.
Every wait has the timeout of the settings; a rank that dies makes gloo raise on the others, a rank that goes silent
makes them raise after ``timeout_s``.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gemini_gnn import cluster
from gemini_gnn.cluster import Place
from gemini_gnn.config import DistributedConfig
from gemini_gnn.errors import ClusterError, GeminiError


@dataclass(frozen=True)
class Groups:
    """The groups of this rank.

    Attributes:
        backend: "gloo" | "nccl".
        device: where the model and the features of a batch live.
        halo, evaluation: groups for the halo exchange and for evaluation (None on one rank).
        control: a gloo group for small host-side agreement, whatever the backend (None on one rank).
        store: the rendezvous store, for "wait until rank 0 has done it".
    """

    rank: int
    world_size: int
    backend: str
    device: torch.device
    halo: Any
    evaluation: Any
    control: Any
    store: dist.Store


def choose_backend(wanted: str, gpus: int, local_world_size: int) -> str:
    """``auto`` is NCCL when every rank of this machine has a GPU of its own (NCCL refuses two ranks on one), else gloo.

    Raises:
        ClusterError: NCCL was asked for and a rank would have no GPU.
    """
    if wanted == "auto":
        return "nccl" if gpus >= local_world_size else "gloo"
    if wanted == "nccl" and gpus < local_world_size:
        raise ClusterError(
            f"distributed.backend=nccl needs a GPU per rank: this machine has {gpus} for {local_world_size} ranks; "
            "start fewer ranks here or use distributed.backend=gloo"
        )
    return wanted


def join(place: Place, config: DistributedConfig, listen_fd: int | None = None) -> Groups:
    """Meet the other ranks and make the groups. Collective.

    Args:
        listen_fd: a listening socket for the store, bound by the worker agent for the rank that hosts it: clients
            that come before the server lose half a second in their retry, and no port has to be free twice.

    Raises:
        ClusterError: not all ranks came together in ``start_timeout_s``, or the port is taken.
    """
    # DeepSpeed wants to read them, whoever the launcher was.
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = choose_backend(config.backend, gpus, place.local_world_size)
    device = torch.device("cuda", place.local_rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    if place.world_size > 1:
        cluster.check_master(place)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(place, config))
        if backend == "nccl":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])
    where = f"{place.master_addr}:{place.master_port}"
    try:
        base = dist.TCPStore(
            place.master_addr,
            place.master_port,
            place.world_size,
            is_master=place.rank == 0,
            timeout=datetime.timedelta(seconds=config.start_timeout_s),
            wait_for_workers=False,
            master_listen_fd=listen_fd if place.rank == 0 else None,
        )
        store = dist.PrefixStore("0", base)
        _take_seat(store, place)
        _wait_for_all(store, place, config.start_timeout_s)
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=datetime.timedelta(seconds=config.timeout_s),
            device_id=device if backend == "nccl" else None,
        )
    except (RuntimeError, dist.DistError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise ClusterError(
                f"port {place.master_port} on {place.master_addr} is taken, probably by another job; "
                "give this one its own: deepspeed --master_port N ..."
            ) from error
        raise ClusterError(
            f"rank {place.rank} of {place.world_size} on {place.machine} could not join the job at {where} "
            f"within {config.start_timeout_s:.0f} s: {str(error).splitlines()[0]}"
        ) from error
    timeout = datetime.timedelta(seconds=config.timeout_s)
    single = place.world_size == 1
    return Groups(
        rank=place.rank,
        world_size=place.world_size,
        backend=backend,
        device=device,
        halo=None if single else dist.new_group(backend=backend, timeout=timeout),
        evaluation=None if single else dist.new_group(backend=backend, timeout=timeout),
        control=None if single else dist.new_group(backend="gloo", timeout=timeout),
        store=store,
    )


def part(groups: Groups, timeout_s: float = 20.0) -> None:
    """The host of the store leaves last: a rank that still reads from it would take its end for a failure."""
    groups.store.set(f"left/{groups.rank}", "")
    if groups.rank == 0:
        keys = [f"left/{rank}" for rank in range(groups.world_size)]
        with contextlib.suppress(RuntimeError, dist.DistError):  # one that is lost by now no longer matters
            groups.store.wait(keys, datetime.timedelta(seconds=timeout_s))


def _take_seat(store: dist.Store, place: Place) -> None:
    """Say that this rank is here. Two jobs that met at one port would otherwise mix their ranks and hang.

    Raises:
        ClusterError: another process sits there already.
    """
    ours = f"{place.machine}, pid {os.getpid()}"
    sits = store.compare_set(f"present/{place.rank}", "", ours).decode()
    if sits != ours:
        raise ClusterError(
            f"rank {place.rank} of the job at {place.master_addr}:{place.master_port} is already {sits}: another job "
            "has this port. Give this one its own: deepspeed --master_port N ..., or MASTER_PORT=N srun ..."
        )


def _wait_for_all(store: dist.Store, place: Place, timeout_s: float) -> None:
    """Raise with the missing ranks' numbers rather than with a bare timeout."""
    keys = [f"present/{rank}" for rank in range(place.world_size)]
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except (RuntimeError, dist.DistError) as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise ClusterError(
            f"ranks {missing} of {place.world_size} did not come within {timeout_s:.0f} s "
            "(distributed.start_timeout_s); see their logs in the run directory"
        ) from error


def _interface(place: Place, config: DistributedConfig) -> str:
    if config.interface:
        return cluster.check_interface(config.interface, cluster.interfaces_here())
    return cluster.interface_to(place.master_addr)


def run_on_first(
    store: dist.Store,
    rank: int,
    name: str,
    timeout_s: float,
    work: Callable[[], None],
    error: type[GeminiError] = ClusterError,
) -> None:
    """Rank 0 does ``work()``; the others wait for its end, or for the error it ended with.

    Raises:
        error: on the waiting ranks, when rank 0 failed.
        ClusterError: on the waiting ranks, when rank 0 did not finish in ``timeout_s``.
    """
    key = f"first/{name}"
    if rank == 0:
        try:
            work()
        except BaseException as failure:
            store.set(key, f"failed: {failure}")
            raise
        store.set(key, "done")
        return
    try:
        store.wait([key], datetime.timedelta(seconds=timeout_s))
    except (RuntimeError, dist.DistError) as failure:
        raise ClusterError(f"rank 0 did not finish '{name}' within {timeout_s:.0f} s") from failure
    answer = store.get(key).decode()
    if answer != "done":
        raise error(f"rank 0 could not finish '{name}': {answer}")
