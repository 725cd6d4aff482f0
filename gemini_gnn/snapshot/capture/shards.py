"""A shard: the tensors of a rank, where they lie in their slots, and the slots' files mapped into this process.

The mappings are made once, when the shard is opened, and stay until it is closed: training thread and copying thread write
to addresses in them. Nothing here decides which slot is written when.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemini_gnn.snapshot.state.collect import Entry, TrainingState
from gemini_gnn.snapshot.store import arena, catalog, format
from gemini_gnn.snapshot.store.format import Layout, Placed, TensorSpec


class Piece(NamedTuple):
    """One tensor of a shard: its place in a slot, and the size it must have. Computed once, read at every capture."""

    entry: Entry
    offset: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass
class Shard:
    """A shard this rank writes, or (``owned`` false) reads: the common one, which another rank of this machine writes.

    Attributes:
        name: of the shard; entries: its tensors, in the order of ``format.specs``.
        structure: as ``format.describe`` made it; fingerprint: of it.
        pieces: the same tensors, as the copies see them.
        files: the slots; mapped up to the tail. Empty until opened.
    """

    name: str
    entries: list[Entry]
    layout: Layout
    structure: dict[str, Any]
    fingerprint: bytes
    owned: bool
    pieces: list[Piece]
    files: list[arena.SlotFile] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)  # keeps the mappings alive that addresses point into
    addresses: list[int] = field(default_factory=list)
    layout_json: dict[tuple[int, ...], bytes] = field(default_factory=dict)
    parameters: list[Placed] = field(default_factory=list)  # what of the model lies in this shard

    def open(self, folder: Path) -> None:
        """Reserve and map all slots (owner), or open the owner's files.

        Raises:
            SnapshotError: no room, or another user's files.
        """
        for slot in range(catalog.OWN_SLOTS):
            file = arena.SlotFile(folder, self.name, slot, create=self.owned)
            self.files.append(file)
            if self.owned:
                file.reserve(self.layout.file_bytes)
                view = (ctypes.c_char * self.layout.tail_offset).from_buffer(file.map(self.layout.tail_offset))
                self.memory.append(view)
                self.addresses.append(ctypes.addressof(view))

    def views(self) -> list[catalog.SlotView]:
        return [f.view() for f in self.files]

    def tensor(self, slot: int, piece: Piece) -> torch.Tensor:
        """The place of a tensor in a slot of ours."""
        return tensor_in(memoryview(self.files[slot].map(self.layout.tail_offset)), piece.offset, piece.entry.spec)

    def close(self) -> None:
        for file in self.files:
            file.close()
        self.files, self.memory, self.addresses = [], [], []


def structure_of(state: TrainingState, world_size: int, plan: Layout) -> dict[str, Any]:
    return format.describe(
        state.kind,
        world_size,
        state.optimizer,
        plan,
        scheduler=state.scheduler,
        param_groups=state.param_groups,
        extra_state=state.extra_state,
    )


def make_shard(name: str, entries: list[Entry], state: TrainingState, world_size: int, owned: bool) -> Shard:
    plan = format.plan(e.spec for e in entries)
    structure = structure_of(state, world_size, plan)
    pieces = [
        Piece(e, offset, e.spec.nbytes, torch.Size(e.spec.shape), getattr(torch, e.spec.dtype))
        for e, offset in zip(entries, plan.offsets, strict=True)
    ]
    names = {e.spec.name for e in entries}
    placed = [p for p in state.parameters if p.tensor in names]
    return Shard(name, entries, plan, structure, format.fingerprint(structure), owned, pieces, parameters=placed)


def live_pieces(entries: list[Entry]) -> Iterator[memoryview]:
    """The bytes of the live tensors, in order and without gaps: comparable with a slot's ``data_checksum``.

    One at a time: those of a GPU take host memory until the next is asked for.
    """
    for entry in entries:
        tensor = entry.get()
        if tensor is not None:
            yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_in(raw: memoryview, offset: int, spec: TensorSpec) -> torch.Tensor:
    """A tensor over the bytes of a slot."""
    dtype = getattr(torch, spec.dtype)
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(raw[offset : offset + spec.nbytes], dtype=dtype).reshape(spec.shape)
