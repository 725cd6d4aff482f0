"""attach() on two ranks: what all hold once per machine, what differs, what one rank lacks or refuses."""

from pathlib import Path

import pytest
import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import attach, restore
from gemini_gnn.snapshot.capture import divergence
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.store import arena
from tests.ranks import run_ranks
from tests.snapshot.plain_training import (
    arena_folder,
    context_of,
    everything,
    parts,
    slots_of,
    step,
)


def test_the_ranks_that_differ_are_named():
    divergence.check(["a", "a", "a"], 5)
    with pytest.raises(SnapshotError, match="after step 5, .*; rank 1 and ranks 0, 2 differ"):
        divergence.check(["a", "b", "a"], 5)
    with pytest.raises(SnapshotError, match="; rank 1 and rank 0 differ"):
        divergence.check(["a", "b"], 5)
    with pytest.raises(SnapshotError, match="; ranks 0, 1, 2, 3, 4, 5, 6, 7 and 1 more and ranks 9, 10,"):
        divergence.check([str(i) for i in range(9)] + ["x"] * 20, 5)


def ddp_case(rank, world, root):
    folder = Path(root) / "job"
    for generation, seed, upto in ((1, 0, 3), (2, 5, 6)):
        torch.manual_seed(seed)
        module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
        optimizer = torch.optim.Adam(module.parameters())
        snapshots = attach((module, optimizer), context=context_of(folder, generation, rank=rank, world=world))
        assert snapshots.restored == (None if generation == 1 else (1, 1, 3))
        if generation == 1:
            torch.manual_seed(rank)
        losses = []
        for s in range(snapshots.steps, upto):
            losses.append(step(module, optimizer))
            snapshots.wait()
            torch.distributed.barrier()
            if s == 2:
                kept = [t.clone() for t in everything(module, optimizer)]
        if generation == 1:
            names = {p.name for p in folder.iterdir()}
            assert names == {f"{s}.{i}" for s in ("rank-00000", "rank-00001", "common") for i in range(3)}
            # Only the first rank of a machine copies what all hold identically.
            assert (snapshots.stats.bytes > 0) is (rank == 0)
            snapshots.close()
            want = [step(module, optimizer) for _ in range(3)]
            final = list(everything(module, optimizer))
            assert kept
        else:
            assert losses == want
            assert all(torch.equal(a, b) for a, b in zip(everything(module, optimizer), final, strict=True))
            snapshots.close()


def final_case(rank, world, root):
    """Ranks of an orderly stop capture the same last step, and go on from it."""
    module, optimizer = parts()
    snapshots = attach(
        (module, optimizer), context=context_of(Path(root) / "job", rank=rank, world=world), every=4, hook=False
    )
    if rank == 1:
        snapshots.wait()  # one rank is done with its capture, the other may not be
    snapshots.final(3)
    assert snapshots.recoverable == (1, 1, 3)
    snapshots.close()
    snapshots = attach(parts(), context=context_of(Path(root) / "job", 2, rank=rank, world=world))
    assert snapshots.restored == (1, 1, 3)
    snapshots.close()


def diverging_case(rank, world, root, machines):
    """A rank whose weights differ from the others' is noticed by all, not averaged away or restored over."""
    divergence.VERIFY_EVERY = 2
    here = context_of(Path(root) / "job", rank=rank, world=world)
    if machines > 1:
        here = Context("job", Path(root) / f"h{rank}", rank, world, 0, 1, term=1, generation=1)
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    snapshots = attach((module, optimizer), context=here, hook=False)
    exchanges = counted(snapshots._ranks)
    try:
        for s in range(1, 10):
            bit = torch.tensor([int(snapshots.ready())])
            torch.distributed.all_reduce(bit, op=torch.distributed.ReduceOp.MIN)
            snapshots.before_step()
            if rank == 1 and s == 3:
                with torch.no_grad():
                    module.weight[0, 0] += 1e-7
            snapshots.after_step(s, bool(bit))
            snapshots.wait()
            torch.distributed.barrier()
    except SnapshotError as error:
        snapshots.close()
        return str(error), s, len(exchanges), snapshots.recoverable.step
    raise AssertionError("nobody noticed")


def counted(ranks):
    """Every exchange from now on."""
    seen, exchange = [], ranks.exchange
    ranks.exchange = lambda value: seen.append(value) or exchange(value)
    return seen


def diverging_at_the_end_case(rank, world, root):
    module, optimizer = parts()
    here = Context("job", Path(root) / f"h{rank}", rank, world, 0, 1, term=1, generation=1)
    snapshots = attach((module, optimizer), context=here, hook=False)
    snapshots.final(0)
    divergence.VERIFY_EVERY = 1
    with torch.no_grad():
        next(module.parameters()).add_(rank)
    snapshots.after_step(1, capture=True)
    with pytest.raises(SnapshotError, match="after step 1, .*rank 1 and rank 0 differ"):
        snapshots.final(1)
    snapshots.close()


def different_start_case(rank, world, root):
    """Without DDP every rank may hold weights of its own: then each keeps a snapshot of its own."""
    for generation in (1, 2):
        module, optimizer = parts(seed=10 * generation + rank)
        snapshots = attach(
            (module, optimizer), context=context_of(Path(root) / "job", generation, rank=rank, world=world)
        )
        if generation == 1:
            want = [t.clone() for t in everything(module, optimizer)]
        else:
            assert snapshots.restored == (1, 1, 0)
            assert all(torch.equal(a, b) for a, b in zip(everything(module, optimizer), want, strict=True))
        snapshots.close()
    assert not list((Path(root) / "job").glob("common.*"))


def incomplete_case(rank, world, root):
    """A machine that lost its memory: one rank has nothing, so the job has nothing; damage on one rank moves all."""
    folder = Path(root) / f"job{rank}"  # as if on two machines
    module, optimizer = parts(seed=rank)

    def begin(generation, resume="auto"):
        here = Context("job", folder, rank, world, 0, 1, term=1, generation=generation, resume=resume)
        return attach((module, optimizer), context=here, hook=False)

    snapshots = begin(1)
    for s in (1, 2, 3):
        snapshots.after_step(s, capture=True)
        snapshots.wait()
        torch.distributed.barrier()
    snapshots.close()
    if rank == 1:
        _, file = slots_of(folder, "rank-00001")[-1]
        with open(file.path, "r+b") as raw:
            raw.seek(4096)
            raw.write(b"damage")
    # A kill after one rank has voided what is newer, and before another has: the next start finishes it.
    original = restore.void_newer
    if rank == 0:
        restore.void_newer = dies
    with pytest.raises(SnapshotError, match="dies"):
        begin(2)
    restore.void_newer = original
    torch.distributed.barrier()
    believed = max(step for step, _ in slots_of(folder, f"rank-0000{rank}"))
    assert believed == (3 if rank == 0 else 2)
    snapshots = begin(3)
    assert snapshots.restored == (1, 1, 2), snapshots.restored
    assert max(step for step, _ in slots_of(folder, f"rank-0000{rank}")) == 2
    snapshots.close()
    torch.distributed.barrier()
    if rank == 0:
        arena.remove(folder)
    torch.distributed.barrier()
    try:
        begin(4, "must")
    except SnapshotError as error:
        assert "of snapshot 1-1-2 rank 0 on " in str(error)
        assert "lacks shard rank-00000, which is on no machine of this job" in str(error)
    else:
        raise AssertionError("resume=must went on from nothing")
    with pytest.raises(SnapshotError, match="^2 steps were done, but no snapshot in host memory can be restored"):
        begin(5)
    snapshots = begin(5, "never")
    assert snapshots.restored is None
    snapshots.close()


def swapped_case(rank, world, root):
    """Every rank's shard is on the other machine, and no agent has fetched it."""
    module, optimizer = parts()

    def begin(machine, generation, resume="auto", done=0):
        here = Context(
            "job", Path(root) / f"h{machine}", rank, world, 0, 1, term=1, generation=generation, resume=resume
        )
        return attach((module, optimizer), context=here, hook=False, steps_done=done)

    snapshots = begin(rank, 1)
    for s in (1, 2):
        snapshots.after_step(s, capture=True)
        snapshots.wait()
        torch.distributed.barrier()
    snapshots.close()
    torch.distributed.barrier()
    before = contents(root)
    with pytest.raises(SnapshotError) as caught:
        begin(1 - rank, 2, done=9 if rank == 0 else 0)  # rank 0 has read the run directory
    said, h0, h1 = str(caught.value), *(restore.machine_of(Path(root) / name)[1] for name in ("h0", "h1"))
    assert said.startswith("9 steps were done"), "all ranks say the same"
    assert (
        f"of snapshot 1-1-2 rank 0 on {h1} lacks shard rank-00000, which is on {h0}; rank 1 on {h0} lacks shard rank-00001"
        in said
    )
    assert "resume=never" in said
    torch.distributed.barrier()
    assert contents(root) == before, "nothing was made, voided or changed"
    torch.distributed.barrier()
    snapshots = begin(rank, 3, "must")
    assert snapshots.restored == (1, 1, 2)
    snapshots.close()


def contents(root):
    return {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def dies(shards, identity):
    raise SnapshotError("dies")


def error_on_one_rank_case(rank, world, root):
    """What one rank refuses, all refuse: nobody is left waiting in a collective."""
    folder = Path(root) / "job"
    module, optimizer = parts(width=5 + rank)
    attach((module, optimizer), context=context_of(folder, rank=rank, world=world)).close()
    module, optimizer = parts(width=5 if rank == 0 else 9)
    with pytest.raises(SnapshotError, match=r"^rank 1: .*tensor" if rank == 0 else "tensor"):
        attach((module, optimizer), context=context_of(folder, 2, rank=rank, world=world))
    return True


@pytest.fixture
def root():
    with arena_folder() as path:
        yield str(arena.make_folder(path))


@pytest.mark.parametrize(
    "case", [ddp_case, final_case, different_start_case, incomplete_case, swapped_case, error_on_one_rank_case]
)
def test_on_two_ranks(case, root):
    run_ranks(case, 2, root, timeout_s=60)


@pytest.mark.parametrize("machines", [1, 2])
def test_ranks_that_drift_apart_are_noticed_by_all(root, machines):
    """Captures 0, 2, 4 are compared, each when the next one is agreed upon."""
    said = run_ranks(diverging_case, 2, root, machines, timeout_s=60)
    assert said[0] == said[1]
    words, step, exchanges, recoverable = said[0]
    assert "after step 4, as data-parallel ranks do; rank 1 and rank 0 differ" in words
    assert (step, exchanges, recoverable) == (5, 3, 3)


def test_ranks_that_drifted_apart_do_not_stop_in_order(root):
    run_ranks(diverging_at_the_end_case, 2, root, timeout_s=60)
