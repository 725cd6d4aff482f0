"""The process groups of a generation.

Ownership: the training thread uses ``world`` (gradients, status) and ``evaluation``; the background thread of the
prefetcher uses ``halo`` alone. One thread issues the collectives of one group: one order on all ranks. Every wait has the
timeout of the settings. If a rank dies, gloo raises on the others; if it goes silent, they raise after ``timeout_s``. NCCL
does not report a dead neighbor. On the same machine the worker agent kills the others. On another machine ``control``, which
is always gloo, notices it, or torch's watchdog, which kills this process after ``timeout_s``.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gemini_gnn.cluster.place import Place, check_interface, check_master, interface_to, interfaces_here
from gemini_gnn.config import DistributedConfig
from gemini_gnn.errors import ClusterError, GeminiError, PeerLost
from gemini_gnn.observe import errors


@dataclass(frozen=True)
class Groups:
    """The groups of this rank.

    Attributes:
        backend: "gloo" | "nccl".
        device: where the model and the features of a batch live.
        machine: the ranks on this machine.
        halo, evaluation: groups for the halo exchange and for evaluation (None on one rank).
        control: a gloo group for small host-side agreement, whatever the backend (None on one rank).
        store: the rendezvous store, for "wait until rank 0 has done it".
    """

    rank: int
    world_size: int
    backend: str
    device: torch.device
    machine: range
    halo: Any
    evaluation: Any
    control: Any
    store: dist.Store


def choose_backend(wanted: str, gpus: Sequence[str]) -> str:
    """``auto`` is NCCL when every rank has a GPU of its own (NCCL refuses two ranks on one), else gloo. Pure.

    Args:
        gpus: by rank, the id of the GPU it would take, "" for none. All ranks decide on the same list: some on gloo and some
            on NCCL would wait for each other.

    Raises:
        ClusterError: NCCL was asked for and a rank would have no GPU of its own.
    """
    lacking = [rank for rank, gpu in enumerate(gpus) if not gpu or gpu in gpus[:rank]]
    if wanted == "nccl" and lacking:
        raise ClusterError(
            f"distributed.backend=nccl: expected a GPU for each of {len(gpus)} ranks; ranks {lacking} have none of their "
            "own: start fewer ranks per machine, unset DS_ACCELERATOR=cpu, or use distributed.backend=gloo"
        )
    return ("gloo" if lacking else "nccl") if wanted == "auto" else wanted


def own_gpu(local_rank: int) -> tuple[int, str]:
    """Number and id of the GPU for a rank, (0, "") for none.

    A launcher may show all GPUs of the machine to all of its ranks, or to each one only its own (``srun --gpus-per-task=1``).
    With ``DS_ACCELERATOR=cpu`` there is none, for DeepSpeed as for us.

    Raises:
        ClusterError: the machine has GPUs that CUDA cannot use.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return 0, ""
    number = local_rank % torch.cuda.device_count()
    try:
        return number, str(torch.cuda.get_device_properties(number).uuid)
    except RuntimeError as error:
        raise ClusterError(
            f"this machine has GPUs, but CUDA cannot use them: {str(error).splitlines()[0]}; see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or train on the CPU with DS_ACCELERATOR=cpu"
        ) from error


def join(place: Place, config: DistributedConfig, listen_fd: int | None = None, membership: str = "") -> Groups:
    """Meet the other ranks and make the groups. Collective.

    Args:
        listen_fd: a listening socket for the store, bound by the worker agent for the rank that hosts it: clients
            that come before the server lose half a second in their retry, and no port has to be free twice.
        membership: rank 0's name for this start; all ranks stamp their errors with it.

    Raises:
        ClusterError: not all ranks came together in ``start_timeout_s``, or the port is taken.
    """
    # DeepSpeed reads them, and not every launcher sets them.
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))
    number, gpu = own_gpu(place.local_rank)
    if place.world_size > 1:
        check_master(place)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(place, config))
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
        if place.rank == 0:
            store.set("membership", membership)
        errors.begin(store.get("membership").decode())
        _take_seat(store, place)
        store.set(f"gpu/{place.rank}", gpu)  # after the seat: another job at this port must not answer for ours
        _wait_for_all(store, place, config.start_timeout_s)
        gpus = [store.get(f"gpu/{rank}").decode() for rank in range(place.world_size)]
        backend = choose_backend(config.backend, gpus)
        device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            _prepare_cuda(device)
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
        machine=place.ranks_here,
        halo=None if single else dist.new_group(backend=backend, timeout=timeout),
        evaluation=None if single else dist.new_group(backend=backend, timeout=timeout),
        control=None if single else dist.new_group(backend="gloo", timeout=timeout),
        store=store,
    )


# Unless the user says otherwise. NCCL does not promise the order of a sum that the switch computes (NVLS), nor cuBLAS the same
# bits twice without a workspace of fixed size. When a collective is lost for good, torch's watchdog kills the process after
# four times the wait for a dump of its flight recorder, which would be a minute.
_CUDA_DEFAULTS = {
    "NCCL_ALGO": "^NVLS,NVLSTree",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000",
}


def _prepare_cuda(device: torch.device) -> None:
    """Set the device and CUDA's variables: before the first tensor on a GPU and the first communicator."""
    torch.cuda.set_device(device)
    for name, value in _CUDA_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "GLOO_SOCKET_IFNAME" in os.environ:
        # To NCCL a name is a prefix, eth1 would be eth10 too, unless it says that it is not.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={os.environ['GLOO_SOCKET_IFNAME']}")


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
        machines = ", ".join(str(m) for m in sorted({rank // place.local_world_size + 1 for rank in missing}))
        where = f"machine {machines} in the order of the hostfile; " if place.machines > 1 else ""
        raise ClusterError(
            f"ranks {missing} of {place.world_size} did not come within {timeout_s:.0f} s (distributed.start_timeout_s); "
            f"{where}see what they printed, and their logs in the run directory"
        ) from error


def _interface(place: Place, config: DistributedConfig) -> str:
    if config.interface:
        return check_interface(config.interface, interfaces_here())
    return interface_to(place.master_addr)


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
        PeerLost: on the waiting ranks, when rank 0 did not finish in ``timeout_s``.
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
        raise PeerLost(f"rank 0 did not finish '{name}' within {timeout_s:.0f} s") from failure
    answer = store.get(key).decode()
    if answer != "done":
        raise error(f"rank 0 could not finish '{name}': {answer}") from PeerLost("its error is the cause")
