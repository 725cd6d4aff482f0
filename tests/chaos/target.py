"""The trainer of a campaign: launch/train.py's own, which notes its process id."""

from __future__ import annotations

from typing import Any

from gemini_gnn.cluster.place import Place
from gemini_gnn.training import job
from tests.recovery.targets import note


def train(payload: dict[str, Any], place: Place, listen_fd: int | None) -> int:
    note("training")
    return job.main(payload["config"], place, listen_fd)
