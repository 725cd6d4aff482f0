"""Give each machine of a job what it needs of a partitioned graph, on its own disk; :mod:`held` says what that is.

The sender reads every file once, compares it with ``meta.json``, and notes the checksum of each piece. Then it streams to
all machines at once, over ssh or srun, to :mod:`receive`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from gemini_gnn.cluster.doctor.reach import Probe, probes
from gemini_gnn.cluster.installation import sources
from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.array_folder import Progress, ticking
from gemini_gnn.graph.partition import held
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.partition.quality import human_bytes
from gemini_gnn.graph.partition.receive import LOCK_S
from gemini_gnn.graph.sparse import SparseRows

Order = dict[str, Any]
Cut = tuple[int | None, held.Piece]  # None: every machine gets it; else the part whose rows these are
RECEIVER = "gemini_gnn.graph.partition.receive"
START_S = 30.0  # login and the start of Python, from a file server too
STALL_S = 60.0  # without a byte that moves
DISK_S = 600.0  # until all is on the disk there
SAY_S = 2.0
STEP_BYTES = 1 << 20
AT_ONCE = 32  # machines


@dataclass
class Delivery:
    """What one machine gets, and how far that is.

    Attributes:
        order: see :func:`ordered`.
        has: it had all of it before. problem: why it does not get it; empty: none.
    """

    host: str
    order: Order
    moved_bytes: int = 0
    has: bool = False
    problem: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(end - begin for _, begin, end, _ in self.order["pieces"])


def distribute(
    graph: PartitionedGraph,
    hosts: Sequence[tuple[str, int]],
    how: str,
    project: Path,
    folder: Path,
    parts: Sequence[tuple[int, ...]],
    say: Progress,
) -> list[Delivery]:
    """Send to each of ``hosts`` the whole graph but the features, and the features of its ``parts``.

    Args:
        how: "ssh" | "srun" | "here". project: the folder to start Python in, the same on all machines.
        folder: on each machine's own disk.

    Raises:
        PartitionError: ``graph`` is damaged, or holds the features of some parts only.
    """
    held.expect(graph.folder, graph.held, range(graph.parts))
    with ticking(f"reading {graph.folder} to compare its checksums", say):
        cut = pieces(graph)
    deliveries = [
        Delivery(host, ordered(graph, cut, folder, some)) for (host, _), some in zip(hosts, parts, strict=True)
    ]
    stopped = threading.Event()

    def deliver(delivery: Delivery) -> None:
        with probes([(delivery.host, 1)], how, project, RECEIVER) as (probe,):
            talk(probe, delivery, graph.folder, lambda: not stopped.is_set())

    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        try:
            futures = {pool.submit(deliver, one): one for one in deliveries}
            left = set(futures)
            while left:
                done, left = wait(left, timeout=SAY_S)
                for future in done:
                    future.result()
                    say(told(futures[future]))
                if left and not done:
                    say("sent: " + ", ".join(far(futures[future]) for future in futures if future in left))
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return deliveries


def talk(probe: Probe, delivery: Delivery, source: Path, going: Callable[[], bool]) -> None:
    """The conversation with one machine; what comes of it is in ``delivery``."""

    def answer(seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while (found := probe.answer(min(until, time.monotonic() + 1))) is None and not probe.problem:
            if time.monotonic() >= until or not going():
                probe.late(seconds)
        return {"problem": f"{probe.problem} Try: {probe.remedy}"} if found is None else found

    def moved(count: int) -> bool:
        delivery.moved_bytes += count
        return going()

    probe.stream([json.dumps(delivery.order).encode() + b"\n"], STALL_S, lambda _: going())
    found = answer(START_S + LOCK_S)
    if "problem" not in found and not found["has"]:
        probe.stream(contents(source, delivery.order["pieces"]), STALL_S, moved)
        found = answer(DISK_S)
    delivery.has, delivery.problem = bool(found.get("has")), str(found.get("problem", ""))


def ordered(graph: PartitionedGraph, cut: Sequence[Cut], folder: Path, parts: Sequence[int]) -> Order:
    """What the receiver is told before the bytes, as JSON knows it.

    Args:
        cut: of :func:`pieces`. parts: whose features it gets; all else it gets whole.
    """
    return {
        "sources": sources(),
        "folder": str(folder),
        "meta": asdict(graph.meta),
        "files": {name: (graph.folder / f"{name}.npy").stat().st_size for name in graph.meta.checksums},
        "parts": list(parts),
        "pieces": [piece for part, piece in cut if part is None or part in parts],
    }


def pieces(graph: PartitionedGraph) -> list[Cut]:
    """The files of ``graph`` cut into what travels alone: (None, whole file or header), (part, its rows).

    Raises:
        PartitionError: a file has not the checksum that ``meta.json`` says.
    """
    found: list[Cut] = []
    for name, expected in graph.meta.checksums.items():
        path = graph.folder / f"{name}.npy"
        size, ends = path.stat().st_size, row_bytes(graph, name)
        header = size - ends[-1] if ends else size
        cuts = [0, *(header + end for end in ends)] if ends else [0, size]
        whole = xxhash.xxh3_128()
        with open(path, "rb") as file:
            for part, (begin, end) in enumerate(pairwise(cuts), start=-1):
                hasher = xxhash.xxh3_128()
                while piece := file.read(min(STEP_BYTES, end - file.tell())):
                    hasher.update(piece)
                    whole.update(piece)
                if begin < end:
                    found.append((part if part >= 0 else None, (name, begin, end, hasher.hexdigest())))
        if whole.hexdigest() != expected:
            raise PartitionError(
                f"{path}: expected checksum {expected}; got {whole.hexdigest()}: the file was damaged or changed; delete "
                "the folder and make it again"
            )
    return found


def row_bytes(graph: PartitionedGraph, name: str) -> list[int]:
    """Where the rows of each part begin behind the header of a divided array, and where the last ends; else nothing."""
    if name not in held.DIVIDED:
        return []
    if isinstance(graph.x, SparseRows):
        return [4 * int(end) for end in graph.x.ptr[graph.bounds]]  # int32 columns, float32 values
    return [int(end) * graph.x.shape[1] * graph.x.itemsize for end in graph.bounds]


def contents(folder: Path, some: Sequence[held.Piece]) -> Iterator[bytes]:
    for name, begin, end, _ in some:
        with open(folder / f"{name}.npy", "rb") as file:
            file.seek(begin)
            while begin < end:
                if not (data := file.read(min(STEP_BYTES, end - begin))):
                    raise PartitionError(
                        f"{file.name} has become shorter; make the folder again, and distribute it again"
                    )
                begin += len(data)
                yield data


def told(one: Delivery) -> str:
    """What came of it, in a line. Pure."""
    parts = held.named(one.order["parts"])
    if one.problem:
        return f"{one.host}: not done: {one.problem}"
    if one.has:
        return f"{one.host} has it already: features of {parts}"
    return f"{one.host} has got {human_bytes(one.total_bytes)}: features of {parts}"


def far(one: Delivery) -> str:
    """How far it is. Pure."""
    return f"{one.host} {100 * one.moved_bytes // max(1, one.total_bytes)} %"
