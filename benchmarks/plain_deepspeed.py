"""The same training as a plain DeepSpeed job: no worker agent, DeepSpeed's checkpoints in a folder. A peer for recovery.py.

    deepspeed --num_accelerators 2 benchmarks/plain_deepspeed.py run_dir=... snapshot=nfs

Every slot process is the trainer itself. When one dies the launcher ends the others, and the command is typed again.
"""

from __future__ import annotations

import os
import sys

import torch

from gemini_gnn.cluster.place import discover, threads
from gemini_gnn.compose import command, compose
from gemini_gnn.training import job


def main(arguments: list[str]) -> int:
    place = discover(os.environ)
    torch.set_num_threads(threads(os.environ, len(os.sched_getaffinity(0)), place.local_world_size))
    return job.run(compose(arguments), place)


if __name__ == "__main__":
    command(main, __doc__ or sys.argv[0])
