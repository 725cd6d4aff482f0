"""Snapshots in host memory for a plain PyTorch loop: DistributedDataParallel, DataLoader, scheduler; no graph, no DeepSpeed.

    python -m gemini_gnn.run --run-dir /tmp/ddp examples/plain_ddp.py --steps 200
    deepspeed --num_gpus 2 --module gemini_gnn.run --run-dir /tmp/ddp examples/plain_ddp.py --steps 200

Kill it with SIGKILL wherever you like and type the same command: it goes on after its last step, in the middle of an epoch,
with the same losses.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gemini_gnn.snapshot


class Progress:
    """The state of the loop itself: JSON values, arrays and tensors."""

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
    x, teacher = torch.randn(1280, 64), torch.randn(64, 8)
    data = TensorDataset(x, (x @ teacher).argmax(dim=1))
    sampler = DistributedSampler(data)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(256, 8))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    progress = Progress()

    # DDP sums in another order after its first backward than in it. With three or more ranks that is another rounding, and a
    # restart begins with a first backward again: so this one comes before.
    model(torch.zeros(1, 64)).sum().backward()
    optimizer.zero_grad()

    torch.manual_seed(1 + rank)  # from here on every rank draws its own dropout
    snapshots = gemini_gnn.snapshot.attach((model, optimizer, scheduler), progress)  # <- the one line
    if rank == 0:
        print(f"going on after step {snapshots.steps}" if snapshots.restored else "a fresh start", flush=True)

    step, epoch = 0, 0
    while snapshots.steps < options.steps:
        sampler.set_epoch(epoch)
        # A generator of its own: without one, each new iterator draws from the generator that dropout draws from, and a
        # restart makes one iterator more.
        loader = DataLoader(data, 32, sampler=sampler, generator=torch.Generator().manual_seed(epoch))
        for x, target in loader:
            step += 1
            if step <= snapshots.steps:
                continue  # done before the restart
            loss = torch.nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            progress.losses.append(loss.item())  # before the step ends
            optimizer.step()
            scheduler.step()  # the snapshot is taken when this returns
            if rank == 0 and step % 50 == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
            if step == options.steps:
                break
        epoch += 1

    snapshots.close()
    if rank == 0 and options.losses:
        with open(options.losses, "w") as file:
            file.writelines(f"{loss!r}\n" for loss in progress.losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
