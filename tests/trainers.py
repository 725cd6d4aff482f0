"""Train on several ranks of this machine in seconds: trainers forked from a server that has imported everything.

The way a worker agent does it (imports once, forks, a listening socket handed to rank 0), without the agent; for tests
of training itself. What a user types is tested in test_launch.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from gemini_gnn.cluster import Place
from gemini_gnn.compose import compose
from gemini_gnn.config import to_mapping
from gemini_gnn.observe.run_dir import read_losses

_context = multiprocessing.get_context("forkserver")


def _trainer(payload: dict[str, Any], place: Place, listener: socket.socket | None, log: str, environ: dict[str, str]):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environ)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from gemini_gnn.training import job

    sys.exit(job.without_agent(payload, place, listener.detach() if listener else None))


def train_ranks(
    world: int, run_dir: Path, *overrides: str, environ: dict[str, str] | None = None, timeout_s: float = 120
):
    """Exit codes of ``world`` trainers with the given Hydra overrides; their output in ``<run_dir>-rank<r>.log``."""
    arguments = [f"run_dir={run_dir}", "snapshot=none", "logger=quiet", "training.threads=1"]
    payload = to_mapping(compose([*arguments, *overrides]))
    _context.set_forkserver_preload(["gemini_gnn.training.preload"])
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    processes = []
    deadline = time.monotonic() + timeout_s
    try:
        for rank in range(world):
            place = Place(rank, world, rank, world, "localhost", "127.0.0.1", port, "plain")
            arguments_of = (payload, place, listener if rank == 0 else None, f"{run_dir}-rank{rank}.log", environ or {})
            process = _context.Process(target=_trainer, args=arguments_of, daemon=True)
            process.start()
            processes.append(process)
        listener.close()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"ranks still running after {timeout_s} s: {codes}\n{logs(run_dir, world)}"
        return codes
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)


def trained(world: int, run_dir: Path, *overrides: str, **kwargs: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses by step and result.json of a run that must succeed."""
    codes = train_ranks(world, run_dir, *overrides, **kwargs)
    assert codes == [0] * world, f"exit codes {codes}\n{logs(run_dir, world)}"
    rows = read_losses(run_dir / "losses.csv")
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1)), "each step once"
    return [row[2] for row in rows], json.loads((run_dir / "result.json").read_text())


def logs(run_dir: Path, world: int) -> str:
    files = [Path(f"{run_dir}-rank{rank}.log") for rank in range(world)]
    return "\n".join(f"--- rank {r}\n{f.read_text()[-4000:]}" for r, f in enumerate(files) if f.exists())
