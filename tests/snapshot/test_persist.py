"""Checkpoints of snapshots: written, completed, read back; bit for bit, after a kill at any instant, and under bad input."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot import attach, deepspeed_checkpoints, persist
from gemini_gnn.snapshot.store import arena, format
from gemini_gnn.snapshot.store.format import Header, SlotState, TensorSpec
from gemini_gnn.snapshot.store.identity import Identity
from tests.snapshot.plain_training import (
    arena_folder,
    attach_and_close,
    context_of,
    everything,
    parts,
    run_some,
    slots_of,
)

SHARDS = ["common", "rank-00000"]


@pytest.fixture
def memory():
    with arena_folder() as path:
        yield path


@pytest.fixture
def other_memory():
    with arena_folder() as path:
        yield arena.make_folder(path)


def persisted(memory, folder, identity, keep=2):
    persist.write(memory, folder, identity, SHARDS)
    persist.complete(folder, identity, SHARDS, keep)


def identities(folder):
    return [mark.identity for mark, _ in persist.complete_checkpoints(folder)]


def newest_slot(memory, shard="common"):
    return slots_of(memory, shard)[-1][1]


def test_a_checkpoint_restores_bit_for_bit_on_another_machine(memory, other_memory, tmp_path):
    run_some(memory, 3)
    folder, identity = tmp_path / "checkpoints", Identity(1, 1, 3)
    persisted(memory, folder, identity)
    ((mark, path),) = persist.complete_checkpoints(folder)
    assert (mark.identity, mark.job, mark.world_size, list(mark.shards)) == (identity, "job", 1, SHARDS)
    assert mark.shards["common"] == sum(p.stat().st_size for p in path.glob("common.*"))
    for shard in SHARDS:
        persist.load(path, other_memory, identity, shard, "job")
        ours, theirs = newest_slot(memory, shard), newest_slot(other_memory, shard)
        assert ours.tail(ours.header()) == theirs.tail(theirs.header())
        assert ours.header().data_checksum == theirs.header().data_checksum
    states = []
    for one in (memory, other_memory):
        engine = parts(seed=9)
        snapshots = attach(engine, context=context_of(one, 2))
        assert snapshots.restored == identity
        states.append([*everything(*engine), torch.get_rng_state()])
        snapshots.close()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_files_are_private_and_any_reader_opens_them(memory, tmp_path):
    run_some(memory, 1)
    persisted(memory, tmp_path / "checkpoints", Identity(1, 1, 1))
    ((_, path),) = persist.complete_checkpoints(tmp_path / "checkpoints")
    assert {p.name for p in path.iterdir()} == {
        *("common.safetensors", "common.tail", "rank-00000.safetensors", "rank-00000.tail", "COMPLETE"),
    }
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    found = load_file(path / "common.safetensors")
    assert {"master.0.weight", "exp_avg.master.0.weight", "step.master.2.bias"} <= found.keys()
    with safe_open(path / "common.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["identity"], said["job"], said["shard"]) == ("1-1-1", "job", "common")


FIRST = Identity(1, 1, 1)


def synthetic(memory, specs, identity=FIRST, shard="rank-00000", seed=0):
    """A committed slot of such tensors, with random bytes."""
    plan = format.plan(specs)
    file = arena.SlotFile(arena.make_folder(memory), shard, 0, create=True)
    file.reserve(plan.file_bytes)
    raw = memoryview(file.map(plan.tail_offset))
    noise = torch.Generator().manual_seed(seed)
    for spec, offset in zip(plan.specs, plan.offsets, strict=True):
        bytes_ = torch.randint(0, 2, (spec.nbytes,), dtype=torch.uint8, generator=noise)
        raw[offset : offset + spec.nbytes] = bytes_.numpy().tobytes()
    structure = format.describe("kind", 1, "Adam", plan)
    tail = format.encode_tail(format.layout_json(plan, range(len(specs)), structure), {"x": 1}, [b"abc"])
    file.write_tail(tail, plan.tail_offset)
    pieces = [raw[o : o + s.nbytes] for s, o in zip(plan.specs, plan.offsets, strict=True)]
    header = Header(
        *(SlotState.COMMITTED, identity, 0, shard, 0, "job", format.fingerprint(structure)),
        data_bytes=sum(s.nbytes for s in specs),
        data_checksum=arena.checksum(pieces),
        tail_offset=plan.tail_offset,
        tail_bytes=len(tail),
        tail_checksum=arena.checksum([memoryview(tail)]),
    )
    file.write_header(header)
    file.close()


def test_every_type_is_aligned_and_comes_back(memory, other_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(persist, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(persist, "SYNC_BYTES", 3000)
    types = sorted(format._ITEMSIZE)
    specs = [TensorSpec(f"{n}.{t}", t, s) for t in types for n, s in enumerate([(3,), (), (0, 2), (7, 41)])]
    synthetic(memory, specs)
    identity, shards = Identity(1, 1, 1), ["rank-00000"]
    persist.write(memory, tmp_path, identity, shards)
    persist.complete(tmp_path, identity, shards, 1)
    ((_, path),) = persist.complete_checkpoints(tmp_path)
    found = load_file(path / "rank-00000.safetensors")
    begins = persist.read_shard(path, "rank-00000").offsets
    assert all(at % min(format.itemsize(spec.dtype), 8) == 0 for spec, at in zip(specs, begins, strict=True))
    for spec in specs:
        tensor = torch.view_as_complex(found[spec.name]) if spec.dtype == "complex128" else found[spec.name]
        assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, spec.dtype), spec.shape)
    persist.load(path, other_memory, identity, "rank-00000", "job")
    ours, theirs = newest_slot(memory, "rank-00000"), newest_slot(other_memory, "rank-00000")
    (manifest, raw), (other, other_raw) = ours.manifest(ours.header()), theirs.manifest(theirs.header())
    assert manifest.layout == other.layout
    assert arena.tensor_pieces(manifest, raw) == arena.tensor_pieces(other, other_raw)
    name = "3.float32"
    (offset,) = (o for s, o in zip(manifest.layout.specs, manifest.layout.offsets, strict=True) if s.name == name)
    assert found[name].numpy().tobytes() == raw[offset : offset + found[name].nbytes]


# Kills


class Killed(BaseException):
    """What no handler of the package catches: nothing but closing of files happens after it, as after SIGKILL."""


_fuse: list[int] = []  # system calls that are left


def _hook(event, _):
    if _fuse and event.split(".")[0] in ("open", "os", "shutil"):
        _fuse[0] -= 1
        if _fuse[0] < 0:
            _fuse.clear()
            raise Killed


@pytest.fixture(scope="module")
def kill_after():
    sys.addaudithook(_hook)  # there is no way to take it out again; without a fuse it does nothing

    def run(calls, call):
        """Whether ``call`` was killed when it was about to make system call number ``calls``."""
        _fuse[:] = [calls]
        try:
            call()
        except Killed:
            return True
        finally:
            _fuse.clear()
        return False

    return run


def verified(folder):
    """Identities of the complete checkpoints; every byte of them is good."""
    for mark, path in persist.complete_checkpoints(folder):
        assert set(mark.shards) == set(SHARDS)
        for shard in SHARDS:
            stored = persist.read_shard(path, shard)
            assert stored.header.identity == mark.identity
            persist.verify(stored)
    return identities(folder)


@pytest.mark.parametrize("before", ["another step", "the same step, rolled back"])
def test_a_kill_at_any_instant_leaves_a_complete_checkpoint(memory, tmp_path, kill_after, before):
    run_some(memory, 1)
    old = Identity(1, 1, 1)
    new = Identity(1, 2, 2) if before == "another step" else Identity(1, 2, 1)
    rolled = memory.with_name(memory.name + "-rolled")
    try:
        for shard in SHARDS:
            synthetic(rolled, [TensorSpec("w", "float32", (5,))], new, shard)
        kills = 0
        while True:
            folder = tmp_path / str(kills)
            persisted(memory, folder, old)
            if not kill_after(kills, lambda: persisted(rolled, folder, new, keep=1)):  # noqa: B023
                break
            assert verified(folder) in ([old], [old, new], [new]), kills
            persisted(rolled, folder, new, keep=1)  # the next start
            assert verified(folder) == [new], kills
            persisted(rolled, folder, new, keep=1)  # the same order again
            assert verified(folder) == [new], kills
            last = Identity(1, 2, 3)
            for shard in SHARDS:
                synthetic(rolled, [TensorSpec("w", "float32", (5,))], last, shard)
            persisted(rolled, folder, last, keep=1)
            assert [p.name for p in folder.iterdir()] == ["step-000000003"], kills
            for shard in SHARDS:
                synthetic(rolled, [TensorSpec("w", "float32", (5,))], new, shard)
            kills += 1
        assert verified(folder) == [new] and kills > 25
    finally:
        arena.remove(rolled)


# Which count, which are removed


def captured(memory, identity):
    for shard in SHARDS:
        synthetic(memory, [TensorSpec("w", "float32", (5,))], identity, shard)


def test_the_newest_are_kept_and_leftovers_removed(memory, tmp_path):
    for number in (3, 5, 7, 9):
        captured(memory, Identity(1, 1, number))
        persist.write(memory, tmp_path, Identity(1, 1, number), SHARDS)
        if number != 5:
            persist.complete(tmp_path, Identity(1, 1, number), SHARDS, keep=2)
    assert [i.step for i in identities(tmp_path)] == [7, 9]
    assert {p.name for p in tmp_path.iterdir()} == {"step-000000007", "step-000000009"}
    # a job that goes on and ends without a step writes what is there already
    persisted(memory, tmp_path, Identity(1, 1, 9))
    assert {p.name for p in tmp_path.iterdir()} == {"step-000000007", "step-000000009"}
    # after a roll-back to step 7 the newest is not the one of the highest step
    captured(memory, Identity(1, 2, 8))
    persisted(memory, tmp_path, Identity(1, 2, 8))
    assert identities(tmp_path) == [(1, 1, 9), (1, 2, 8)]
    persist.forget(tmp_path)
    assert identities(tmp_path) == [] and len(list(tmp_path.iterdir())) == 2
    captured(memory, Identity(2, 1, 1))
    persisted(memory, tmp_path, Identity(2, 1, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_another_jobs_folder_is_refused(memory, tmp_path):
    persist.check_ours(tmp_path, "another")
    captured(memory, Identity(1, 1, 4))
    persisted(memory, tmp_path, Identity(1, 1, 4))
    persist.check_ours(tmp_path, "job")
    with pytest.raises(SnapshotError, match="step-000000004 is of job job, .* a folder of its own"):
        persist.check_ours(tmp_path, "another")


def test_deepspeeds_checkpoints_and_these_are_never_taken_for_each_other(memory, tmp_path):
    theirs = tmp_path / persist.tag_of(4)
    theirs.mkdir()
    (theirs / persist.COMPLETE).touch()
    (theirs / "weights.pt").touch()
    assert identities(tmp_path) == [] and deepspeed_checkpoints.complete_steps(tmp_path) == [4]
    captured(memory, Identity(1, 1, 4))
    with pytest.raises(SnapshotError, match=r"step-000000004: expected .* it is DeepSpeed's, of snapshot=nfs. Give"):
        persisted(memory, tmp_path, Identity(1, 1, 4))
    captured(memory, Identity(1, 1, 6))
    unfinished = tmp_path / persist.tag_of(5)
    unfinished.mkdir()
    (unfinished / "weights.pt").touch()
    persisted(memory, tmp_path, Identity(1, 1, 6), keep=1)
    assert unfinished.exists()
    persist.forget(tmp_path)
    persisted(memory, tmp_path, Identity(1, 1, 6), keep=1)
    assert sorted(p.name for p in theirs.iterdir()) == ["COMPLETE", "weights.pt"]
    assert deepspeed_checkpoints.complete_steps(tmp_path) == [4]
    with pytest.raises(SnapshotError, match="it is one of snapshot=memory. Give another folder"):
        deepspeed_checkpoints._begin(tmp_path / persist.tag_of(6))
    assert identities(tmp_path) == [(1, 1, 6)]


def test_a_mark_that_cannot_be_read_is_named(memory, tmp_path):
    captured(memory, Identity(1, 1, 4))
    persisted(memory, tmp_path, Identity(1, 1, 4))
    mark = tmp_path / persist.tag_of(4) / persist.COMPLETE
    good = mark.read_text()
    for bad, words in (
        ("{", "does not hold together"),
        (good.replace('"format": 1', '"format": 2'), "another release"),
    ):
        mark.write_text(bad)
        seen = persist.survey(tmp_path)[0]
        assert seen.mark is None and words in seen.problem and identities(tmp_path) == []
        captured(memory, Identity(1, 2, 4))
        with pytest.raises(SnapshotError, match=words):
            persisted(memory, tmp_path, Identity(1, 2, 4))
        assert mark.read_text() == bad


# What goes wrong


def files_below(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_failure_leaves_nothing_of_it_and_the_old_ones(memory, tmp_path, monkeypatch):
    run_some(memory, 2)
    folder = tmp_path / "checkpoints"
    persisted(memory, folder, Identity(1, 1, 1))
    before = files_below(folder)

    def fails(words, step=2, into=folder):
        with pytest.raises(SnapshotError, match=words):
            persist.write(memory, into, Identity(1, 1, step), SHARDS)
        assert files_below(folder) == before and len(list(folder.iterdir())) == 1

    fails("expected shard common of snapshot 1-1-7 .* it is no longer there", step=7)
    write = os.pwrite
    with monkeypatch.context() as full:

        def pwrite(descriptor, data, offset):
            if offset > 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data, offset)

        full.setattr(os, "pwrite", pwrite)
        fails("cannot write the checkpoint .*: No space left on device; make room there, or give another folder")
    (tmp_path / "file").touch()
    fails("cannot write the checkpoint .*: Not a directory; check", into=tmp_path / "file" / "checkpoints")
    slot = newest_slot(memory)
    header = slot.header()
    raw = memoryview(slot.map(header.tail_offset))
    raw[format.PAGE] ^= 1
    fails("the tensors of 1-1-2 do not fit their checksum")
    raw[format.PAGE] ^= 1
    assert slot.lock(exclusive=True)  # as a trainer that overwrites it
    fails("it is no longer there")
    slot.unlock()
    persisted(memory, folder, Identity(1, 1, 2))
    assert len(verified(folder)) == 2


def test_a_slot_is_pinned_only_while_it_is_copied(memory, tmp_path, monkeypatch):
    run_some(memory, 1)
    slot, seen = newest_slot(memory), []
    fsync = os.fsync

    def watched(descriptor):
        other = arena.SlotFile(memory, "common", slot.slot)
        seen.append(other.lock(exclusive=True))
        other.close()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    persisted(memory, tmp_path, Identity(1, 1, 1))
    assert seen[0] is False and seen[-1] is True


def test_only_whole_checkpoints_are_completed(memory, tmp_path):
    captured(memory, Identity(1, 1, 4))
    with pytest.raises(SnapshotError, match="cannot read .*common.safetensors: No such file.*; do all machines see"):
        persist.complete(tmp_path, Identity(1, 1, 4), SHARDS, keep=1)
    persist.write(memory, tmp_path, Identity(1, 1, 4), ["rank-00000"])
    with pytest.raises(SnapshotError, match=r"cannot read .*common\.safetensors"):
        persist.complete(tmp_path, Identity(1, 1, 4), SHARDS, keep=1)
    persist.write(memory, tmp_path, Identity(1, 1, 4), ["common"])
    here = persist.partial_of(tmp_path, Identity(1, 1, 4))
    captured(memory, Identity(1, 1, 5))
    persist.write(memory, tmp_path, Identity(1, 1, 5), ["common"])
    assert here.exists()  # only the machine of rank 0 removes what others may still write
    os.replace(
        persist.partial_of(tmp_path, Identity(1, 1, 5)) / "common.safetensors", here / "common.safetensors"
    )  # fmt: skip
    with pytest.raises(SnapshotError, match="expected snapshot 1-1-4; got 1-1-5"):
        persist.complete(tmp_path, Identity(1, 1, 4), SHARDS, keep=1)
    assert identities(tmp_path) == []
    persisted(memory, tmp_path, Identity(1, 1, 5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]


# Into memory


@pytest.fixture
def checkpoint(memory, tmp_path) -> Path:
    run_some(memory, 2)
    persisted(memory, tmp_path, Identity(1, 1, 2))
    return tmp_path / persist.tag_of(2)


def held(memory, shard="common"):
    return {f.slot: h.identity.step for _, f in slots_of(memory, shard) if (h := f.header())}


def test_a_good_copy_stays_and_a_damaged_one_is_replaced(checkpoint, memory):
    slot = newest_slot(memory)
    written_at = slot.header().committed_ns
    persist.load(checkpoint, memory, Identity(1, 1, 2), "common", "job")
    assert newest_slot(memory).header().committed_ns == written_at
    raw = memoryview(slot.map(slot.header().tail_offset))
    raw[format.PAGE] ^= 1
    before = held(memory)
    persist.load(checkpoint, memory, Identity(1, 1, 2), "common", "job")
    assert held(memory) == before and newest_slot(memory).slot == slot.slot
    slot.manifest(slot.header())


def test_older_slots_are_overwritten_first_then_the_oldest_of_the_newer(checkpoint, other_memory):
    run_some(other_memory, 9)
    assert sorted(held(other_memory).values()) == [7, 8, 9]
    persist.load(checkpoint, other_memory, Identity(1, 1, 2), "common", "moved")
    assert sorted(held(other_memory).values()) == [2, 8, 9]
    assert slots_of(other_memory, "common")[0][1].header().job == "moved"
    pins = [file for _, file in slots_of(other_memory, "rank-00000")]
    assert all(pin.lock(exclusive=False) for pin in pins)
    with pytest.raises(SnapshotError, match="other processes read all of them"):
        persist.load(checkpoint, other_memory, Identity(1, 1, 2), "rank-00000", "job")
    assert sorted(held(other_memory, "rank-00000").values()) == [7, 8, 9]


def test_damaged_bytes_never_become_a_snapshot(checkpoint, other_memory):
    file = checkpoint / "common.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(persist.DamagedError, match="common.safetensors: the tensors do not fit"):
        persist.load(checkpoint, other_memory, Identity(1, 1, 2), "common", "job")
    assert held(other_memory) == {}
    file.write_bytes(good)
    with pytest.raises(SnapshotError, match="expected snapshot 1-1-3; got 1-1-2"):
        persist.load(checkpoint, other_memory, Identity(1, 1, 3), "common", "job")
    persist.load(checkpoint, other_memory, Identity(1, 1, 2), "common", "job")
    persist.load(checkpoint, other_memory, Identity(1, 1, 2), "rank-00000", "job")
    assert attach_and_close(other_memory, 2) == (1, 1, 2)


def test_no_room_is_said(checkpoint, other_memory, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(arena, "room", lambda root: arena.Room(1000, "the size of /dev/shm", "make it larger"))
    with pytest.raises(SnapshotError, match="snapshots need .* available are 1.0 KB"):
        persist.load(checkpoint, other_memory, Identity(1, 1, 2), "common", "job")
    assert held(other_memory) == {}
