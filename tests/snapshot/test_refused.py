"""Damaged, foreign and later snapshots are not restored; errors come before anything is touched."""

import os
from dataclasses import replace

import pytest
import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import attach, context
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.state.collect import collect
from gemini_gnn.snapshot.store import arena
from gemini_gnn.snapshot.store.format import SlotState
from gemini_gnn.snapshot.store.identity import Identity
from tests.snapshot.plain_training import (
    Engine,
    arena_folder,
    attach_and_close,
    context_of,
    everything,
    parts,
    run_some,
    slots_of,
)


@pytest.fixture
def folder():
    with arena_folder() as path:
        yield path


@pytest.mark.parametrize("where", ["data", "tail", "header"])
@pytest.mark.parametrize("shard", ["rank-00000", "common"])
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
    _, file = slots_of(folder, "common")[-1]
    os.truncate(file.path, 5000)
    assert attach_and_close(folder, 2) == (1, 1, 2)


def test_steps_that_are_all_damaged_are_not_begun_again_by_themselves(folder):
    run_some(folder)
    for _, file in slots_of(folder, "common"):
        with open(file.path, "r+b") as raw:
            raw.seek(4096)
            raw.write(b"\1\2\3\4\5\6\7\1")
    with pytest.raises(SnapshotError, match=r"resume=must.*checksum"):
        attach_and_close(folder, 2, "must")
    with pytest.raises(
        SnapshotError, match=r"3 steps were done.*checksum.*Nothing was changed\. resume=never starts again"
    ):
        attach_and_close(folder, 2)
    assert len(slots_of(folder, "common")) == 3, "they may be of use to somebody"
    assert attach_and_close(folder, 2, "never") is None


def test_steps_that_memory_has_lost_are_not_begun_again_by_themselves(folder):
    with pytest.raises(SnapshotError, match=r"^7 steps were done.* memory of this job's machines holds no snapshot"):
        attach_and_close(folder, 1, steps_done=7)
    assert not any(folder.iterdir()), "no room was taken"
    assert attach_and_close(folder, 1, "never", steps_done=7) is None
    assert attach_and_close(folder, 2, steps_done=7) == (1, 1, 0)


def test_a_start_that_died_before_it_had_done_a_step_begins_again(folder):
    run_some(folder, steps=0)
    for _, file in slots_of(folder, "common"):
        file.void()  # as if killed between the two shards of the first snapshot
    assert attach_and_close(folder, 2) is None
    assert attach_and_close(folder, 3) == (1, 2, 0)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: parts(width=6), r"tensor master\.0\.weight: the snapshot has \['float32', \[5, 3\]\], this run"),
        (lambda: parts(optimizer="sgd"), "optimizer: the snapshot has Adam, this run SGD"),
    ],
)
def test_another_structure_is_refused_with_the_difference(folder, other, words):
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
    with pytest.raises(SnapshotError, match="of job other; got shard common of job job"):
        attach(parts(), context=context_of(folder, 2, job="other"))
    with pytest.raises(SnapshotError, match="of a later one"):
        attach(parts(), context=Context("job", folder, 0, 1, 0, 1, term=0, generation=9))
    for _, file in slots_of(folder, "common"):
        with open(file.path, "r+b") as raw:
            raw.seek(8)
            raw.write(b"\7")
    with pytest.raises(SnapshotError, match="format version: expected 2, got 7"):
        attach_and_close(folder, 2)
    assert attach_and_close(folder, 2, "never") is None


def test_memory_of_another_release_is_refused_whatever_its_shards_are_called(folder):
    """Not taken for an empty memory: under an older name a shard shows nothing of this rank's."""
    run_some(folder)
    for _, file in slots_of(folder, "rank-00000"):
        file.void()
    for slot, (_, file) in enumerate(slots_of(folder, "common")):
        with open(file.path, "r+b") as raw:
            raw.seek(8)
            raw.write(b"\1")
        os.rename(file.path, folder / f"replicated.{slot}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SnapshotError, match="format version: expected 2, got 1: .*resume=never"):
        attach_and_close(folder, 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_engine_that_has_stepped_is_refused(folder):
    attach(Engine(), context=context_of(folder)).close()
    engine = Engine()
    engine.step()
    with pytest.raises(SnapshotError, match="fresh engine"):
        attach(engine, context=context_of(folder, 2))


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


def test_rolling_back_voids_what_is_newer_before_the_first_step(folder):
    """Whatever names a snapshot that is not gone back to, of whatever term: nobody believes it any more when attach returns."""
    run_some(folder)
    (_, second), (_, newest) = slots_of(folder, "rank-00000")[-2:]
    newest.write_header(
        replace(newest.header(), identity=Identity(9, 9, 9))
    )  # of one shard only, so not one to go on from
    (writing,) = [f for f in arena.slots(folder) if f.shard == "common" and f.header().identity.step == 1]
    writing.write_header(replace(writing.header(), identity=Identity(8, 1, 1), state=SlotState.WRITING))
    assert attach_and_close(folder, 2) == second.header().identity == (1, 1, 2)
    believed = {f.view().identity for f in arena.slots(folder) if f.view().state is not SlotState.VOID}
    assert max(believed) == (1, 1, 2)
    run_some(folder, 1, generation=3)
    assert attach_and_close(folder, 4) == (1, 3, 3)


def test_an_optimizer_of_no_fixed_state_is_refused_in_words():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(SnapshotError, match="cannot foretell what LBFGS will keep"):
        collect((module, torch.optim.LBFGS(module.parameters())))
