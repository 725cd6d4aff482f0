"""Show and sweep the arenas of this machine, for people."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.store import arena, locks
from gemini_gnn.snapshot.store.format import SlotState


@dataclass(frozen=True)
class Line:
    """One slot. ``age_s`` is counted by the clock of the boot; ``check`` is "ok", "busy", "not read" or the fault."""

    job: str
    alive: bool
    shard: str
    slot: int
    owner: int
    identity: str
    state: str
    bytes: int
    allocated_bytes: int
    age_s: float
    check: str


def arenas(root: str | Path, job: str | None = None) -> list[Path]:
    """The arena folders of this user.

    Raises:
        SnapshotError: there is none of that name.
    """
    home = arena.home(root)
    found = [p for p in arena.list_folder(home) if p.is_dir() and not p.is_symlink()]
    if job is None:
        return found
    if home / job not in found:
        raise SnapshotError(
            f"no snapshots of job {job} in {home}; give --job one of: {', '.join(p.name for p in found) or 'none'}"
        )
    return [home / job]


def inspect(root: str | Path = "/dev/shm", job: str | None = None, checksum: bool = True) -> list[Line]:
    """Every slot of every arena of this user on this machine."""
    lines = []
    for folder in arenas(root, job):
        alive = locks.agent_lives(folder)
        for file in arena.slots(folder):
            try:
                lines.append(_line(folder.name, alive, file, checksum))
            finally:
                file.close()
    return lines


def _line(job: str, alive: bool, file: arena.SlotFile, checksum: bool) -> Line:
    pinned = file.lock(exclusive=False)  # a slot being written stays its writer's
    try:
        header = file.header()
        problem = "no header" if header is None else ""
    except SnapshotError as error:
        header, problem = None, str(error)
    if header is None:
        return Line(job, alive, file.shard, file.slot, -1, "-", "void", 0, file.allocated_bytes, 0.0, problem)
    check = "not read"
    if not pinned:
        check = "busy"
    elif header.state is not SlotState.COMMITTED:
        check = "-"
    elif checksum:
        try:
            file.manifest(header)
            check = "ok"
        except SnapshotError as error:
            check = f"DAMAGED: {error}"
    committed = header.state is SlotState.COMMITTED
    return Line(
        job=job,
        alive=alive,
        shard=file.shard,
        slot=file.slot,
        owner=header.owner,
        identity=str(header.identity),
        state=header.state.name.lower(),
        bytes=header.data_bytes + header.tail_bytes,
        allocated_bytes=file.allocated_bytes,
        age_s=max(0.0, (arena.now_ns() - header.committed_ns) / 1e9) if committed else 0.0,
        check=check,
    )


def table(lines: list[Line]) -> str:
    """The lines in columns, grouped by job."""
    if not lines:
        return "no snapshots in host memory here"
    text = []
    for job in dict.fromkeys(line.job for line in lines):
        mine = [line for line in lines if line.job == job]
        held = sum(line.allocated_bytes for line in mine)
        life = (
            "its worker agent is alive"
            if mine[0].alive
            else "dead: the same command resumes from it, --sweep removes it"
        )
        text.append(f"job {job}: {held / 1e6:.1f} MB in host memory; {life}")
        rows = [("shard", "slot", "owner", "identity", "state", "bytes", "age", "checksum")]
        rows += [
            (
                line.shard,
                str(line.slot),
                f"rank {line.owner}" if line.owner >= 0 else "-",
                line.identity,
                line.state,
                f"{line.bytes:,}" if line.bytes else "-",
                f"{line.age_s:.0f} s" if line.state == "committed" else "-",
                line.check,
            )
            for line in mine
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(text)


def sweep(root: str | Path = "/dev/shm", job: str | None = None) -> list[str]:
    """Remove the arenas whose processes are all dead; per arena the result, in words."""
    said = []
    for folder in arenas(root, job):
        held = 0
        with suppress(FileNotFoundError):  # its job has just ended
            held = sum(p.stat().st_blocks * 512 for p in folder.iterdir() if p.is_file())
        why_not = arena.sweep(folder)
        freed = f"swept, {held / 1e6:.1f} MB of host memory are free again"
        said.append(f"job {folder.name}: {why_not or freed}")
    return said
