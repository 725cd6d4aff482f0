"""attach() around plain PyTorch on one rank, DDP on two, and everything it has to refuse."""

import contextlib
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import arena, attach, context, copier, locks, replicated, restore
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.identity import Identity
from gemini_gnn.snapshot.layout import SlotState
from gemini_gnn.snapshot.replicated import Expected
from gemini_gnn.snapshot.shards import REPLICATED
from tests.ranks import run_ranks


@pytest.fixture
def folder():
    """An arena folder that leaves nothing behind."""
    path = arena.folder_of(f"test-{os.getpid()}-{os.urandom(4).hex()}")
    yield path
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


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adagrad", "rmsprop", "adadelta", "lamb-less"])
@pytest.mark.parametrize("steps", [0, 3])
def test_plain_pytorch_goes_on_bit_for_bit(folder, optimizer, steps):
    module, opt = parts(0, optimizer)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4], 0.5)
    snapshots = attach((module, opt, scheduler), context=context_of(folder))
    for _ in range(steps):
        step(module, opt, scheduler)
        snapshots.wait()
    snapshots.close()
    want = [step(module, opt, scheduler) for _ in range(4)]

    module2, opt2 = parts(77, optimizer)
    scheduler2 = torch.optim.lr_scheduler.MultiStepLR(opt2, [2, 4], 0.5)
    snapshots = attach((module2, opt2, scheduler2), context=context_of(folder, 2))
    assert snapshots.restored == (1, 1, steps)
    assert len(opt2.state) == (0 if steps == 0 and optimizer != "adagrad" else len(list(module2.parameters())))
    assert [step(module2, opt2, scheduler2) for _ in range(4)] == want
    snapshots.close()
    assert all(torch.equal(a, b) for a, b in zip(everything(module, opt), everything(module2, opt2), strict=True))
    assert scheduler2.state_dict() == scheduler.state_dict()


def test_the_memory_needed_is_said_at_every_start(folder, caplog):
    caplog.set_level("INFO")
    for generation in (1, 2):
        caplog.clear()
        attach_and_close(folder, generation)
        (said,) = [r.message for r in caplog.records if "of host memory needed" in r.message]
        assert "6.3 MB of host memory needed on this machine" in said
        assert ("0.0 MB of it not allocated yet" in said) is (generation == 2)


def test_a_late_writer_is_still_compared_with(folder):
    run_some(folder, 2)
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder, 2))
    (shard,) = [s for s in snapshots._shards if s.name == REPLICATED]
    assert not replicated.compare(shard, Expected(Identity(1, 2, 3), bytes(16)), rank=1)  # not committed yet
    with pytest.raises(SnapshotError, match="they differ"):
        replicated.compare(shard, Expected(Identity(1, 1, 2), bytes(16)), rank=1)
    assert replicated.compare(shard, replicated.expect(shard, Identity(1, 1, 2)), rank=1)
    snapshots.close()


def test_closing_leaves_the_optimizer_as_it_was(folder):
    module, opt = parts()
    before = opt.step
    attach((module, opt), context=context_of(folder)).close()
    assert opt.step == before and not opt._optimizer_step_pre_hooks


def test_nothing_of_the_tiny_twin_stays_in_the_optimizer(folder):
    module, opt = parts()
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    attach((module, opt), context=context_of(folder)).close()
    assert not opt.state and not calls


def test_files_are_private_and_allocated(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    for path in folder.iterdir():
        info = path.stat()
        assert stat.S_IMODE(info.st_mode) == 0o600 and info.st_blocks * 512 >= info.st_size > 1 << 20
    snapshots.close()


def test_every_third_step(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder), every=3)
    for _ in range(7):
        step(module, opt)
        snapshots.wait()
    assert snapshots.stats.captures == 3 and snapshots.last == (1, 1, 6)
    assert snapshots.recoverable == (1, 1, 3)
    snapshots.close()


def test_an_orderly_stop_keeps_its_last_step(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder), every=3)
    for _ in range(5):
        step(module, opt)
    snapshots.final(5)
    assert snapshots.last == snapshots.recoverable == (1, 1, 5)
    captures = snapshots.stats.captures
    snapshots.final(5)
    assert snapshots.stats.captures == captures  # it is there already
    snapshots.close()
    assert attach_and_close(folder, 2) == (1, 1, 5)


def test_an_orderly_stop_says_that_it_found_no_slot(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder), every=9, timeout_s=0.2)
    readers = [f for f in arena.slots(folder) if f.shard == "replicated"]
    assert all(f.lock(exclusive=False) for f in readers)
    step(module, opt)
    with pytest.raises(SnapshotError, match=r"free slot for the last snapshot \(step 1\).*go on from 1-1-0"):
        snapshots.final(1)
    snapshots.close()


def test_resume_never_forgets_and_must_insists(folder):
    module, opt = parts()
    with pytest.raises(SnapshotError, match="resume=must"):
        attach((module, opt), context=context_of(folder, resume="must"))
    attach((module, opt), context=context_of(folder)).close()
    assert attach_and_close(folder, 2, "must") == (1, 1, 0)
    assert attach_and_close(folder, 3, "never") is None
    assert attach_and_close(folder, 4, "auto") == (1, 3, 0)


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


@pytest.mark.parametrize("where", ["data", "tail", "header"])
@pytest.mark.parametrize("shard", ["rank-00000", "replicated"])
def test_damage_is_found_and_the_snapshot_before_is_taken(folder, where, shard):
    run_some(folder)
    newest, file = slots_of(folder, shard)[-1]
    h = file.header()
    position = {"data": 4096, "tail": h.tail_offset + 9, "header": 24}[where]
    with open(file.path, "r+b") as raw:
        raw.seek(position)
        byte = raw.read(1)
        raw.seek(position)
        raw.write(bytes([byte[0] ^ 1]))
    assert newest == 3 and attach_and_close(folder, 2) == (1, 1, 2)
    # The damaged and rolled-back one was voided.
    assert all(f.view().identity != (1, 1, 3) or f.view().state is SlotState.VOID for f in arena.slots(folder))


def test_a_file_cut_short_is_no_snapshot(folder):
    run_some(folder)
    _, file = slots_of(folder, "replicated")[-1]
    os.truncate(file.path, 5000)
    assert attach_and_close(folder, 2) == (1, 1, 2)


def test_all_damaged_starts_afresh_unless_it_must_not(folder, caplog):
    run_some(folder)
    for _, file in slots_of(folder, "replicated"):
        with open(file.path, "r+b") as raw:
            raw.seek(4096)
            raw.write(b"\1\2\3\4\5\6\7\1")
    with pytest.raises(SnapshotError, match=r"resume=must.*checksum"):
        attach_and_close(folder, 2, "must")
    assert attach_and_close(folder, 2) is None and "checksum" in caplog.text


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: parts(width=6), r"tensor buffer\.1\.running_mean: the snapshot has \['float32', \[5\]\], this run"),
        (lambda: parts(optimizer="sgd"), "optimizer: the snapshot has Adam, this run SGD"),
    ],
)
def test_another_topology_is_refused_with_the_difference(folder, other, words):
    run_some(folder)
    with pytest.raises(SnapshotError, match=words) as caught:
        attach_and_close(folder, 2, engine=other())
    assert "resume=never" in str(caught.value)
    assert attach_and_close(folder, 3) == (1, 1, 3)  # refusing has not touched it
    assert attach_and_close(folder, 4, "never", engine=other()) is None


def test_another_scheduler_group_or_extra_state_is_refused_before_anything_is_overwritten(folder):
    run_some(folder)
    module, opt = parts(seed=3)
    before = [t.clone() for t in everything(module, opt)]
    scheduler = torch.optim.lr_scheduler.StepLR(parts()[1], 1)
    with pytest.raises(SnapshotError, match="learning-rate scheduler: the snapshot has none, this run StepLR"):
        attach((module, opt, scheduler), context=context_of(folder, 2))
    two = torch.optim.Adam([{"params": p} for p in module.parameters()], lr=0.01, amsgrad=True)
    with pytest.raises(SnapshotError, match="parameter groups of the optimizer"):
        attach((module, two), context=context_of(folder, 2))
    with pytest.raises(SnapshotError, match="extra_state was given: the snapshot has False, this run True"):
        attach((module, opt), torch.nn.Identity(), context=context_of(folder, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(module, opt), strict=True))


def test_another_job_format_and_generation_are_refused(folder):
    run_some(folder)
    with pytest.raises(SnapshotError, match="of job other; got shard rank-00000 of job job"):
        attach(parts(), context=context_of(folder, 2, job="other"))
    with pytest.raises(SnapshotError, match="of a later one"):
        attach(parts(), context=Context("job", folder, 0, 1, 0, 1, term=0, generation=9))
    for _, file in slots_of(folder, "replicated"):
        with open(file.path, "r+b") as raw:
            raw.seek(8)
            raw.write(b"\7")
    with pytest.raises(SnapshotError, match="format version: expected 1, got 7"):
        attach_and_close(folder, 2)
    assert attach_and_close(folder, 2, "never") is None


def test_an_engine_that_has_stepped_is_refused(folder):
    class Engine:  # as much of DeepSpeed's as collect() looks at
        def __init__(self):
            self.module, self.optimizer = parts()
            self.lr_scheduler, self.global_steps, self.global_samples, self.micro_steps, self.skipped_steps = (
                None,
                0,
                0,
                0,
                0,
            )

        def step(self):
            self.optimizer.step()
            self.global_steps += 1

    attach(Engine(), context=context_of(folder)).close()
    engine = Engine()
    engine.step()
    with pytest.raises(SnapshotError, match="fresh engine"):
        attach(engine, context=context_of(folder, 2))


def test_too_little_room_is_said_before_anything_is_allocated(folder, monkeypatch):
    monkeypatch.setattr(arena, "room", lambda root: arena.Room(1000, "the size of /dev/shm", "make it larger"))
    with pytest.raises(
        SnapshotError, match=r"need 6\.\d MB more .* available are 1\.0 KB, limited by .*make it larger"
    ):
        attach(parts(), context=context_of(folder))
    assert not list(folder.iterdir())


def test_an_arena_of_another_user_or_a_link_is_refused(folder, monkeypatch, tmp_path):
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.symlink_to(tmp_path)
    with pytest.raises(SnapshotError, match="it is a link"):
        attach(parts(), context=context_of(folder))
    folder.unlink()
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(SnapshotError, match="belongs to user"):
        attach(parts(), context=context_of(folder))


def test_without_a_worker_agent_it_is_said(monkeypatch):
    monkeypatch.setattr(context, "_installed", None)
    with pytest.raises(SnapshotError, match=r"python -m gemini_gnn\.run"):
        attach(parts())


def test_wrong_arguments(folder):
    with pytest.raises(SnapshotError, match="expected a DeepSpeed engine"):
        attach(object(), context=context_of(folder))
    with pytest.raises(SnapshotError, match=r"state_dict\(\) and load_state_dict\(\); got dict"):
        attach(parts(), {"a": 1}, context=context_of(folder))
    with pytest.raises(SnapshotError, match="at least 1"):
        attach(parts(), context=context_of(folder), every=0)


def test_a_state_that_changes_shape_is_said_in_the_training_thread(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    step(module, opt)
    snapshots.wait()
    opt.state[module[0].weight]["exp_avg"] = torch.zeros(99)
    with pytest.raises(SnapshotError, match="changed shape"):
        for _ in range(3):
            opt.param_groups[0]["lr"] = 0.0
            snapshots.after_step(9, snapshots.ready())
            snapshots.wait()
    with pytest.raises(SnapshotError, match="changed shape"):
        snapshots.close()


@pytest.mark.parametrize("name", ["in place", "replaced"])
def test_what_changes_while_it_is_copied_is_not_committed(folder, monkeypatch, name):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    begun, go_on, copy = threading.Event(), threading.Event(), copier.Copier._copy_all

    def late(self, shard, slot):
        begun.set()
        assert go_on.wait(30)
        return copy(self, shard, slot)

    monkeypatch.setattr(copier.Copier, "_copy_all", late)
    step(module, opt)
    assert begun.wait(30)
    with torch.no_grad():
        if name == "in place":
            module[0].weight.clamp_(-0.1, 0.1)
        else:
            module[0].weight.data = module[0].weight.data * 0.9
    go_on.set()
    with pytest.raises(SnapshotError, match=r"master\.0\.weight was changed .* 1-1-1.*before_step\(\)"):
        snapshots.before_step()
    with pytest.raises(SnapshotError, match="was changed"):
        snapshots.close()
    assert attach_and_close(folder, 2) == (1, 1, 0)


def test_after_the_fence_parameters_may_change(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    for _ in range(3):
        step(module, opt)
        snapshots.before_step()
        with torch.no_grad():
            module[0].weight.clamp_(-0.1, 0.1)
        snapshots.wait()
    assert snapshots.last == (1, 1, 3)
    snapshots.close()


def test_a_pinned_slot_is_passed_over_and_two_pins_skip(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    readers = [f for f in arena.slots(folder) if f.shard == "replicated"]
    free = [f for f in readers if f.view().state is SlotState.VOID]
    assert free[0].lock(exclusive=False)
    step(module, opt)
    snapshots.wait()
    assert snapshots.last == (1, 1, 1) and free[0].view().state is SlotState.VOID
    (third,) = [f for f in readers if f.view().identity == (1, 1, 0)]
    assert third.lock(exclusive=False)
    step(module, opt)
    assert snapshots.stats.skipped == 1 and not snapshots.ready()
    third.unlock()
    assert snapshots.ready()
    step(module, opt)
    snapshots.wait()
    assert snapshots.last == (1, 1, 3)
    snapshots.close()


def test_rolling_back_voids_what_is_newer_before_the_first_step(folder):
    """Whatever names a snapshot that is not gone back to, of whatever term: nobody believes it any more when attach returns."""
    run_some(folder)
    (_, second), (_, newest) = slots_of(folder, "rank-00000")[-2:]
    newest.write_header(
        replace(newest.header(), identity=Identity(9, 9, 9))
    )  # of one shard only, so not one to go on from
    (writing,) = [f for f in arena.slots(folder) if f.shard == "replicated" and f.header().identity.step == 1]
    writing.write_header(replace(writing.header(), identity=Identity(8, 1, 1), state=SlotState.WRITING))
    assert attach_and_close(folder, 2) == second.header().identity == (1, 1, 2)
    believed = {f.view().identity for f in arena.slots(folder) if f.view().state is not SlotState.VOID}
    assert max(believed) == (1, 1, 2)
    run_some(folder, 1, generation=3)
    assert attach_and_close(folder, 4) == (1, 3, 3)


def test_sweep_spares_the_living(folder):
    run_some(folder, 1)
    lock = locks.take_agent_lock(folder)
    assert lock is not None and locks.agent_lives(folder) and not arena.sweep(folder)
    os.close(lock)
    assert not locks.agent_lives(folder) and arena.sweep(folder) and not folder.exists()


def test_room_knows_cgroups(tmp_path, monkeypatch):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    for path, limit, used in ((tmp_path / "a", "1000000", "400000"), (group, "max", "1")):
        (path / "memory.max").write_text(limit)
        (path / "memory.current").write_text(used)
        (path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    names = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(arena, "_cgroups", lambda: [(tmp_path / "a", names), (group, names)])
    found = arena.room("/dev/shm")
    assert found.available == 700000 and str(tmp_path / "a") in found.limit
    with pytest.raises(SnapshotError, match=r"700\.0 KB"):
        arena.check_room(700001, found)
    arena.check_room(700000, found)


def test_the_tail_may_grow(folder):
    class Growing:
        rows = np.zeros(0)

        def state_dict(self):
            return {"rows": self.rows}

        def load_state_dict(self, state):
            self.rows = state["rows"]

    extra = Growing()
    module, opt = parts()
    snapshots = attach((module, opt), extra, context=context_of(folder))
    for n in (10, 200_000, 400_000):
        extra.rows = np.arange(n) / 3
        step(module, opt)
        snapshots.wait()
    snapshots.close()
    again = Growing()
    attach(parts(), again, context=context_of(folder, 2)).close()
    assert np.array_equal(again.rows, extra.rows)


# Two ranks


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
            assert names == {f"{s}.{i}" for s in ("rank-00000", "rank-00001", "replicated") for i in range(3)}
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


def diverging_case(rank, world, root):
    """A rank whose weights differ from the others' is noticed, not averaged away or restored over."""
    replicated.VERIFY_EVERY = 1
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    snapshots = attach((module, optimizer), context=context_of(Path(root) / "job", rank=rank, world=world), hook=False)
    said = ""
    try:
        for s in range(1, 4):
            bit = torch.tensor([int(snapshots.ready())])
            torch.distributed.all_reduce(bit, op=torch.distributed.ReduceOp.MIN)
            snapshots.before_step()
            if rank == 1 and s == 2:
                with torch.no_grad():
                    module.weight[0, 0] += 1e-7
            snapshots.after_step(s, bool(bit))
            snapshots.wait()
            torch.distributed.barrier()
    except SnapshotError as error:
        said = str(error)
    with contextlib.suppress(SnapshotError, RuntimeError):
        if said:  # let the other rank out of its collective
            torch.distributed.all_reduce(torch.tensor([0]), op=torch.distributed.ReduceOp.MIN)
            torch.distributed.barrier()
        snapshots.close()
    return said


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
    assert not list((Path(root) / "job").glob("replicated.*"))


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
        assert "no committed snapshot in memory for ranks [0]; there is rank 1: " in str(error)
    else:
        raise AssertionError("resume=must went on from nothing")
    snapshots = begin(5)
    assert snapshots.restored is None
    snapshots.close()


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
    base = arena.folder_of(f"test-{os.getpid()}-{os.urandom(4).hex()}")
    arena.make_folder(base)
    yield str(base)
    arena.remove(base)


@pytest.mark.parametrize("case", [ddp_case, final_case, different_start_case, incomplete_case, error_on_one_rank_case])
def test_on_two_ranks(case, root):
    run_ranks(case, 2, root, timeout_s=60)


def test_ranks_that_drift_apart_are_noticed(root):
    said = run_ranks(diverging_case, 2, root, timeout_s=60)
    assert said[0] == "" and "they differ" in said[1] and "after step 2" in said[1]
