"""Gradient aggregation between machines, against what their links allow; all_to_all; disks.

    python benchmarks/cluster.py            (root on Linux: it builds a cluster on this machine, see docs/lab.md)

2 and 4 hosts with links of 1 and 10 Gbit/s (tc tbf, both directions). Contenders, in turns, on float32 gradients:

    all_reduce         the process group's own, gloo
    ring               scatter-reduce and all-gather over send/recv, below
    parameter server   everybody sends to rank 0, which sums and sends back
    all_to_all         all_to_all_single, as in the halo exchange
    pairs              the same over send/recv, all receives first
    send               one rank to one other: what a link really carries

The bandwidth limit is the time no algorithm can undercut on links of that rate: to sum S bytes over n hosts each must send
2 (n-1)/n S (Patarasuk & Yuan 2009); to exchange them (n-1)/n S; one way S. It counts payload only: TCP/IP
and Ethernet headers take 5 % of a frame of 1500 bytes. A parameter server's own link must carry (n-1) S in and then out.

All hosts share this machine's cores. Where links are faster than the cores can fill them, figures say what the cores
can do; `send` shows where that is. The limiter lets 4 ms of traffic pass at once, so messages near that size beat the limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import machine, median, write

ROOT = Path(__file__).resolve().parents[1]
SIZES = [1 << 20, 4 << 20, 16 << 20, 64 << 20]
PIECE = 8 << 20  # bytes per message: bounded memory in gloo, and the next piece travels while this one is added
DISK_BYTES = 256 << 20


# --- contenders: each sums ``x`` over all ranks, in place -------------------------------------------------------------


def ring(x: torch.Tensor) -> None:
    """Ring all-reduce: n-1 rounds in which each rank adds what its left neighbor sends, n-1 in which sums go round.

    Rank r ends round s of the first half with the partial sum of chunk r-s-1 over s+2 ranks; after n-1 rounds chunk r+1
    is complete there. Every link carries 2 (n-1)/n of the data, whatever the number of ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = list(x.tensor_split(world))
    arriving = torch.empty_like(max(chunks, key=len))
    for step in range(world - 1):
        send, take = chunks[(rank - step) % world], chunks[(rank - step - 1) % world]
        pass_on(send, arriving[: len(take)], add_to=take)
    for step in range(world - 1):
        send, take = chunks[(rank + 1 - step) % world], chunks[(rank - step) % world]
        pass_on(send, take)


def pass_on(send: torch.Tensor, arriving: torch.Tensor, add_to: torch.Tensor | None = None) -> None:
    """Send to the right neighbor while receiving from the left one, in pieces; add each piece when it is there."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # Receives first: gloo tells the sender that a receive is there over the same connection that our data will fill.
    received = [dist.irecv(piece, (rank - 1) % world) for piece in pieces(arriving)]
    sent = [dist.isend(piece, (rank + 1) % world) for piece in pieces(send)]
    targets = pieces(add_to) if add_to is not None else [None] * len(received)
    for request, piece, target in zip(received, pieces(arriving), targets, strict=True):
        request.wait()
        if target is not None:
            target += piece
    for request in sent:
        request.wait()


def pieces(x: torch.Tensor) -> list[torch.Tensor]:
    return list(x.split(PIECE // x.element_size())) if len(x) else []


def parameter_server(x: torch.Tensor) -> None:
    """Rank 0 receives from all at once, piece by piece, sums, and sends the sum back."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        for piece in pieces(x):
            dist.send(piece, 0)
        for piece in pieces(x):
            dist.recv(piece, 0)
        return
    arriving = [torch.empty_like(pieces(x)[0]) for _ in range(world - 1)]
    for piece in pieces(x):
        requests = [dist.irecv(arriving[other - 1][: len(piece)], other) for other in range(1, world)]
        for request, theirs in zip(requests, arriving, strict=True):
            request.wait()
            piece += theirs[: len(piece)]
    for request in [dist.isend(piece, other) for piece in pieces(x) for other in range(1, world)]:
        request.wait()


def all_to_all(x: torch.Tensor) -> torch.Tensor:
    usable = x[: len(x) // dist.get_world_size() * dist.get_world_size()]
    arrived = torch.empty_like(usable)
    dist.all_to_all_single(arrived, usable)
    return arrived


def pairs(x: torch.Tensor) -> torch.Tensor:
    """all_to_all over send/recv. Receives first, as in :func:`pass_on`: both directions of a link are then full at once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ours = x[: len(x) // world * world].view(world, -1)
    theirs = torch.empty_like(ours)
    theirs[rank] = ours[rank]
    others = [(rank + step) % world for step in range(1, world)]
    requests = [dist.irecv(piece, other) for other in reversed(others) for piece in pieces(theirs[other])]
    requests += [dist.isend(piece, other) for other in others for piece in pieces(ours[other])]
    for request in requests:
        request.wait()
    return theirs.view(-1)


def send(x: torch.Tensor) -> None:
    if dist.get_rank() == 0:
        for request in [dist.isend(piece, 1) for piece in pieces(x)]:
            request.wait()
    elif dist.get_rank() == 1:
        for request in [dist.irecv(piece, 0) for piece in pieces(x)]:
            request.wait()


CONTENDERS = {
    "all_reduce": dist.all_reduce,
    "ring": ring,
    "parameter server": parameter_server,
    "all_to_all": all_to_all,
    "pairs": pairs,
    "send": send,
}


def limit_s(name: str, size_bytes: int, hosts: int, bits_per_s: float) -> float:
    """Seconds that the payload needs at least on links of ``bits_per_s``; for the sums, that of the best algorithm."""
    others = (hosts - 1) / hosts
    share = {"all_to_all": others, "pairs": others, "send": 1.0}.get(name, 2 * others)
    return share * size_bytes * 8 / bits_per_s


# --- on a host --------------------------------------------------------------------------------------------------------


def worker(rank: int, world: int, store: str, rounds: int) -> None:
    """Measure as one rank; rank 0 prints one JSON line. A round's time is that of the slowest rank."""
    from gemini_gnn.cluster.place import interface_to

    os.environ["GLOO_SOCKET_IFNAME"] = interface_to("h0")
    torch.set_num_threads(1)
    rendezvous = dist.FileStore(store, world)
    dist.init_process_group(
        "gloo", store=rendezvous, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120)
    )
    took: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in CONTENDERS}
    for size in SIZES:
        for turn in range(rounds + 1):
            for name, contender in CONTENDERS.items():
                x = torch.full((size // 4,), float(rank))
                dist.barrier()
                begin = time.perf_counter()
                contender(x)
                seconds = torch.tensor([time.perf_counter() - begin])
                if name in ("all_reduce", "ring", "parameter server"):
                    assert torch.all(x == world * (world - 1) / 2), f"{name}: wrong sum"
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                if turn > 0:  # the first one connects
                    took[name][size].append(float(seconds))
    if rank == 0:
        print("RESULT " + json.dumps(took), flush=True)
    dist.destroy_process_group()


def disk(folder: str) -> None:
    """Write and flush a file, then read it back without the page cache; prints bytes per second."""
    data, path = os.urandom(1 << 20), Path(folder) / f"bench-{os.getpid()}"
    try:
        begin = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - begin
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            while file.read(1 << 20):
                pass
        read = time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
    print("RESULT " + json.dumps({"write": DISK_BYTES / written, "read": DISK_BYTES / read}), flush=True)


# --- from outside -----------------------------------------------------------------------------------------------------


def result_of(output: str) -> dict:
    for line in output.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"no result:\n{output}")


def measure(lab, hosts: int, rate: str, rounds: int) -> list[dict]:
    """Rows of one configuration: the contenders between ``hosts`` hosts with links of ``rate``."""
    from tests.lab.lab import bits_per_s, kill_group

    for name in lab.hosts:
        lab.bandwidth(name, rate)
    store = lab.folder / f"store-{hosts}-{rate}"
    processes = []
    try:
        for rank in range(hosts):
            arguments = ["--worker", str(rank), str(hosts), str(store), "--rounds", str(rounds)]
            command = [sys.executable, __file__, *arguments]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            processes.append(lab.popen(f"h{rank}", command, text=True, **pipes))
        took = result_of(processes[0].communicate(timeout=900)[0])
        for process in processes[1:]:
            process.communicate(timeout=60)
    finally:
        for process in processes:
            kill_group(process)
            process.wait(20)
    return [
        {
            "contender": name,
            "hosts": hosts,
            "rate": rate,
            "size_bytes": int(size),
            "seconds": median(times),
            "seconds_all": times,
            "limit_s": limit_s(name, int(size), hosts, bits_per_s(rate)),
        }
        for name, sizes in took.items()
        for size, times in sizes.items()
    ]


def measure_disks(lab) -> list[dict]:
    """The shared disk, a host's memory, and a network file system over links of 1 Gbit/s."""
    folder = lab.nfs_up()
    for name in lab.hosts:
        lab.bandwidth(name, "1gbit")
    rows = []
    for what, where in (("local disk", lab.folder), ("/dev/shm", "/dev/shm"), ("sshfs at 1 Gbit/s", folder)):
        done = lab.run("h1", [sys.executable, __file__, "--disk", str(where)], timeout_s=300)
        rows.append({"what": what, **result_of(done.stdout)})
    lab.nfs_down()
    return rows


def table(rows: list[dict], disks: list[dict]) -> str:
    lines = ["contender         hosts     rate      MiB   seconds     limit   share of limit"]
    for row in rows:
        size = row["size_bytes"] / 2**20
        lines.append(
            f"{row['contender']:17} {row['hosts']:>5} {row['rate']:>8} {size:>8.0f} {row['seconds']:>9.4f} "
            f"{row['limit_s']:>9.4f} {100 * row['limit_s'] / row['seconds']:>13.0f} %"
        )
    lines += [f"{d['what']:20} write {d['write'] / 1e6:7.0f} MB/s  read {d['read'] / 1e6:7.0f} MB/s" for d in disks]
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Seconds over size, one panel per configuration; dashed the bandwidth limit of a sum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["rate"], row["hosts"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, (rate, hosts) in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row["rate"], row["hosts"]) == (rate, hosts)]
        for name in CONTENDERS:
            points = sorted((r["size_bytes"] / 2**20, r["seconds"]) for r in here if r["contender"] == name)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        bound = sorted((r["size_bytes"] / 2**20, r["limit_s"]) for r in here if r["contender"] == "ring")
        axis.plot(*zip(*bound, strict=True), "k--", linewidth=1, label="bandwidth limit of a sum")
        axis.set(title=f"{hosts} hosts, {rate}", xlabel="MiB per rank", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "10gbit"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "cluster.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--disk", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank, world, store = options.worker
        return worker(int(rank), int(world), store, options.rounds)
    if options.disk:
        return disk(options.disk)
    sys.path.insert(0, str(ROOT))
    from tests.lab import Lab, LabError

    with tempfile.TemporaryDirectory() as folder:
        try:
            lab = Lab.up(Path(folder) / "lab", hosts=max(options.hosts), owned=True)
        except LabError as error:
            sys.exit(f"error: {error}")
        with lab:
            disks = measure_disks(lab)
            rows = [
                row
                for rate in options.rates
                for hosts in options.hosts
                for row in measure(lab, hosts, rate, options.rounds)
            ]
    print(table(rows, disks))
    write(options.output, {"machine": machine(), "rounds": options.rounds, "aggregation": rows, "disks": disks})
    plot(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
