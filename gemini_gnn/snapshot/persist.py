"""Checkpoints: snapshots that are written from memory to storage, and read back. Files only, no torch.

    <folder>/step-000000300.partial-1-2-300/    of identity 1-2-300; every machine writes its shards into it
    <folder>/step-000000300/
        rank-00003.safetensors     tensors of a shard, named as in its slot; every reader of that format opens it
        rank-00003.tail            tail of the slot: structure, values, small arrays
        common.safetensors, common.tail
        COMPLETE                   JSON (:class:`Mark`), written last; a folder without it counts as nothing
    <folder>/step-000000300.replaced-1-1-300/    the same step before a roll-back, until the new one is COMPLETE

The header of the slot travels in the metadata of the safetensors file. It has a checksum of its own, and those of tensors
and tail from the moment of capture. So a checkpoint is verified from capture to restore: against them the bytes are
compared when they are written, when they are read back, and by ``launch/export.py --check``. All else in the head of that
file follows from header and tail, and is compared too.

Ownership. Each machine writes its own shards. The machine of rank 0 alone renames, marks and removes folders, one after
the other. A kill at any instant leaves the newest complete checkpoint: an old one loses its mark only after the new one
has it. A mark goes before its files go.

``snapshot=nfs`` writes folders of the same names with DeepSpeed's files and an empty COMPLETE. They are never taken for
checkpoints of this kind, nor removed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import xxhash

from gemini_gnn.errors import SnapshotError
from gemini_gnn.files import sync, write_atomically
from gemini_gnn.snapshot.store import arena, catalog, format
from gemini_gnn.snapshot.store.format import Header, Manifest, SlotState
from gemini_gnn.snapshot.store.identity import Identity

COMPLETE = "COMPLETE"
FORMAT = 1
FIRST_SHARD = "rank-00000"  # of the machine that completes checkpoints
CHUNK_BYTES = 8 << 20
SYNC_BYTES = 128 << 20  # at most so much waits in the page cache, which others need more
MOST_HEAD_BYTES = 100 << 20  # what the safetensors library reads

_NAME = re.compile(r"step-(\d{9,})(?:\.(partial|replaced)-(\d+)-(\d+)-(\d+))?")
_OURS = re.compile(r"(rank-\d+|common)\.(safetensors|tail)|\.COMPLETE\.\d+")
_DTYPES = {
    "float64": "F64", "int64": "I64", "uint64": "U64", "float32": "F32", "int32": "I32", "uint32": "U32",
    "float16": "F16", "bfloat16": "BF16", "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "complex64": "C64", "complex128": "F64",  # the latter with a last dimension of 2: safetensors has no type for it
}  # fmt: skip


class DamagedError(SnapshotError):
    """The bytes are not those that were captured."""


# Which checkpoints there are


@dataclass(frozen=True)
class Mark:
    """What COMPLETE says. ``shards``: bytes of each. ``time_s``: of the clock on the wall."""

    format: int
    identity: Identity
    job: str
    time_s: float
    world_size: int
    shards: dict[str, int]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of a checkpoint. ``mark``: None unless it is complete; ``problem`` then says why it does not count."""

    path: Path
    step: int
    mark: Mark | None
    problem: str = ""


def tag_of(step: int) -> str:
    return f"step-{step:09d}"


def partial_of(folder: Path, identity: Identity) -> Path:
    return folder / f"{tag_of(identity.step)}.partial-{identity}"


def survey(folder: Path) -> list[Checkpoint]:
    """All that looks like a checkpoint, by name. None if there is no folder."""
    return [
        _look(path, int(found[1]), found[2] == "partial")
        for path in arena.list_folder(folder)
        if (found := _NAME.fullmatch(path.name)) and path.is_dir()
    ]


def _look(path: Path, step: int, partial: bool) -> Checkpoint:
    if partial:
        return Checkpoint(path, step, None, "incomplete")
    try:
        raw = (path / COMPLETE).read_bytes()
    except FileNotFoundError:
        ours = all(_OURS.fullmatch(p.name) for p in arena.list_folder(path))
        return Checkpoint(path, step, None, "incomplete" if ours else "incomplete, and not of snapshot=memory")
    if not raw:
        return Checkpoint(path, step, None, "DeepSpeed's, of snapshot=nfs")
    try:
        mark = msgspec.json.decode(raw, type=Mark)
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: no text
        return Checkpoint(path, step, None, f"damaged: {COMPLETE} does not hold together: {error}")
    if mark.format != FORMAT:
        return Checkpoint(path, step, None, f"format {mark.format}, written by another release of gemini_gnn")
    return Checkpoint(path, step, mark)


def complete_checkpoints(folder: Path) -> list[tuple[Mark, Path]]:
    """The complete checkpoints, by identity."""
    found = [(c.mark, c.path) for c in survey(folder) if c.mark is not None]
    return sorted(found, key=lambda one: one[0].identity)


def check_ours(folder: Path, job: str) -> None:
    """
    Raises:
        SnapshotError: another job has its checkpoints in ``folder``.
    """
    for mark, path in complete_checkpoints(folder):
        if mark.job != job:
            raise SnapshotError(
                f"expected checkpoints of job {job} in {folder}; {path.name} is of job {mark.job}, which has another run "
                "directory. Give each job a folder of its own (snapshot.folder)"
            )


# The head of a safetensors file


def head_of(
    rows: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]
) -> tuple[bytes, list[int], int]:
    """The head for tensors (name, dtype, shape, bytes), where each begins in the file, and the bytes of the file.

    Elements of many bytes come first, so that each tensor is aligned.
    """
    table: dict[str, object] = {"__metadata__": metadata}
    offsets, end = [0] * len(rows), 0
    for i in sorted(range(len(rows)), key=lambda i: -format.itemsize(rows[i][1])):
        name, dtype, shape, nbytes = rows[i]
        pair = [2] if dtype == "complex128" else []
        table[name] = {"dtype": _DTYPES[dtype], "shape": [*shape, *pair], "data_offsets": [end, end + nbytes]}
        offsets[i], end = end, end + nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, [len(head) + offset for offset in offsets], len(head) + end


def _head(header: Header, manifest: Manifest) -> tuple[bytes, list[int], int]:
    rows = [(s.name, s.dtype, s.shape, s.nbytes) for s in manifest.layout.specs]
    said = {
        "identity": str(header.identity),
        "job": header.job,
        "shard": header.shard,
        "checksum": f"xxh3_128 of the tensors in the slot's order: {header.data_checksum.hex()}",
        "slot_header": format.encode_header(header).hex(),
    }
    return head_of(rows, said)


# From memory to storage


def write(arena_folder: Path, folder: Path, identity: Identity, shards: Sequence[str]) -> None:
    """Write these shards of a snapshot; on return they are on storage, and their bytes are those that were captured.

    Raises:
        SnapshotError: a shard is no longer in memory, or damaged there; or the folder cannot be written. Nothing of it is
            left then, and older checkpoints are as they were.
    """
    here = partial_of(folder, identity)
    try:
        if FIRST_SHARD in shards:
            for old in _older_partials(folder, identity):
                shutil.rmtree(old, ignore_errors=True)  # what is in use goes with the next one
        new = not folder.exists()
        for parent in (folder, here):
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for shard in shards:
            _write_shard(arena_folder, here, identity, shard)
        for parent in (here, folder, *([folder.parent] if new else [])):
            sync(parent)
    except (OSError, SnapshotError) as error:
        with suppress(OSError):  # the first error is the one to tell
            for shard in shards:
                for path in _files(here, shard):
                    path.unlink(missing_ok=True)
            here.rmdir()  # other machines' shards may be in it
        if isinstance(error, SnapshotError):
            raise
        raise _cannot(f"write the checkpoint {here}", error) from error


def _older_partials(folder: Path, identity: Identity) -> list[Path]:
    found = ((path, _NAME.fullmatch(path.name)) for path in arena.list_folder(folder))
    return [p for p, m in found if m and m[2] == "partial" and Identity(int(m[3]), int(m[4]), int(m[5])) < identity]


def _files(folder: Path, shard: str) -> tuple[Path, Path]:
    return folder / f"{shard}.safetensors", folder / f"{shard}.tail"


def _write_shard(arena_folder: Path, here: Path, identity: Identity, shard: str) -> None:
    with _pinned(arena_folder, shard, identity) as (file, header):
        tail = file.tail(header)
        manifest = format.decode_tail(tail, header.tail_offset)
        head, offsets, _ = _head(header, manifest)
        raw = memoryview(file.map(header.tail_offset))
        tensors_path, tail_path = _files(here, shard)
        with written(tensors_path) as put:
            put(head, 0)
            digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
            for in_slot, in_file, nbytes in _runs(manifest, offsets):
                chunk = buffer[:nbytes]
                chunk[:] = raw[in_slot : in_slot + nbytes]  # what is hashed is what is written
                digest.update(chunk)
                put(chunk, in_file)
            if digest.digest() != header.data_checksum:
                raise DamagedError(f"{file.path}: the tensors of {identity} do not fit their checksum")
        with written(tail_path) as put:
            put(tail, 0)


@contextmanager
def _pinned(arena_folder: Path, shard: str, identity: Identity) -> Iterator[tuple[arena.SlotFile, Header]]:
    """The slot that holds the shard of this snapshot, and its header; nobody overwrites it meanwhile.

    Raises:
        SnapshotError: there is none.
    """
    for slot in range(catalog.OWN_SLOTS):
        if not (arena_folder / f"{shard}.{slot}").exists():
            continue
        file = arena.SlotFile(arena_folder, shard, slot)
        try:
            # The header is read under the lock: before it the slot may have been given to a newer snapshot.
            header = file.header() if file.lock(exclusive=False) else None
            if header is not None and header.state is SlotState.COMMITTED and header.identity == identity:
                yield file, header
                return
        finally:
            file.close()
    raise SnapshotError(f"expected shard {shard} of snapshot {identity} in {arena_folder}; it is no longer there")


@contextmanager
def written(path: Path, mode: int = 0o600) -> Iterator[Callable[[bytes | memoryview, int], None]]:
    """A new file, and the call that writes bytes at an offset. On leaving it is on storage, and out of the
    page cache.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    waiting = 0

    def drain() -> None:
        nonlocal waiting
        waiting = 0
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def put(data: bytes | memoryview, offset: int) -> None:
        nonlocal waiting
        view = memoryview(data)
        waiting += len(view)
        while view:
            done = os.pwrite(descriptor, view, offset)
            view, offset = view[done:], offset + done
        if waiting >= SYNC_BYTES:
            drain()

    try:
        yield put
        drain()
    finally:
        os.close(descriptor)


def _runs(manifest: Manifest, offsets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """All bytes of the tensors in the slot's order, in chunks: offset in the slot, offset in the file, length."""
    layout = manifest.layout
    for spec, in_slot, in_file in zip(layout.specs, layout.offsets, offsets, strict=True):
        for begin in range(0, spec.nbytes, CHUNK_BYTES):
            yield in_slot + begin, in_file + begin, min(CHUNK_BYTES, spec.nbytes - begin)


def _cannot(what: str, error: OSError) -> SnapshotError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SnapshotError(
        f"cannot {what}: {error.strerror}; "
        + ("make room there" if full else "check that this user may write there")
        + ", or give another folder (snapshot.folder)"
    )


def complete(folder: Path, identity: Identity, shards: Sequence[str], keep: int) -> None:
    """Mark a checkpoint that all machines have written, then remove all but the newest ``keep`` of them, and leftovers.

    Raises:
        SnapshotError: a shard is not there, or not of this snapshot; the folder cannot be written; or the name is taken by
            a checkpoint that is not this kind's. Older checkpoints are as they were.
    """
    assert keep >= 1
    try:
        found = {c.path: c for c in survey(folder)}
        if not any(c.mark is not None and c.mark.identity == identity for c in found.values()):
            mark = _inspected(partial_of(folder, identity), identity, shards)
            here = folder / tag_of(identity.step)
            if (before := found.get(here)) is not None:
                _make_way(before)
            os.rename(partial_of(folder, identity), here)
            sync(folder)
            write_atomically(here / COMPLETE, json.dumps(asdict(mark)), mode=0o600)
        _remove_old(folder, identity, keep)
    except OSError as error:
        raise _cannot(f"complete the checkpoint {identity} in {folder}", error) from error


def _inspected(here: Path, identity: Identity, shards: Sequence[str]) -> Mark:
    stored = [read_shard(here, shard) for shard in shards]
    for one in stored:
        if one.header.identity != identity:
            raise SnapshotError(f"{one.path}: expected snapshot {identity}; got {one.header.identity}")
    sizes = {one.header.shard: one.nbytes + len(one.tail) for one in stored}
    world_size = int(stored[0].manifest.structure["world_size"])
    return Mark(FORMAT, identity, stored[0].header.job, time.time(), world_size, sizes)


def _make_way(before: Checkpoint) -> None:
    """Free the name of a checkpoint of the same step. It counts under its other name until the new one does."""
    if before.mark is not None:
        os.rename(before.path, before.path.with_name(f"{before.path.name}.replaced-{before.mark.identity}"))
    elif before.problem == "incomplete":
        shutil.rmtree(before.path)
    else:
        raise SnapshotError(
            f"{before.path}: expected no checkpoint, or one of snapshot=memory; it is {before.problem}. "
            "Give another folder (snapshot.folder)"
        )


def _remove_old(folder: Path, identity: Identity, keep: int) -> None:
    """Remove all but the newest ``keep``, and what was never completed. What cannot be removed is tried again next time."""
    every = complete_checkpoints(folder)
    replaced = [path for _, path in every if path.name.startswith(f"{tag_of(identity.step)}.replaced-")]
    others = [path for mark, path in every if path not in replaced and mark.identity != identity]
    for path in replaced + others[: max(0, len(others) - keep + 1)]:
        (path / COMPLETE).unlink(missing_ok=True)
        sync(path)
        shutil.rmtree(path, ignore_errors=True)
    unmarked = [c.path for c in survey(folder) if c.problem == "incomplete" and ".partial-" not in c.path.name]
    # One of the same identity was written again, after it was complete.
    for path in [*_older_partials(folder, identity), partial_of(folder, identity), *unmarked]:
        shutil.rmtree(path, ignore_errors=True)


def forget(folder: Path) -> None:
    """No checkpoint counts any more. Their files stay until the next one is complete."""
    for _, path in complete_checkpoints(folder):
        (path / COMPLETE).unlink(missing_ok=True)
        sync(path)


# From storage to memory


@dataclass(frozen=True)
class Stored:
    """A shard in storage. Its head and its tail are verified, its tensors are not yet.

    Attributes:
        path: of the safetensors file, of ``nbytes``. offsets: of each tensor of the manifest in it.
    """

    path: Path
    nbytes: int
    header: Header
    manifest: Manifest
    tail: bytes
    offsets: list[int]


def read_shard(folder: Path, shard: str) -> Stored:
    """Read head and tail of a shard.

    Raises:
        DamagedError: they are not what was written, or the file was cut.
        SnapshotError: they cannot be read.
    """
    path, tail_path = _files(folder, shard)
    try:
        with open(path, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            raw = file.read(8)
            length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
            if not 2 <= length <= min(MOST_HEAD_BYTES, nbytes - 8):
                raise DamagedError(f"{path}: expected a head of at most {nbytes - 8} bytes; it says {length}")
            raw += file.read(length)
        tail = tail_path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"cannot read {error.filename}: {error.strerror}; do all machines see {folder}?") from error
    try:
        header = format.decode_header(bytes.fromhex(json.loads(raw[8:])["__metadata__"]["slot_header"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        header = None
    if header is None or header.shard != shard:
        raise DamagedError(f"{path}: expected the head of shard {shard}; got one that does not hold together")
    if len(tail) != header.tail_bytes or arena.checksum([memoryview(tail)]) != header.tail_checksum:
        raise DamagedError(f"{tail_path}: does not fit its checksum")
    manifest = format.decode_tail(memoryview(tail), header.tail_offset)
    head, offsets, expected = _head(header, manifest)
    if raw != head:
        raise DamagedError(f"{path}: the head does not fit the header of the slot and the tail")
    if nbytes != expected:
        raise DamagedError(f"{path}: expected {expected} bytes; got {nbytes}")
    return Stored(path, nbytes, header, manifest, tail, offsets)


def _nowhere(chunk: memoryview, in_slot: int) -> None:
    pass


def verify(stored: Stored, into: Callable[[memoryview, int], None] = _nowhere) -> None:
    """Compare all tensors with their checksum. ``into``: gets each chunk and its offset in the slot.

    Raises:
        DamagedError: they differ.
        SnapshotError: they cannot be read.
    """
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    try:
        with reading(stored.path) as get:
            for in_slot, in_file, nbytes in _runs(stored.manifest, stored.offsets):
                get(buffer[:nbytes], in_file)
                digest.update(buffer[:nbytes])
                into(buffer[:nbytes], in_slot)
    except OSError as error:
        raise SnapshotError(f"cannot read {stored.path}: {error.strerror}") from error
    if digest.digest() != stored.header.data_checksum:
        raise DamagedError(f"{stored.path}: the tensors do not fit their checksum")


@contextmanager
def reading(path: Path) -> Iterator[Callable[[memoryview, int], None]]:
    """The call that fills a buffer from an offset of a file. On leaving the file is out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def get(buffer: memoryview, offset: int) -> None:
        while buffer:
            done = os.preadv(descriptor, [buffer], offset)
            if not done:
                raise DamagedError(f"{path}: expected more bytes; the file was cut")
            buffer, offset = buffer[done:], offset + done

    try:
        yield get
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def load(
    checkpoint: Path,
    arena_folder: Path,
    identity: Identity,
    shard: str,
    job: str,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Put a shard of a checkpoint into a slot, verified, unless one holds it already. No trainer may run.

    Args:
        job: of the slot: a run directory that was moved is another job.
        moved: is called for each chunk.

    Raises:
        DamagedError: the bytes are not those that were captured; no slot holds them.
        SnapshotError: they cannot be read, or there is no room for them.
    """
    stored = read_shard(checkpoint, shard)
    header = replace(stored.header, job=job)
    if header.identity != identity:
        raise SnapshotError(f"{stored.path}: expected snapshot {identity}; got {header.identity}")
    with _slot_for(arena_folder, header) as file:
        if file is None:
            return
        file.reserve(header.tail_offset + header.tail_bytes)
        raw = memoryview(file.map(header.tail_offset))

        def into(chunk: memoryview, in_slot: int) -> None:
            raw[in_slot : in_slot + len(chunk)] = chunk
            moved()

        file.write_header(replace(header, state=SlotState.WRITING, slot=file.slot))
        try:
            verify(stored, into)
            file.write_tail(stored.tail, header.tail_offset)
        except BaseException:
            file.void()
            raise
        file.write_header(replace(header, slot=file.slot, committed_ns=arena.now_ns()))


@contextmanager
def _slot_for(arena_folder: Path, header: Header) -> Iterator[arena.SlotFile | None]:
    """A locked slot for this shard; None if a good copy is in one already.

    As ``catalog.writable`` chooses, but for one thing: slots with newer snapshots come last, and do not count as lost. This
    one is loaded because nothing newer can be restored, and the job will void what is newer.

    Raises:
        SnapshotError: other processes read all slots.
    """
    shard, names = header.shard, {p.name for p in arena.list_folder(arena_folder)}
    numbers = [n for n in range(catalog.OWN_SLOTS) if f"{shard}.{n}" in names] or [0]
    files = [arena.SlotFile(arena_folder, shard, n, create=True) for n in numbers]
    try:
        views = {file.slot: file.view() for file in files}
        same = [
            f for f in files if (views[f.slot].state, views[f.slot].identity) == (SlotState.COMMITTED, header.identity)
        ]
        if any(_is_good(file) for file in same):
            yield None
            return
        best = catalog.writable(list(views.values()), header.identity)
        # A damaged copy first: nobody may find it later.
        order = sorted(files, key=lambda f: (f not in same, f.slot != best, views[f.slot].identity or header.identity))
        for file in order:
            if file.lock(exclusive=True):
                yield file
                return
        raise SnapshotError(
            f"expected a free slot for shard {shard} in {arena_folder}; other processes read all of them"
        )
    finally:
        for file in files:
            file.close()


def _is_good(file: arena.SlotFile) -> bool:
    header = file.header()
    try:
        if header is None or not file.lock(exclusive=False):
            return False
        file.manifest(header)
        return True
    except SnapshotError:
        return False
    finally:
        file.unlock()
