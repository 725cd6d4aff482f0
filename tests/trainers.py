"""Train on several ranks of this machine in seconds; for tests of training itself. What a user types: test_launch.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemini_gnn.compose import compose
from gemini_gnn.errors import ClusterError
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.training.local import train_local


def train_ranks(world: int, run_dir: Path, *overrides: str, timeout_s: float = 120):
    """Exit codes of ``world`` trainers with the given Hydra overrides; their output in ``<run_dir>-rank<r>.log``."""
    arguments = [f"run_dir={run_dir}", "snapshot=none", "logger=quiet", "training.threads=1"]
    try:
        return train_local(compose([*arguments, *overrides]), world, timeout_s=timeout_s)
    except ClusterError as error:
        raise AssertionError(f"{error}\n{logs(run_dir, world)}") from error


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
