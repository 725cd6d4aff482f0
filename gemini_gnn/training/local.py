"""Several ranks on this machine without a launcher: for notebooks, tests and benchmarks.

Trainers are forked from a server process that has imported everything once, so a rank starts in milliseconds. Rank 0
gets a listening socket for the store, so there is no port to pick. No process outlives the call, whatever happens.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.place import Place, threads
from gemini_gnn.config import Config, from_mapping, to_mapping
from gemini_gnn.errors import ClusterError, GeminiError, RunDirError
from gemini_gnn.observe.errors import first_exit_code

_context = multiprocessing.get_context("forkserver")


def _trainer(payload: dict[str, Any], place: Place, listener: socket.socket | None, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from gemini_gnn.training import job

    torch.set_num_threads(threads(os.environ, len(os.sched_getaffinity(0)), place.local_world_size))
    try:
        sys.exit(job.run(from_mapping(payload), place, listener.detach() if listener else None))
    except Exception as error:
        print(
            f"error: {error}" if isinstance(error, GeminiError) else traceback.format_exc(), file=sys.stderr, flush=True
        )
        if isinstance(error, RunDirError):  # the folder is not ours: nothing is written there
            sys.exit(2)
        sys.exit(first_exit_code(Path(payload["run_dir"]), place.rank, place.world_size, error))


def train_local(config: Config, ranks: int, *, timeout_s: float = 24 * 3600.0) -> list[int]:
    """Train with ``ranks`` processes here and return their exit codes. Output goes to ``<run_dir>-rank<r>.log``.

    Args:
        timeout_s: of the whole run.

    Raises:
        ClusterError: a rank is still running after ``timeout_s``; all are killed then.
    """
    _context.set_forkserver_preload(["gemini_gnn.training.preload"])
    Path(config.run_dir).parent.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = []
    deadline = time.monotonic() + timeout_s
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        try:
            for rank in range(ranks):
                place = Place(rank, ranks, rank, ranks, socket.gethostname(), "127.0.0.1", port, "plain")
                given = listener if rank == 0 else None
                arguments = (to_mapping(config), place, given, f"{config.run_dir}-rank{rank}.log")
                process = _context.Process(target=_trainer, args=arguments, daemon=True)
                process.start()
                processes.append(process)
            for child in processes:
                child.join(max(0.0, deadline - time.monotonic()))
            codes = [child.exitcode for child in processes]
            if None in codes:
                raise ClusterError(
                    f"ranks {[r for r, c in enumerate(codes) if c is None]} still ran after {timeout_s} s"
                )
            return [int(code) for code in codes if code is not None]
        finally:
            for child in processes:
                if child.is_alive():
                    child.kill()
                child.join(10)
