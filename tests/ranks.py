"""Run a function on several gloo ranks of this machine: the second tier of tests.

Processes come from a fork server that has imported everything once and started no thread, so a rank starts in milliseconds.
The rendezvous is a file, so there is no port to pick. Every wait has a deadline; no process outlives the call.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
# What a trainer imports, too: there is one fork server per process, and ``train_local`` gets whichever was started first.
_context.set_forkserver_preload(["gemini_gnn.training.preload"])


def _rank_main(fn, rank, world, folder, args, pipe):
    import torch

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    try:
        store = torch.distributed.FileStore(os.path.join(folder, "store"), world)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
        )
        result = fn(rank, world, *args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        pipe.send(("ok", result))
    except BaseException as error:
        pipe.send(("error", f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        pipe.close()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """``[fn(rank, world, *args) for rank in range(world)]``, each in its own process within a gloo group.

    ``fn`` must be a module-level function (it travels by name). Raises AssertionError with the traceback of the first
    rank that reported an error, or when a rank says nothing before ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank_main, args=(fn, rank, world, folder, args, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results: dict[int, Any] = {}
        try:
            while len(results) < world:
                waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
                ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                assert ready, f"ranks {sorted(set(range(world)) - set(results))} said nothing within {timeout_s} s"
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        kind, value = pipe.recv()
                    except EOFError:
                        processes[rank].join(5)
                        raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
                    assert kind == "ok", value
                    results[rank] = value
            return [results[rank] for rank in range(world)]
        finally:
            for process in processes:
                if process.is_alive() and len(results) == world:
                    process.join(10)
                if process.is_alive():
                    process.kill()
                process.join(10)
