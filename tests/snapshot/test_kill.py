"""SIGKILL while snapshots are taken: what is restored is exactly a committed snapshot, never older than the last one known
to be recoverable.

The state is a function of the step (every number in it says the same), so a torn or mixed snapshot shows.
"""

import importlib
import mmap
import os
import random
import select
import signal
import struct
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.capture import copier
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.store import arena
from tests.ranks import _context as forkserver
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes


@pytest.fixture
def folder():
    path = arena.folder_of(f"test-{os.getpid()}-{os.urandom(4).hex()}")
    arena.make_folder(path)
    yield path
    arena.remove(path)


class Step:
    value = 0

    def state_dict(self):
        return {"step": self.value, "rows": np.full(1000 + self.value % 7, self.value)}

    def load_state_dict(self, state):
        self.value = state["step"]
        assert state["rows"].tolist() == [self.value] * (1000 + self.value % 7)


def build(world):
    """SGD with gradient 1 and rate 1: after step s every parameter is -s, exactly. Several copies of different size."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(n)) for n in (1, 70_000, 300_000)])
    module.register_buffer("seen", torch.zeros(50))
    return module, torch.optim.SGD(module.parameters(), lr=1.0)


def check(module, step):
    for p in module.parameters():
        assert (p == -step).all(), (step, p.unique())
    assert (module.seen == step).all()


def advance(module, optimizer, extra):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    module.seen += 1
    extra.value += 1
    optimizer.step()


def begin(folder, generation, rank=0, world=1):
    torch.set_num_threads(1)
    module, optimizer = build(world)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    extra = Step()
    here = Context("job", Path(folder), rank, world, rank, world, term=1, generation=generation)
    snapshots = attach((module, optimizer), extra, context=here)
    check(module, extra.value)
    assert extra.value == snapshots.steps
    return module, optimizer, extra, snapshots


def victim(folder, generation, shared, pipe):
    """Train until killed; ``shared`` holds the last step known to be committed."""
    (least,) = struct.unpack("<q", shared[:8])
    module, optimizer, extra, snapshots = begin(folder, generation)
    came_from = None if snapshots.restored is None else snapshots.restored.generation
    os.write(pipe, struct.pack("<qqq", least, extra.value, -1 if came_from is None else came_from))
    while True:
        advance(module, optimizer, extra)
        if extra.value % 3 == 0:
            snapshots.wait()
        if snapshots.last is not None:
            shared[:8] = struct.pack("<q", snapshots.last.step)


def nursery(folder, lives, seed, results):
    """Has imported everything and computed nothing: forks victims in milliseconds, and kills them."""
    for lazy in ("gemini_gnn.snapshot.session", "torch._dynamo"):  # the latter is what the first optimizer step imports
        importlib.import_module(lazy)
    draw = random.Random(seed)
    shared = mmap.mmap(-1, 8)
    found = []
    for generation in range(1, lives + 1):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                victim(folder, generation, shared, theirs)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(theirs)
        spoke, _, _ = select.select([ours], [], [], 60)
        said = os.read(ours, 24) if spoke else b""
        # Not waiting for an event: the instant of the kill is the test.
        time.sleep(draw.random() * 0.015)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(ours)
        found.append((struct.unpack("<qqq", said) if len(said) == 24 else None, os.waitstatus_to_exitcode(status)))
        if found[-1][0] is None:
            break
    results.send(found)


def test_200_kills_at_random_instants(folder):
    ours, theirs = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=nursery, args=(str(folder), 201, 1, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(240), "the nursery said nothing"
        found = ours.recv()
    finally:
        process.kill()
        process.join(10)
    reached = []
    for generation, (said, exit_code) in enumerate(found, 1):
        assert said is not None and exit_code == -signal.SIGKILL, (generation, said, exit_code)
        least, step, came_from = said
        assert step >= least, f"life {generation} went back to step {step}; step {least} had been committed"
        assert (came_from == -1) is (generation == 1) and came_from < generation
        reached.append(step)
    assert len(found) == 201 and reached == sorted(reached)
    assert len(set(reached)) > 50  # it got on, in many of its lives


def die_at(folder, generation, operation):
    """Take three snapshots, then die at the given one of the operations that write, in the fourth."""
    module, optimizer, extra, snapshots = begin(folder, generation)
    for _ in range(3):
        advance(module, optimizer, extra)
        snapshots.wait()
    count = [0]

    def dying(original):
        def call(*args):
            if count[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return original(*args)

        return call

    os.pwrite = dying(os.pwrite)
    copier._memmove_free = dying(copier._memmove_free)
    copier._memmove_held = dying(copier._memmove_held)
    advance(module, optimizer, extra)
    snapshots.wait()
    snapshots.close()


def survivor(folder, generation):
    _, _, extra, snapshots = begin(folder, generation)
    snapshots.close()
    os._exit(extra.value)


def fork(work, *args):
    """Exit code of ``work(*args)`` in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def autopsies(folder, operations, results):
    for lazy in ("gemini_gnn.snapshot.session", "torch._dynamo"):
        importlib.import_module(lazy)
    found = []
    for operation in range(operations):
        job = os.path.join(folder, str(operation))
        found.append((fork(die_at, job, 1, operation), fork(survivor, job, 2)))
    results.send(found)


def test_a_kill_before_each_operation_that_writes(folder):
    """Header and buffer, header and 3 tensors, 2 tails and 2 headers: it counts after the last of these, not before."""
    ours, theirs = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=autopsies, args=(str(folder), 12, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(120), "nothing was said"
        found = ours.recv()
    finally:
        process.kill()
        process.join(10)
    assert found == [(-signal.SIGKILL, 3)] * 10 + [(0, 4)] * 2


def two_ranks(rank, world, folder, generation, known):
    _, _, extra, snapshots = state = begin(folder, generation, rank, world)
    with open(known, "r+b") as file, mmap.mmap(file.fileno(), 8 * (world + 1)) as shared:
        least = min(struct.unpack_from("<q", shared, 8 * r)[0] for r in range(world))
        assert extra.value >= least, (extra.value, least)
        # Steps that were rolled back count no more, or the other rank's next commit of such a step would seem to be of both.
        # The rank that comes first has looked at the old numbers; no step is taken before both are here.
        shared[8 * rank : 8 * rank + 8] = struct.pack("<q", extra.value)
        kill_after = time.monotonic() + random.Random(generation * world + rank).random() * 0.05
        while True:
            advance(*state[:3])
            if snapshots.last is not None:
                shared[8 * rank : 8 * rank + 8] = struct.pack("<q", snapshots.last.step)
            if rank == generation % world and time.monotonic() > kill_after:
                os.kill(os.getpid(), signal.SIGKILL)


def test_kills_of_one_of_two_ranks(folder, tmp_path):
    known = tmp_path / "known"
    known.write_bytes(struct.pack("<3q", 0, 0, 0))
    for generation in range(1, 5):
        with pytest.raises(AssertionError, match=r"died with exit code -9|Connection|closed"):
            run_ranks(two_ranks, 2, str(folder), generation, str(known), timeout_s=60)
    assert min(struct.unpack("<3q", known.read_bytes())[:2]) > 0
