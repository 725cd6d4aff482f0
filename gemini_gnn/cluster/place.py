"""The ranks of the job and how they reach each other: from DeepSpeed's launcher, SLURM's srun, torchrun, or no launcher.

Whatever started the processes, the code afterwards sees one :class:`Place`. The decisions are pure functions of an
environment or a list of interfaces; only :func:`interface_to` and :func:`check_master` ask the
operating system, and they take what they ask as an argument.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gemini_gnn.errors import ClusterError


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job.

    Attributes:
        rank, world_size: global trainer index and their number.
        local_rank, local_world_size: the same on this machine.
        machine: hostname.
        master_addr, master_port: where the rendezvous store of the process groups listens; port 0 means any free one,
            which only a job of one rank can use.
        launcher: "deepspeed" | "slurm" | "torchrun" | "plain".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    machine: str
    master_addr: str
    master_port: int
    launcher: str

    @property
    def machines(self) -> int:
        """Number of machines of the job (every one has the same number of ranks)."""
        return self.world_size // self.local_world_size

    @property
    def ranks_here(self) -> range:
        """The ranks on this machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)


# --- the ranks of the job ---------------------------------------------------------------------------------------------


def discover(environ: Mapping[str, str], machine: str | None = None) -> Place:
    """The place of this process, from its environment alone.

    DeepSpeed's launcher and torchrun set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_SIZE`` or
    ``LOCAL_WORLD_SIZE``; ``srun`` sets ``SLURM_PROCID`` and its kin for every process of a step. The variables
    an sbatch script or salloc shell has without ``srun`` describe the allocation, not processes: that one is plain.

    Args:
        machine: this machine's name; default its hostname.

    Raises:
        ClusterError: a variable is missing, no number, or contradicts another; machines have unequal numbers of ranks;
            several machines are to meet at a loopback address.
    """
    machine = machine or socket.gethostname()
    if "RANK" in environ:
        place = _from_launcher(environ, machine)
    elif "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        place = _from_slurm(environ, machine)
    else:
        if int(environ.get("WORLD_SIZE") or 1) > 1:
            raise ClusterError("WORLD_SIZE is set but RANK is not: start the ranks with deepspeed, srun or torchrun")
        return Place(0, 1, 0, 1, machine, "127.0.0.1", 0, "plain")
    check_place(place)
    return place


def threads(environ: Mapping[str, str], cores: int, sharing: int) -> int:
    """Computing threads of a rank: what the user asked for, else its share of the cores. Pure.

    ``OMP_NUM_THREADS`` (of a list for nested levels, ``4,2``, the first) comes before ``SLURM_CPUS_PER_TASK``, which counts
    only for a task of ``srun``: under other launchers it describes the allocation that all ranks share. A value that is
    no positive number is ignored.

    Args:
        cores: that this process may run on. sharing: ranks that run on the same ones.
    """
    asked = [environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()]
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ:
        asked.append(environ.get("SLURM_CPUS_PER_TASK", "").strip())
    numbers = [int(text) for text in asked if text.isascii() and text.isdigit() and int(text) > 0]
    return numbers[0] if numbers else max(1, cores // max(1, sharing))


def _number(environ: Mapping[str, str], *names: str, default: int | None = None) -> int:
    """The first of ``names`` that is set, as a number >= 0."""
    for name in names:
        if name in environ:
            value = environ[name].strip()
            if not (value.isascii() and value.isdigit()):
                raise ClusterError(f"{name}: expected a number >= 0 in the environment; got {environ[name]!r}")
            return int(value)
    if default is None:
        raise ClusterError(
            f"{' or '.join(names)} is not set although this process belongs to a job (its rank is set): "
            "start it with deepspeed, srun or torchrun, or unset RANK for a single process"
        )
    return default


def _from_launcher(environ: Mapping[str, str], machine: str) -> Place:
    world = _number(environ, "WORLD_SIZE")
    local_world = _number(environ, "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    machines = _number(environ, "CROSS_SIZE", default=-1)
    if machines >= 0 and machines * local_world != world:
        raise ClusterError(unequal(f"{local_world} of {world} ranks on this one of {machines} machines, {machine}"))
    if "MASTER_ADDR" not in environ and world > local_world:
        raise ClusterError("MASTER_ADDR is not set, and the job has several machines: pass deepspeed --master_addr")
    port = _number(environ, "MASTER_PORT", default=0)
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and world > local_world:
        port += 1  # torchrun itself listens at MASTER_PORT; our agents meet beside it
    return Place(
        rank=_number(environ, "RANK"),
        world_size=world,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=local_world,
        machine=machine,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=port,
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed",
    )


def _from_slurm(environ: Mapping[str, str], machine: str) -> Place:
    world = _number(environ, "SLURM_STEP_NUM_TASKS")
    tasks = expand_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "")))
    if not tasks or len(set(tasks)) != 1 or sum(tasks) != world:
        raise ClusterError(unequal(f"{world} tasks as SLURM_STEP_TASKS_PER_NODE={tasks}"))
    nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "")))
    if len(nodes) != len(tasks):
        raise ClusterError(f"SLURM_STEP_NODELIST names {len(nodes)} machines, SLURM_STEP_TASKS_PER_NODE {len(tasks)}")
    # srun gives out no ports. Take one per job step, below the range the kernel gives to clients. If it is in use, rank 0
    # fails to bind it and says so; MASTER_PORT in front of srun sets another.
    step = _number(environ, "SLURM_JOB_ID") * 31 + _number(environ, "SLURM_STEP_ID", default=0)
    return Place(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[0],
        machine=machine,
        master_addr=environ.get("MASTER_ADDR") or ("127.0.0.1" if len(nodes) == 1 else nodes[0]),
        master_port=_number(environ, "MASTER_PORT", default=10_000 + step % 20_000),
        launcher="slurm",
    )


def unequal(found: str) -> str:
    return (
        f"expected the same number of ranks on every machine; got {found}. "
        "Give every host of the hostfile the same slots= (srun: --ntasks-per-node)"
    )


def check_place(place: Place) -> None:
    if not 0 <= place.local_rank < place.local_world_size <= place.world_size or not 0 <= place.rank < place.world_size:
        raise ClusterError(
            f"the environment contradicts itself: rank {place.rank} of {place.world_size}, "
            f"on {place.machine} rank {place.local_rank} of {place.local_world_size}; "
            "are variables of another job exported in this shell?"
        )
    if place.world_size % place.local_world_size:
        raise ClusterError(unequal(f"{place.local_world_size} of {place.world_size} ranks on {place.machine}"))
    if place.rank % place.local_world_size != place.local_rank:
        raise ClusterError(
            f"expected consecutive ranks on each machine; got rank {place.rank} as number {place.local_rank} of "
            f"{place.local_world_size} on {place.machine}. Start with srun --distribution=block"
        )
    if place.machines > 1 and _is_loopback(place.master_addr):
        raise ClusterError(_loopback(place, place.master_addr))


def launcher_variables(place: Place) -> dict[str, str]:
    """The variables in which libraries look for ``place``; the inverse of :func:`discover` under a launcher."""
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_SIZE": str(place.local_world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
    }


def expand_tasks(text: str) -> list[int]:
    """SLURM's tasks per node, ``"2(x3),1"``, as ``[2, 2, 2, 1]``.

    Raises:
        ClusterError: not in that form.
    """
    tasks: list[int] = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise ClusterError(f"SLURM_STEP_TASKS_PER_NODE: expected a list like 2(x3),1; got {text!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def expand_nodes(text: str) -> list[str]:
    """SLURM's node list, ``"login,h[0-2,07]-ib"``, as ``["login", "h0-ib", "h1-ib", "h2-ib", "h07-ib"]``.

    Raises:
        ClusterError: brackets that do not match or hold something else than numbers and ranges.
    """
    nodes: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", text):
        nodes += _expand_brackets(item, text)
    return nodes


def _expand_brackets(item: str, text: str) -> list[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [before]
    inside, closing, after = rest.partition("]")
    names = []
    for span in inside.split(","):
        first, _, last = span.partition("-")
        last = last or first
        if not (closing and first.isdigit() and last.isdigit()):
            raise ClusterError(f"SLURM_STEP_NODELIST: expected names like h[0-3,7]; got {text!r}")
        names += [f"{before}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [name + tail for name in names for tail in _expand_brackets(after, text)]


# --- how they reach each other ----------------------------------------------------------------------------------------

Interfaces = Sequence[tuple[str, Sequence[str]]]  # (name, its addresses), as text, IPv4 or IPv6


def choose_interface(source: str, interfaces: Interfaces) -> str:
    """The interface that holds ``source``, the address this machine speaks from when it calls the first machine. Pure.

    On the first machine itself that is its own public address, hence its network card and not ``lo``.

    Raises:
        ClusterError: none has it.
    """
    wanted = _address(source)
    for name, addresses in interfaces:
        if any(_address(text) == wanted for text in addresses):
            return name
    raise ClusterError(
        f"no network interface has the address {source}; this machine has {_listed(interfaces)}. "
        "Name one with distributed.interface="
    )


def check_interface(name: str, interfaces: Interfaces) -> str:
    """``name``, when the machine has it with an address.

    Raises:
        ClusterError: it has not; lists what there is.
    """
    if not any(name == known and addresses for known, addresses in interfaces):
        raise ClusterError(f"distributed.interface={name}: this machine has {_listed(interfaces)}")
    return name


def interface_to(master_addr: str) -> str:
    """The interface of this machine that leads to the first one. Sends nothing.

    Raises:
        ClusterError: the name is unknown here, or no route leads there.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(master_addr, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # a datagram socket only looks up the route
            source = probe.getsockname()[0]
    except OSError as error:
        raise ClusterError(
            f"{socket.gethostname()} finds no way to the first machine, {master_addr}: {error}. "
            f"Try `getent hosts {master_addr}` and `ip route get {master_addr}` there, or give another --master_addr"
        ) from None
    return choose_interface(source, interfaces_here())


def interfaces_here() -> list[tuple[str, list[str]]]:
    """Name and IP addresses of every network interface of this machine."""
    import psutil

    kinds = (socket.AF_INET, socket.AF_INET6)
    return [(name, [a.address for a in all_ if a.family in kinds]) for name, all_ in psutil.net_if_addrs().items()]


def _resolve(name: str) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]


def check_master(place: Place, resolve: Callable[[str], list[str]] = _resolve) -> None:
    """Refuse a job of several machines if this machine resolves the meeting point to its own loopback.

    Debian writes ``127.0.1.1 <hostname>`` into /etc/hosts: then a name means one address on its own machine and another
    on the others, and the job would hang until its start timeout.

    Raises:
        ClusterError: it resolves to loopback, or not at all.
    """
    if place.machines == 1:
        return
    try:
        addresses = resolve(place.master_addr)
    except OSError as error:
        raise ClusterError(
            f"{place.machine} cannot resolve the first machine, MASTER_ADDR={place.master_addr}: {error}. "
            "Add it to DNS or /etc/hosts, or pass its address: deepspeed --master_addr"
        ) from None
    # The first decides: getaddrinfo's order is the order in which a client tries them.
    if addresses and _is_loopback(addresses[0]):
        raise ClusterError(_loopback(place, addresses[0]))


def _loopback(place: Place, address: str) -> str:
    return (
        f"expected an address that all {place.machines} machines can reach; got MASTER_ADDR={place.master_addr}, which "
        f"is loopback ({address}) on {place.machine}. Pass deepspeed --master_addr with the first machine's network "
        "address (`hostname -I` there), or remove the line with its name after 127.0.x.x from its /etc/hosts"
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name. A scope (``fe80::1%eth0``) is not part of the comparison."""
    try:
        return ipaddress.ip_address(text.split("%")[0])
    except ValueError:
        return None


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _listed(interfaces: Interfaces) -> str:
    return "; ".join(f"{name} ({', '.join(a) or 'no address'})" for name, a in interfaces) or "no interface at all"
