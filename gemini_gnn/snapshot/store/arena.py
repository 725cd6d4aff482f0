"""The arena: snapshot slots as files in host memory, ``<root>/gemini-gnn-<uid>/<job>/<shard>.<slot>``.

Ownership. The worker agent makes the folder and holds the lock in it (locks.py) for as long as it lives; it removes the
folder when the job is done or stopped. One trainer writes a slot: the owner of its shard, under an exclusive flock on the
slot's file. A process that reads its bytes (restore, inspection) holds a shared one, which *is* the pin: the writer finds
the slot busy and takes another one or skips. The kernel drops both kinds with the process, so no pin and no reservation
survives a kill.

Interruption. A kill may come anywhere: a header is one write of less than a page, WRITING before the data and COMMITTED
after it, and readers believe only bytes that fit their checksums. Room is allocated before training, so a full /dev/shm is
an error message at the start and never a SIGBUS in mid-epoch. Only the tail may grow later, by an allocation that may fail
with an error message.

Imports nothing heavy: the agent and the shim use this file too.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from gemini_gnn import cgroups
from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.store import locks
from gemini_gnn.snapshot.store.catalog import SlotView
from gemini_gnn.snapshot.store.format import (
    HEADER_BYTES,
    PAGE,
    Header,
    Manifest,
    SlotState,
    decode_header,
    decode_tail,
    encode_header,
)


def home(root: str | os.PathLike[str] = "/dev/shm") -> Path:
    """The folder of all arenas of this user below ``root``."""
    return Path(root) / f"gemini-gnn-{os.geteuid()}"


def folder_of(job: str, root: str | os.PathLike[str] = "/dev/shm") -> Path:
    """The arena folder of ``job``."""
    return home(root) / job


def make_folder(path: Path) -> Path:
    """Make an arena folder and its parent, mode 0700, ours.

    Raises:
        SnapshotError: it is another user's, a link, or cannot be made.
    """
    try:
        for part in (path.parent, path):
            part.mkdir(mode=0o700, exist_ok=True)
            _check_ours(part)
            os.chmod(part, 0o700)  # whatever the umask said
    except FileNotFoundError:
        if path.parent.parent.is_dir():  # the last job of this user has just removed what we made
            return make_folder(path)
        raise SnapshotError(
            f"cannot make the arena {path}: there is no {path.parent.parent}; check snapshot.arena"
        ) from None
    except OSError as error:
        raise SnapshotError(f"cannot make the arena {path}: {error.strerror}; give another snapshot.arena") from error
    return path


def _check_ours(path: Path) -> None:
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode) or not stat.S_ISDIR(info.st_mode):
        raise SnapshotError(f"expected the arena {path} to be a folder; it is a link or a file: remove it")
    if info.st_uid != os.geteuid():
        raise SnapshotError(
            f"the arena {path} belongs to user {info.st_uid}, this process runs as user {os.geteuid()}; start the job as "
            "that user, or have that user remove it: launch/inspect_snapshots.py --sweep"
        )


# Room


@dataclass(frozen=True)
class Room:
    """``available`` bytes, limited by ``limit``; ``remedy`` makes it larger. Both are words for a message."""

    available: int
    limit: str
    remedy: str


def room(root: str | Path) -> Room:
    """The room left below ``root``: the smallest of the file system, the cgroups above this process and the memory of
    the machine.
    """
    where = os.statvfs(root)
    absolute = Path(root).resolve()
    mount = next(folder for folder in (absolute, *absolute.parents) if folder.is_mount())
    rooms = [
        Room(
            where.f_bavail * where.f_frsize,
            f"the size of {mount}",
            f"mount -o remount,size=... {mount}, or docker run --shm-size=...",
        )
    ]
    for folder, left in cgroups.left():
        rooms.append(
            Room(
                left,
                f"the memory limit of {folder}",
                "sbatch --mem=..., docker run --memory=..., or memory.max of that group",
            )
        )
    if (free := cgroups.machine_left()) is not None:
        rooms.append(Room(free, "the free memory of the machine", "fewer ranks per machine"))
    return min(rooms, key=lambda r: r.available)


def check_room(needed_bytes: int, where: Room) -> None:
    """
    Raises:
        SnapshotError: with needed, available and how to enlarge.
    """
    if needed_bytes > where.available:
        raise SnapshotError(
            f"snapshots need {_size(needed_bytes)} more host memory on this machine, available are "
            f"{_size(where.available)}, limited by {where.limit}; enlarge it ({where.remedy}), sweep dead jobs "
            "(launch/inspect_snapshots.py --sweep), or use snapshot=nfs or snapshot=none"
        )


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


# One slot


def checksum(pieces: Iterable[memoryview]) -> bytes:
    """xxh3_128 over ``pieces``, one after the other. Large pieces are hashed with the interpreter lock released."""
    h = xxhash.xxh3_128()
    for piece in pieces:
        h.update(piece)
    return h.digest()


def now_ns() -> int:
    """The clock of the boot: arenas live exactly as long, and it does not jump."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class SlotFile:
    """One slot's file, open. Not thread-safe; :meth:`close` it.

    Attributes:
        shard, slot: name of the shard, and number of the slot; path: of the file.
    """

    def __init__(self, folder: Path, shard: str, slot: int, create: bool = False):
        """
        Raises:
            SnapshotError: not there (without ``create``), or another user's.
        """
        self.shard, self.slot = shard, slot
        self.path = folder / f"{shard}.{slot}"
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        try:
            self._fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise SnapshotError(f"cannot open the snapshot slot {self.path}: {error.strerror}") from error
        info = os.fstat(self._fd)
        if info.st_uid != os.geteuid() or not stat.S_ISREG(info.st_mode):
            os.close(self._fd)
            raise SnapshotError(f"the snapshot slot {self.path} is not a file of user {os.geteuid()}: sweep the arena")
        self._map: mmap.mmap | None = None

    @property
    def allocated_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def reserve(self, nbytes: int) -> None:
        """Allocate the first ``nbytes`` of the file. Costs nothing where that was done before.

        Raises:
            SnapshotError: there is no room.
        """
        info = os.fstat(self._fd)
        if info.st_size >= nbytes and info.st_blocks * 512 >= info.st_size:
            return
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
                check_room(nbytes - self.allocated_bytes, room(self.path.parent))
            raise SnapshotError(f"cannot reserve {_size(nbytes)} in {self.path}: {error.strerror}") from error

    def map(self, nbytes: int) -> mmap.mmap:
        """The first ``nbytes`` of the file, all of them reserved."""
        if self._map is None or len(self._map) < nbytes:
            self._map = mmap.mmap(self._fd, nbytes)
        return self._map

    def header(self) -> Header | None:
        """None when there is no valid one.

        Raises:
            SnapshotError: another format version.
        """
        return decode_header(os.pread(self._fd, HEADER_BYTES, 0))

    def write_header(self, header: Header) -> None:
        raw = encode_header(header)
        if os.pwrite(self._fd, raw, 0) != len(raw):
            raise SnapshotError(f"the header of {self.path} could not be written whole")

    def write_tail(self, tail: bytes, offset: int) -> None:
        """
        Raises:
            SnapshotError: the tail outgrew its room and there is no more.
        """
        if offset + len(tail) > os.fstat(self._fd).st_size:
            self.reserve(offset + len(tail) + len(tail) // 2)  # grows with what grows, not at every step
        view, position = memoryview(tail), offset
        while view:
            written = os.pwrite(self._fd, view, position)
            view, position = view[written:], position + written

    def void(self) -> None:
        """Void this slot for every later reader, before this returns."""
        found = None
        with suppress(SnapshotError):
            found = self.header()
        if found is not None:
            self.write_header(replace(found, state=SlotState.VOID))
        else:
            os.pwrite(self._fd, bytes(HEADER_BYTES), 0)

    def lock(self, exclusive: bool) -> bool:
        """Reserve for writing, or pin for reading. False: another process holds it."""
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        return True

    def unlock(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def view(self) -> SlotView:
        """For the catalog. A slot of another format counts as void here; restore refuses it."""
        try:
            h = self.header()
        except SnapshotError:
            h = None
        if h is None:
            return SlotView(self.shard, self.slot)
        return SlotView(self.shard, self.slot, h.state, h.identity)

    def tail(self, header: Header) -> memoryview:
        """The tail of a committed slot, its checksum verified. Hold a lock.

        Raises:
            SnapshotError: the bytes are not those that were committed.
        """
        end = header.tail_offset + header.tail_bytes
        if not PAGE <= header.tail_offset <= end <= os.fstat(self._fd).st_size:
            raise SnapshotError(f"{self.path}: expected {end} bytes; the file is shorter: it was cut")
        tail = memoryview(os.pread(self._fd, header.tail_bytes, header.tail_offset))
        if checksum([tail]) != header.tail_checksum:
            raise SnapshotError(f"{self.path}: the manifest of {header.identity} does not fit its checksum")
        return tail

    def manifest(self, header: Header) -> tuple[Manifest, memoryview]:
        """Manifest and bytes (up to the tail) of a committed slot, every checksum verified. Hold a lock.

        Raises:
            SnapshotError: the bytes are not those that were committed.
        """
        manifest = decode_tail(self.tail(header), header.tail_offset)
        raw = memoryview(self.map(header.tail_offset))
        pieces = tensor_pieces(manifest, raw)
        if sum(p.nbytes for p in pieces) != header.data_bytes or checksum(pieces) != header.data_checksum:
            raise SnapshotError(f"{self.path}: the tensors of {header.identity} do not fit their checksum")
        return manifest, raw

    def close(self) -> None:
        self._map = None  # unmapped when the last view of it is gone
        os.close(self._fd)


def tensor_pieces(manifest: Manifest, raw: memoryview) -> list[memoryview]:
    """The bytes of the tensors, in order; ``data_checksum`` is over these."""
    layout = manifest.layout
    return [raw[o : o + s.nbytes] for s, o in zip(layout.specs, layout.offsets, strict=True)]


# Whole arenas


def slots(folder: Path) -> list[SlotFile]:
    """Every slot file of an arena, open; close them. Files that vanish meanwhile are left out: their job has just ended."""
    found: list[SlotFile] = []
    for path in list_folder(folder):
        shard, _, slot = path.name.rpartition(".")
        if slot.isdigit() and path.is_file():  # not an agent's socket
            try:
                found.append(SlotFile(folder, shard, int(slot)))
            except SnapshotError:
                if path.exists():
                    for file in found:
                        file.close()
                    raise
    return found


def list_folder(folder: Path) -> list[Path]:
    """Its files, by name; none if it is gone."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def remove(folder: Path) -> None:
    """Delete an arena, and the user's folder when it was the last one. Missing is fine."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def sweep(folder: Path) -> str | None:
    """Delete the arena if its agent and all its trainers are dead. None if deleted, else the reason, in words."""
    try:
        lock = locks.take_agent_lock(folder)
    except FileNotFoundError:
        return "it is gone already: its job has ended, or another command has just swept it"
    if lock is None:
        return "its worker agent is alive; end it with launch/stop.py first"
    try:
        trainer = locks.living_trainer(folder)
        if trainer is not None:
            return f"its worker agent is dead, but its process {trainer} is not yet; end that one, then sweep again"
        remove(folder)
        return None
    finally:
        os.close(lock)
