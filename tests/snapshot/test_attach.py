"""attach() around plain PyTorch on one rank: what is captured when, and that training goes on from it bit for bit."""

import functools
import os
import threading
import weakref
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.capture import copier
from gemini_gnn.snapshot.store import arena
from gemini_gnn.snapshot.store.format import SlotState
from tests.snapshot.plain_training import (
    Engine,
    arena_folder,
    attach_and_close,
    context_of,
    everything,
    parts,
    step,
)


@pytest.fixture
def folder():
    with arena_folder() as path:
        yield path


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


def test_who_started_the_trainer_is_told_how_far_it_is(folder):
    """Every step, also one of which no snapshot is taken."""

    def told(generation, steps):
        said = []
        calls = {
            name: functools.partial(lambda name, *values: said.append((name, *values)), name)
            for name in ("attaching", "restored", "stepped", "committed")
        }
        module, opt = parts()
        here = replace(context_of(folder, generation), **calls)
        with closing(attach((module, opt), context=here, every=2)) as snapshots:
            for _ in range(steps):
                step(module, opt)
                snapshots.wait()
        return said

    first = [("attaching",), ("stepped", 0), ("committed", 1, 1, 0), ("restored", 0)]
    steps = [("stepped", 1), ("stepped", 2), ("committed", 1, 1, 2), ("stepped", 3)]
    assert told(1, 3) == first + steps
    assert told(2, 1) == [("attaching",), ("committed", 1, 1, 2), ("restored", 2), ("stepped", 3)]


def test_closing_leaves_the_optimizer_as_it_was(folder):
    module, opt = parts()
    before = opt.step
    attach((module, opt), context=context_of(folder)).close()
    assert opt.step == before and not opt._optimizer_step_pre_hooks


def test_deepspeeds_shared_buffer_outlives_no_kill(folder, monkeypatch):
    """It is named after the meeting point and the rank; those of other jobs and ranks are let alone."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", folder.name)  # no other test's
    files = [
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{of}") for of in (f"{folder.name}_0", "1_0")
    ]
    files.append(Path(f"{files[0]}1"))
    try:
        for file in files:
            file.touch()
        attach(parts(), context=context_of(folder)).close()
        assert [file.exists() for file in files] == [False, True, True]
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def test_nothing_of_the_tiny_twin_stays_in_the_optimizer(folder):
    module, opt = parts()
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    attach((module, opt), context=context_of(folder)).close()
    assert not opt.state and not calls


def test_every_third_step(folder):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder), every=3)
    for _ in range(7):
        step(module, opt)
        snapshots.wait()
    assert snapshots.stats.captures == 3 and snapshots.last == (1, 1, 6)
    assert snapshots.recoverable == (1, 1, 3)
    snapshots.close()


def test_steps_of_an_engine_are_counted_across_restarts(folder):
    engine = Engine()
    snapshots = attach(engine, context=context_of(folder), every=2)
    for done in (1, 2, 3):
        engine.step()
        assert snapshots.steps == done
    snapshots.close()
    engine = Engine()
    snapshots = attach(engine, context=context_of(folder, 2))
    assert snapshots.steps == engine.global_steps == 2
    engine.step()
    assert snapshots.steps == engine.global_steps == 3
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
    readers = [f for f in arena.slots(folder) if f.shard == "common"]
    assert all(f.lock(exclusive=False) for f in readers)
    step(module, opt)
    with pytest.raises(SnapshotError, match=r"free slot for the last snapshot \(step 1\).*resumes from 1-1-0"):
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


def held_up(monkeypatch):
    """From now on copies wait: an event that tells that one does, and one that lets them go on."""
    begun, go_on, copy = threading.Event(), threading.Event(), copier.Copier._copy_all

    def late(self, shard, slot):
        begun.set()
        assert go_on.wait(30)
        return copy(self, shard, slot)

    monkeypatch.setattr(copier.Copier, "_copy_all", late)
    return begun, go_on


@pytest.mark.parametrize("name", ["in place", "replaced"])
def test_what_changes_while_it_is_copied_is_not_committed(folder, monkeypatch, name):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    begun, go_on = held_up(monkeypatch)
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


def test_nothing_is_unmapped_under_a_copy_that_is_under_way(folder, monkeypatch):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    begun, go_on = held_up(monkeypatch)
    step(module, opt)
    assert begun.wait(30)
    snapshots._timeout_s = 0.05
    with pytest.raises(SnapshotError, match="still copying. Nothing was closed"):
        snapshots.close()
    assert all(shard.addresses and shard.files for shard in snapshots._shards)
    assert opt._optimizer_step_pre_hooks
    go_on.set()
    snapshots._timeout_s = 30
    snapshots.close()
    assert not any(shard.addresses or shard.files for shard in snapshots._shards)
    assert attach_and_close(folder, 2) == (1, 1, 1)


def test_closing_goes_on_after_an_error_and_says_what_the_background_met(folder, monkeypatch):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))

    def broken(*_):
        raise RuntimeError("the GPU is lost")

    monkeypatch.setattr(copier.Copier, "_copy_all", broken)
    step(module, opt)
    with pytest.raises(SnapshotError, match="the GPU is lost"):
        snapshots.wait()
    assert snapshots.last is None, "not what has failed"
    monkeypatch.setattr(snapshots._copier, "cuda", SimpleNamespace(close=broken))
    snapshots.on_close(broken)
    with pytest.raises(SnapshotError, match="background copy of a snapshot failed: the GPU is lost"):
        snapshots.close()
    assert not opt._optimizer_step_pre_hooks and not any(shard.files for shard in snapshots._shards)


def test_nothing_of_a_committed_capture_is_kept_in_this_process(folder, monkeypatch):
    module, opt = parts()
    snapshots = attach((module, opt), context=context_of(folder))
    captures, begin = [], copier.Copier.begin

    def noted(self, capture):
        captures.append(weakref.ref(capture))
        begin(self, capture)

    monkeypatch.setattr(copier.Copier, "begin", noted)
    step(module, opt)
    snapshots.wait()
    assert [capture() for capture in captures] == [None]
    snapshots.close()


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
    readers = [f for f in arena.slots(folder) if f.shard == "common"]
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
