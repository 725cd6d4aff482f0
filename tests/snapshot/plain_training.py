"""A small plain PyTorch training, and snapshots of it in an arena that leaves nothing behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.store import arena
from gemini_gnn.snapshot.store.format import SlotState


@contextmanager
def arena_folder() -> Iterator[Path]:
    """The name of an arena that is not there yet."""
    path = arena.folder_of(f"test-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield path
    finally:
        if path.is_symlink():
            path.unlink()
        arena.remove(path)


def context_of(folder, generation=1, resume="auto", job="job", rank=0, world=1):
    return Context(job, folder, rank, world, rank, world, term=1, generation=generation, resume=resume)


def parts(seed=0, optimizer="adam", width=5):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 2))
    make = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, nesterov=False),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
        "adadelta": lambda p: torch.optim.Adadelta(p),
        "lamb-less": lambda p: torch.optim.NAdam(p),
    }[optimizer]
    return module, make(module.parameters())


def step(module, optimizer, scheduler=None):
    loss = module(torch.randn(8, 3)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return loss.item()


def everything(module, optimizer):
    yield from module.state_dict().values()
    for state in optimizer.state.values():
        yield from (v for v in state.values() if isinstance(v, torch.Tensor))


class Engine:
    """The attributes of a DeepSpeed engine that snapshots look at."""

    def __init__(self):
        self.module, self.optimizer = parts()
        self.lr_scheduler = None
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0

    def step(self):
        self.optimizer.step()
        self.global_steps += 1


def attach_and_close(folder, generation, resume="auto", engine=None, **options):
    snapshots = attach(engine or parts(), context=context_of(folder, generation, resume), **options)
    snapshots.close()
    return snapshots.restored


def run_some(folder, steps=3, generation=1):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder, generation))
    for _ in range(steps):
        step(module, opt)
        snapshots.wait()
    snapshots.close()


def slots_of(folder, shard):
    return sorted(
        (h.identity.step, f)
        for f in arena.slots(folder)
        if f.shard == shard and (h := f.header()) is not None and h.state is SlotState.COMMITTED
    )
