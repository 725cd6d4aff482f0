"""A stand-in for a file server that keeps locks. Hosts that share a kernel drop them at once, and cannot show it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held_locks(run_dir: Path) -> Iterator[None]:
    """All that a start could have locked in ``run_dir`` stays locked, as after its machine lost its power."""
    places = [run_dir / ".lock", run_dir / "terms" / "lock", *(run_dir / "terms").iterdir()]
    files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in places]
    try:
        for file in files:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        for file in files:
            os.close(file)
