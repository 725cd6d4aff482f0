"""What the tests of recovery run: a launcher like DeepSpeed's, slot processes, and trainers without torch.

python -m tests.recovery.targets RUN_DIR WORLD TARGET PAYLOAD     a launcher with WORLD slot processes
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig
from gemini_gnn.recovery import board
from gemini_gnn.recovery.board import Phase
from gemini_gnn.recovery.worker import entry
from gemini_gnn.snapshot import context


def note(kind: str, **fields: Any) -> None:
    """Append a line to RUN_DIR/notes.jsonl: what the tests wait for."""
    now = context.current()
    record = {"kind": kind, "rank": now.rank, "term": now.term, "generation": now.generation, "pid": os.getpid()}
    record |= {"monotonic_s": time.monotonic(), **fields}
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(record) + "\n")


def report(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Says where it is and ends."""
    print(f"hello from rank {place.rank}\r", end="", flush=True)
    print("an error line", file=sys.stderr)
    descriptors = sorted(os.listdir("/proc/self/fd"), key=int)
    links = {
        name: os.readlink(f"/proc/self/fd/{name}") for name in descriptors if os.path.exists(f"/proc/self/fd/{name}")
    }
    note(
        "report",
        listen=listen_fd is not None,
        port=place.master_port,
        payload=payload,
        resume=context.current().resume,
        folder=os.getcwd(),
        marker=os.environ.get("MARKER"),
        master_port=os.environ["MASTER_PORT"],
        omp=os.environ.get("OMP_NUM_THREADS"),
        cores=sorted(os.sched_getaffinity(0)),
        links=links,
        session=os.getsid(0),
        argv=sys.argv,
    )
    return payload.get("code", 0)


def fail(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Rank `rank` raises; the others see it a little later, as a collective would, and raise too."""
    if place.rank == payload["rank"]:
        from gemini_gnn.errors import DataError

        (Path(os.environ["NOTES"]).parent / "failed").touch()
        if payload.get("for_users"):
            raise DataError("expected a graph, got nothing; give one")
        raise ValueError("the first error")
    _wait_for(Path(os.environ["NOTES"]).parent / "failed")
    raise RuntimeError("Connection closed by peer")


def fail_before_the_first_snapshot(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Room was made, and the first copy begun."""
    from gemini_gnn.errors import SnapshotError
    from gemini_gnn.snapshot.store.arena import SlotFile

    for slot in range(3):
        SlotFile(context.current().arena, "rank-00000", slot, create=True).close()
    raise SnapshotError("resume=must, but there is no snapshot in host memory to go on from")


def fill_arena(payload: dict, place: Place, listen_fd: int | None) -> int:
    """So many snapshots that their removal takes a while."""
    note("training")
    for number in range(payload["files"]):
        (context.current().arena / f"shard-{number}").touch()
    return 0


def never_leaves(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Rank 0 raises, but a thread of it stays; the others wait for it."""
    note("training")
    if place.rank == 0:
        threading.Thread(target=time.sleep, args=(3600,)).start()
        raise ValueError("the error of one who stays")
    time.sleep(3600)
    return 0


def train(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Works until the file `finish` appears; keeps one "snapshot" in the arena; ends in order when asked."""
    folder = Path(os.environ["NOTES"]).parent
    alone = os.open(folder / f"alive-{place.rank}", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with this process
    except BlockingIOError:
        note("overlap")
        return 3
    arena = context.current().arena
    (arena / f"shard-{place.rank}-slot-0").write_bytes(b"s" * 4096)
    if payload.get("listens", True):
        entry.stop_requested()
    note("training", resume=context.current().resume, found=sorted(p.name for p in arena.iterdir()))
    while not (folder / "finish").exists():
        if payload.get("listens", True) and entry.stop_requested():
            note("stopping")
            return entry.STOPPED
        if (folder / f"die-{place.rank}-{context.current().generation}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)
    note("finished")
    return 0


def beats(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Steps of 10 ms on the board. Rank `rank` stops going on in step 20 of generation 1; the others wait for it."""
    now = context.current()
    for step in range(1, 40):
        board.mark(Phase.FORWARD, step)
        time.sleep(0.01)
        if step == 20 and now.generation == 1 and place.rank == payload["rank"]:
            note("training")
            if payload.get("stopped"):
                os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()  # also after SIGCONT
        board.mark(Phase.AGREEMENT)
        if step == 20:
            _wait_until(lambda: now.generation > 1 or payload["rank"] < 0)
    board.mark(Phase.WRITING)
    note("finished")
    return 0


def steps(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Steps of 10 ms until the file `finish` appears, each with a look for requests and orders. No rank waits for another."""
    note("training")
    step = 0
    while not (Path(os.environ["NOTES"]).parent / "finish").exists():
        step += 1
        board.mark(Phase.FORWARD, step)
        time.sleep(0.01)
        if entry.stop_requested():
            return entry.STOPPED
        board.mark(Phase.AGREEMENT)
    return 0


def collective(payload: dict, place: Place, listen_fd: int | None) -> int:
    """Rank 1 is killed in generation 1; the others then raise what a collective raises, and are seen first."""
    note("training")
    killed = Path(os.environ["NOTES"]).parent / "killed"
    if context.current().generation > 1:
        return 0
    if place.rank == 1:
        _wait_for(killed.with_name("raised"))
        os.kill(os.getpid(), signal.SIGKILL)
    killed.with_name("raised").touch()
    raise RuntimeError("Connection closed by peer")


def start_children(payload: dict, place: Place, listen_fd: int | None) -> int:
    """A data loader worker and a daemon of the trainer, then work."""
    worker = subprocess.Popen(["sleep", payload["seconds"]])
    subprocess.run(["sh", "-c", f"setsid sleep {payload['seconds']} & "], check=True)
    note("children", worker=worker.pid)
    return train(payload, place, listen_fd)


def torch_ranks(payload: dict, place: Place, listen_fd: int | None) -> int:
    """All ranks meet over the agent's socket, and sum."""
    import datetime

    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore(
        place.master_addr,
        place.master_port,
        place.world_size,
        is_master=place.rank == 0,
        timeout=datetime.timedelta(seconds=30),
        wait_for_workers=False,
        master_listen_fd=listen_fd if place.rank == 0 else None,
    )
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)
    total = torch.tensor([float(place.rank)])
    dist.all_reduce(total)
    note("sum", total=total.item(), threads=torch.get_num_threads(), draw=torch.rand(1).item())
    wide = torch.rand(512, 512) @ torch.rand(512, 512)  # a multi-threaded operation works after the fork
    assert wide.shape == (512, 512)
    if context.current().generation <= payload.get("kills", 0) and place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _wait_for(path: Path, patience_s: float = 20.0) -> None:
    _wait_until(path.exists, patience_s)


def _wait_until(condition: Callable[[], bool], patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what {os.getpid()} waited for did not happen")
        time.sleep(0.002)


# --- launcher and slot processes --------------------------------------------------------------------------------------


def launch(run_dir: str, world: int, target: str, payload: str) -> int:
    """Start the slots; when one fails, SIGTERM to the others and their children, as DeepSpeed's launcher does.

    The slots are forked: an interpreter less for each, and there are many in these tests.
    """
    fork = multiprocessing.get_context("fork")
    slots = [fork.Process(target=_ranked_slot, args=(rank, world, run_dir, target, payload)) for rank in range(world)]
    for one in slots:
        one.start()

    # A handler that looked at the slots itself would do so in the middle of the loop's own look, which may just have reaped one.
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    code, ended = 0, False
    while any(one.exitcode is None for one in slots):
        code = code or next((one.exitcode for one in slots if one.exitcode), 0)
        if (code or asked) and not ended:
            ended = True
            for one in slots:
                if one.exitcode is None:
                    _terminate_tree(one.pid)
        time.sleep(0.02)
    return code or next((one.exitcode for one in slots if one.exitcode), 0)


def _terminate_tree(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def _ranked_slot(rank: int, world: int, run_dir: str, target: str, payload: str) -> None:
    places = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_SIZE": world}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    os.environ.update({key: str(value) for key, value in places.items()})
    if rank == 0 and (late := json.loads(payload).get("late")) is not None:
        events = Path(run_dir, "events")
        _wait_until(lambda: "".join(path.read_text() for path in events.iterdir()).count('"refused"') > late)
        time.sleep(0.3)  # what rank 1 does then, it has done
    sys.exit(slot(run_dir, target, payload))


def slot(run_dir: str, target: str, payload: str) -> int:
    from gemini_gnn.cluster.place import discover
    from gemini_gnn.errors import GeminiError
    from gemini_gnn.recovery import shim

    options = json.loads(payload)
    if options.get("impatient"):
        shim.AGENT = "tests.recovery.impatient"
    if "bind" in options:
        os.sched_setaffinity(0, options["bind"][int(os.environ["RANK"])])
    try:
        return shim.run(
            discover(os.environ),
            Path(run_dir),
            target if ":" in target else f"tests.recovery.targets:{target}",
            options,
            preload=options.get("preload", []),
            resume=options.get("resume", "auto"),
            terminal=True,
            recovery=RecoveryConfig(**{"hang_factor": 0.0, **options.get("recovery", {})}),
            faults=FaultsConfig(**options.get("faults", {})),
            arena_root=options.get("arena", "/dev/shm"),
        )
    except GeminiError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5]))
