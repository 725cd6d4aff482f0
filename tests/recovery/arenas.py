"""Arenas in host memory and slots in them, written as trainers write them, without torch."""

import os
from contextlib import contextmanager

from gemini_gnn.snapshot.store import arena, format
from gemini_gnn.snapshot.store.format import Header, SlotState, TensorSpec
from gemini_gnn.snapshot.store.identity import Identity

JOB = "job"
SMALL = 20_000  # bytes


@contextmanager
def arena_folder():
    path = arena.make_folder(arena.folder_of(f"test-{os.getpid()}-{os.urandom(4).hex()}"))
    try:
        yield path
    finally:
        arena.remove(path)


def step(number, generation=1):
    return Identity(1, generation, number)


def capture(folder, shard, slot, identity, nbytes=SMALL, job=JOB, tail=b"positions"):
    """A committed slot; its bytes follow from shard and step. Two tensors, with a gap between them."""
    half = nbytes // 2 + 1
    specs = [TensorSpec("a", "uint8", (half,)), TensorSpec("b", "uint8", (nbytes - half,))]
    plan = format.plan(specs)
    structure = format.describe("test", 1, "none", plan)
    with slot_file(folder, shard, slot, create=True) as file:
        assert file.lock(exclusive=True)
        file.reserve(plan.file_bytes)
        header = Header(SlotState.WRITING, identity, 0, shard, slot, job, format.fingerprint(structure))
        file.write_header(header)
        raw = memoryview(file.map(plan.tail_offset))
        pattern = f"{shard} {identity} ".encode()
        pieces = []
        for spec, offset in zip(plan.specs, plan.offsets, strict=True):
            piece = raw[offset : offset + spec.nbytes]
            piece[:] = (pattern * (spec.nbytes // len(pattern) + 1))[: spec.nbytes]
            pieces.append(piece)
        end = format.encode_tail(format.layout_json(plan, [0, 1], structure), {"of": list(identity)}, [tail])
        file.write_tail(end, plan.tail_offset)
        header = Header(
            SlotState.COMMITTED,
            identity,
            0,
            shard,
            slot,
            job,
            header.structure,
            nbytes,
            arena.checksum(pieces),
            plan.tail_offset,
            len(end),
            arena.checksum([memoryview(end)]),
            arena.now_ns(),
        )
        file.write_header(header)
        file.unlock()
    return header


@contextmanager
def slot_file(folder, shard, slot, create=False):
    file = arena.SlotFile(folder, shard, slot, create)
    try:
        yield file
    finally:
        file.close()


def held(folder, shard):
    """Identities of the committed slots of a shard, each verified, by slot."""
    found = {}
    for file in arena.slots(folder):
        try:
            header = file.header()
            if file.shard == shard and header is not None and header.state is SlotState.COMMITTED:
                manifest, raw = file.manifest(header)
                assert manifest.tree == {"of": list(header.identity)} and header.slot == file.slot
                pattern = f"{shard} {header.identity} ".encode()
                first = arena.tensor_pieces(manifest, raw)[0]
                assert bytes(first[: len(pattern)]) == pattern[: len(first)]
                found[file.slot] = header.identity
                del manifest, raw, first
        finally:
            file.close()
    return found


def flip(folder, shard, slot, at=format.PAGE + 100):
    """One bit of a slot's file."""
    with open(folder / f"{shard}.{slot}", "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def ring(folder):
    """What a trainer does after a commit."""
    bell = os.open(folder / "bell", os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(bell, b"\0")
    finally:
        os.close(bell)
