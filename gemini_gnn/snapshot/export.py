"""A checkpoint as one plain state dict, in a safetensors file: no DeepSpeed, no torch, whatever ZeRO stage wrote it.

Each shard says which elements of which parameters its tensors hold (``format.Placed``, written at capture). So an export only
copies bytes. Parameters are the fp32 masters, if the optimizer keeps any; parameters that are not trained, and buffers, have
the type that they had. If each rank has its own (the buffers of plain data parallelism), those of rank 0 are taken.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemini_gnn.errors import SnapshotError
from gemini_gnn.files import rename
from gemini_gnn.snapshot import persist
from gemini_gnn.snapshot.persist import CHUNK_BYTES, Checkpoint, Mark, Stored
from gemini_gnn.snapshot.store import format

Report = Callable[[int], None]  # so many bytes more are done


@dataclass(frozen=True)
class Run:
    """``nbytes`` bytes at ``source`` of a shard's file, which are at ``target`` of the whole parameter."""

    path: Path
    source: int
    target: int
    nbytes: int


@dataclass
class Whole:
    """A parameter or buffer, and the runs it is made of, which are ``held`` bytes."""

    dtype: str
    shape: tuple[int, ...]
    runs: list[Run] = field(default_factory=list)
    held: int = 0

    @property
    def nbytes(self) -> int:
        return format.itemsize(self.dtype) * math.prod(self.shape)


def choose(folder: Path, step: int | None) -> tuple[Mark, Path]:
    """The newest complete checkpoint in ``folder``, or the one of ``step``.

    Raises:
        SnapshotError: there is none; says which there are.
    """
    found = [one for one in persist.complete_checkpoints(folder) if step in (None, one[0].identity.step)]
    if found:
        return found[-1]
    every = persist.survey(folder)
    steps = sorted({c.step for c in every if c.mark is not None})
    if steps:
        raise SnapshotError(
            f"step={step}: there is no complete checkpoint of this step in {folder}; "
            f"give one of {', '.join(map(str, steps))}"
        )
    others = "".join(f"; {c.path.name} is {c.problem}" for c in every[:8])
    raise SnapshotError(
        f"expected a complete checkpoint of snapshot=memory in {folder}; there is none{others}. Give another run_dir or "
        "snapshot.folder. Checkpoints of snapshot=nfs: python -m deepspeed.utils.zero_to_fp32 FOLDER OUT --tag STEP_FOLDER"
    )


def table(checkpoints: Sequence[Checkpoint]) -> str:
    """What lies in a folder, in columns."""
    rows = [("step", "identity", "written", "ranks", "MB", "state")]
    for c in checkpoints:
        nbytes = sum(p.stat().st_size for p in c.path.iterdir() if p.is_file())
        said = ("-", "-", "-")
        if c.mark is not None:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(c.mark.time_s))
            said = (str(c.mark.identity), when, str(c.mark.world_size))
        rows.append((str(c.step), *said, f"{nbytes / 1e6:.1f}", c.problem or "complete"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def check(mark: Mark, path: Path, report: Report) -> list[str]:
    """Compare every byte of a checkpoint with its checksum; what is damaged or missing, in words."""
    problems = []
    for shard in mark.shards:
        try:
            persist.verify(_read(path, mark, shard), lambda chunk, _: report(len(chunk)))
        except SnapshotError as error:
            problems.append(str(error))
    return problems


def _read(path: Path, mark: Mark, shard: str) -> Stored:
    stored = persist.read_shard(path, shard)
    if stored.header.identity != mark.identity:
        raise persist.DamagedError(
            f"{stored.path}: expected snapshot {mark.identity}, as {persist.COMPLETE} says; got {stored.header.identity}"
        )
    return stored


def assemble(shards: Iterable[Stored]) -> dict[str, Whole]:
    """By name what the state dict holds, and where. If a shard has all of a parameter, later shards add nothing to it.

    Raises:
        SnapshotError: the shards do not say where parameters lie, or some elements of one are in none of them.
    """
    model: dict[str, Whole] = {}
    for stored in shards:
        specs = {s.name: (s, at) for s, at in zip(stored.manifest.layout.specs, stored.offsets, strict=True)}
        for placed in stored.manifest.parameters:
            spec, at = specs[placed.tensor]
            size = format.itemsize(spec.dtype)
            whole = model.setdefault(placed.name, Whole(spec.dtype, placed.shape))
            if whole.held < whole.nbytes:
                run = Run(stored.path, at + placed.offset * size, placed.start * size, placed.length * size)
                whole.runs.append(run)
                whole.held += run.nbytes
    for name, whole in model.items():
        end = 0
        for run in sorted(whole.runs, key=lambda run: run.target):
            if run.target != end:
                break
            end += run.nbytes
        if end != whole.nbytes:
            raise SnapshotError(
                f"expected every element of {name} exactly once in the shards of the checkpoint; byte {end} is not. "
                "Export another checkpoint"
            )
    if not model:
        raise SnapshotError(
            "the checkpoint does not say where its parameters lie: an older release of gemini_gnn took the snapshot. "
            "Resume the job, and export the next checkpoint"
        )
    return model


def export(mark: Mark, path: Path, out: Path, report: Report) -> int:
    """Write the state dict of a checkpoint to ``out``, after the shards it needs were verified; the number of its tensors.

    Raises:
        SnapshotError: it is damaged, or cannot be put together; or ``out`` cannot be written. ``out`` is as it was.
    """
    shards = [_read(path, mark, shard) for shard in sorted(mark.shards)]  # the common one, then by rank
    model = assemble(shards)
    used = {run.path for whole in model.values() for run in whole.runs}
    shards = [stored for stored in shards if stored.path in used]
    for stored in shards:
        persist.verify(stored, lambda chunk, _: report(len(chunk)))
    rows = [(name, whole.dtype, whole.shape, whole.nbytes) for name, whole in model.items()]
    said = {"format": "pt", "identity": str(mark.identity), "job": mark.job}
    head, offsets, _ = persist.head_of(rows, said)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with persist.written(temporary, mode=0o666) as put:
            put(head, 0)
            buffer = memoryview(bytearray(CHUNK_BYTES))
            for stored in shards:
                with persist.reading(stored.path) as get:
                    for whole, offset in zip(model.values(), offsets, strict=True):
                        for run in whole.runs:
                            if run.path == stored.path:
                                _copy(get, put, buffer, run, offset)
                                report(run.nbytes)
        rename(temporary, out)
    except OSError as error:
        raise SnapshotError(f"cannot write {out}: {error.strerror}; give another out=FILE") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def _copy(
    get: Callable[[memoryview, int], None],
    put: Callable[[memoryview, int], None],
    buffer: memoryview,
    run: Run,
    offset: int,
) -> None:
    for begin in range(0, run.nbytes, CHUNK_BYTES):
        chunk = buffer[: min(CHUNK_BYTES, run.nbytes - begin)]
        get(chunk, run.source + begin)
        put(chunk, offset + run.target + begin)
