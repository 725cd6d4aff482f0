"""Snapshots in host memory for a plain PyTorch loop with DistributedDataParallel; no graph, no DeepSpeed.

    python -m gemini_gnn.run --run-dir /tmp/ddp examples/plain_ddp.py --steps 200
    deepspeed --num_gpus 2 --module gemini_gnn.run --run-dir /tmp/ddp examples/plain_ddp.py --steps 200

Kill it with SIGKILL wherever you like and type the same command: it goes on after its last step, with the same losses.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gemini_gnn.snapshot


class Progress:
    """What the loop itself must remember. JSON values, arrays and tensors."""

    def __init__(self):
        self.losses = []

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = state["losses"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--losses", help="write the losses to this file at the end")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(256, 8))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    teacher = torch.randn(64, 8)
    progress = Progress()

    torch.manual_seed(1 + rank)  # from here on every rank draws its own data
    snapshots = gemini_gnn.snapshot.attach((model, optimizer, scheduler), progress)  # <- the one line
    if rank == 0:
        print(f"going on after step {snapshots.steps}" if snapshots.restored else "a fresh start", flush=True)

    for step in range(snapshots.steps + 1, options.steps + 1):
        x = torch.randn(32, 64)
        loss = torch.nn.functional.cross_entropy(model(x), (x @ teacher).argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        progress.losses.append(loss.item())  # before the step ends: the snapshot is taken when scheduler.step() returns
        optimizer.step()
        scheduler.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)

    snapshots.close()
    if rank == 0 and options.losses:
        with open(options.losses, "w") as file:
            file.writelines(f"{loss!r}\n" for loss in progress.losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
