"""One rank of a trial of the collectives that training uses: an all-reduce and an all_to_all, their sums compared.

    python -m gemini_gnn.cluster.doctor.collective ORDER      (JSON: rank, world, address, port, interface, backend, fd, seconds)

The only file of the doctor that loads torch; in a process that the probe starts and, if it hangs, kills.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from typing import Any

NUMBERS = 1 << 18  # 1 MB per rank: more than fits into the buffers of sockets


def main(order: dict[str, Any]) -> None:
    if order["interface"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", order["interface"])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", order["interface"])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world, timeout = order["rank"], order["world"], datetime.timedelta(seconds=order["seconds"])
    began = time.monotonic()
    store = dist.TCPStore(
        order["address"],
        order["port"],
        world,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=order["fd"] if rank == 0 else None,
    )
    dist.init_process_group(order["backend"], store=store, rank=rank, world_size=world, timeout=timeout)
    device = "cuda" if order["backend"] == "nccl" else "cpu"
    total = torch.full((NUMBERS,), float(rank), device=device)
    dist.all_reduce(total)
    mine = torch.arange(world, device=device).repeat_interleave(NUMBERS // world) + rank * world
    theirs = torch.empty_like(mine)
    dist.all_to_all_single(theirs, mine)
    expected = (torch.arange(world, device=device) * world + rank).repeat_interleave(NUMBERS // world)
    right = bool((total == world * (world - 1) / 2).all()) and bool((theirs == expected).all())
    dist.barrier()
    print(json.dumps({"seconds": time.monotonic() - began} if right else {"problem": "the sums are wrong"}), flush=True)
    os._exit(0)  # the first rank has the store: the others must not mind that it ends


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
