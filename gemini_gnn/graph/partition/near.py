"""Keeps a partitioned graph near a machine that may have to train on it at any moment: its files in the page cache.

A standby maps the graph when it takes a seat. Pages that come from a file server then cost seconds of the recovery; read
once before, they are there, as far as memory allows. One thread reads, at the lowest priority, and stops early rather
than push other pages out. It changes nothing, and a file system that hangs holds nobody but it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

PIECE_BYTES = 4 << 20
PAUSE_S = 1.0  # until the job has named its graph


def bring_near(folder_of_job: Callable[[], Path | None], most_bytes: int) -> threading.Thread:
    """Read the files of the folder once it is known. Returns the thread, a daemon.

    Args:
        folder_of_job: None: not known yet.
        most_bytes: of files that are read.
    """
    thread = threading.Thread(target=_read, args=(folder_of_job, most_bytes), name="near", daemon=True)
    thread.start()
    return thread


def _read(folder_of_job: Callable[[], Path | None], most_bytes: int) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread only
    pause = threading.Event()
    while (folder := folder_of_job()) is None:
        pause.wait(PAUSE_S)
    piece, left = bytearray(PIECE_BYTES), most_bytes
    try:
        # The small arrays first: every batch needs all of them, and only a part of the features.
        for path in sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_size):
            with open(path, "rb", buffering=0) as file:
                while left > 0 and (count := file.readinto(piece)):
                    left -= count
    except OSError:  # the trainer will say what is wrong with the folder
        return
