"""How a shard lies in its file. Pure: bytes in, values out; no files, no tensors.

A file holds one shard in one slot::

    0        header      one struct with a checksum of its own; the rest of its page is unused
    4096     tensors     each at its planned offset, 64-byte aligned; planned once, the same in every slot
    tail     manifest    8 bytes length, JSON (tensors, structure, values), then the small arrays the JSON refers to

The tensors never move, so a capture is plain copies into a mapping. Values may change their size from step to step
(positions, unwritten log rows, the user's own), so they are in the tail, where the file can grow.

The *structure* of a shard is everything that must be equal for two shards to fit together, and into an engine: ranks, kind
of optimizer, names and shapes of tensors (:func:`describe`). The header has its fingerprint, the manifest all of it.

A header is WRITING before the first byte of data changes and COMMITTED after the last one; it is one small write within
one page. A reader believes a slot only when the header's own checksum, then the checksums of tensors and tail, fit.
"""

from __future__ import annotations

import enum
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.store.identity import Identity

MAGIC = b"GEMISNAP"
VERSION = 2  # 2: the shard "common", which version 1 called "replicated"
PAGE = 4096
ALIGN = 64
LARGE = 1 << 20  # tensors of this size or more start on a page: a device can register and a socket can send whole pages
TAIL_ROOM = 1 << 20  # first reservation of the tail

_ITEMSIZE = {
    "float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16,
    "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


class SlotState(enum.IntEnum):
    VOID = 0  # nothing here, or rolled back
    WRITING = 1  # a copy has begun; after a crash this counts as nothing
    COMMITTED = 2


def itemsize(dtype: str) -> int:
    """Bytes per element.

    Raises:
        SnapshotError: a dtype this format does not know.
    """
    if dtype not in _ITEMSIZE:
        raise SnapshotError(f"expected a dtype out of {', '.join(sorted(_ITEMSIZE))}; got {dtype!r}")
    return _ITEMSIZE[dtype]


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor: ``dtype`` as torch spells it, ``shape`` its sizes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return itemsize(self.dtype) * math.prod(self.shape)


class Placed(NamedTuple):
    """Elements of a parameter or buffer, and the tensor of the shard that holds them: for export, never for a restore.

    Attributes:
        name, shape: of the whole parameter, as the model's state dict has it.
        tensor: of the shard; offset: the first of the elements in it, as if it had one dimension.
        start: the first of the elements in the parameter; length: how many.
    """

    name: str
    shape: tuple[int, ...]
    tensor: str
    offset: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a shard lie.

    Attributes:
        specs: the tensors in order.
        offsets: byte offset of each in the file, ascending, never overlapping.
        tail_offset: first byte after the tensors, page-aligned.
    """

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    tail_offset: int

    @property
    def file_bytes(self) -> int:
        """Bytes to reserve before training."""
        return self.tail_offset + TAIL_ROOM


def align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def plan(specs: Iterable[TensorSpec]) -> Layout:
    """Offsets for ``specs``, in their order.

    Raises:
        SnapshotError: two tensors of one name.
    """
    specs, offsets, end, seen = tuple(specs), [], PAGE, set()
    for spec in specs:
        if spec.name in seen:
            raise SnapshotError(f"expected every captured tensor to have its own name; two are called {spec.name!r}")
        seen.add(spec.name)
        end = align(end, PAGE if spec.nbytes >= LARGE else ALIGN)
        offsets.append(end)
        end += spec.nbytes
    return Layout(specs, tuple(offsets), align(end, PAGE))


@dataclass(frozen=True)
class Header:
    """The first page of a slot.

    Attributes:
        state: of the slot.
        identity: of the snapshot.
        owner: global rank that wrote it; shard: its name (``rank-00003`` or ``common``); slot: number.
        job: id of the job; structure: xxh3_128 of :func:`describe`'s canonical JSON, 16 bytes.
        data_bytes: bytes of all present tensors without gaps; data_checksum: xxh3_128 over exactly those, in order.
        tail_offset, tail_bytes, tail_checksum: of the tail.
        committed_ns: CLOCK_BOOTTIME at commit; memory does not outlive the boot, so wall-clock jumps don't matter.
    """

    state: SlotState
    identity: Identity
    owner: int
    shard: str
    slot: int
    job: str
    structure: bytes
    data_bytes: int = 0
    data_checksum: bytes = bytes(16)
    tail_offset: int = 0
    tail_bytes: int = 0
    tail_checksum: bytes = bytes(16)
    committed_ns: int = 0


_HEADER = struct.Struct("<8sII QQQ iI 48s64s 16s QQQQ 16s16s")
HEADER_BYTES = _HEADER.size + 16


def _text(value: str, room: int, what: str) -> bytes:
    raw = value.encode()
    if len(raw) > room or b"\0" in raw:
        raise SnapshotError(f"expected a {what} of at most {room} bytes without NUL; got {value!r}")
    return raw


def encode_header(h: Header) -> bytes:
    """``HEADER_BYTES`` bytes."""
    raw = _HEADER.pack(
        MAGIC, VERSION, h.state,
        *h.identity,
        h.owner, h.slot,
        _text(h.shard, 48, "shard name"), _text(h.job, 64, "job id"),
        h.structure,
        h.data_bytes, h.tail_offset, h.tail_bytes, h.committed_ns,
        h.data_checksum, h.tail_checksum,
    )  # fmt: skip
    return raw + xxhash.xxh3_128_digest(raw)


def decode_header(raw: bytes) -> Header | None:
    """The header in the first bytes of a slot file, or None where there is none (never written, or torn by a kill).

    Raises:
        SnapshotError: a whole header of another format version.
    """
    if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
        return None
    body, check = raw[: _HEADER.size], raw[_HEADER.size : HEADER_BYTES]
    (version,) = struct.unpack_from("<I", raw, 8)
    if version != VERSION:
        # Another version's header has another length, so its checksum cannot be looked at: the number must do.
        raise SnapshotError(
            f"snapshot format version: expected {VERSION}, got {version}: another release of gemini_gnn wrote it. "
            "Start with that release, or start again with resume=never"
        )
    if xxhash.xxh3_128_digest(body) != check:
        return None
    _, _, state, term, generation, step, owner, slot, shard, job, structure, data, tail, tail_bytes, at, dsum, tsum = (
        _HEADER.unpack(body)
    )
    try:
        slot_state = SlotState(state)
    except ValueError:
        return None
    return Header(
        state=slot_state,
        identity=Identity(term, generation, step),
        owner=owner,
        shard=shard.rstrip(b"\0").decode(),
        slot=slot,
        job=job.rstrip(b"\0").decode(),
        structure=structure,
        data_bytes=data,
        data_checksum=dsum,
        tail_offset=tail,
        tail_bytes=tail_bytes,
        tail_checksum=tsum,
        committed_ns=at,
    )


def canonical(value: Any) -> bytes:
    """One spelling per value, for the fingerprint."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def describe(
    kind: str,
    world_size: int,
    optimizer: str,
    layout: Layout,
    *,
    scheduler: str = "none",
    param_groups: Sequence[Sequence[str]] = (),
    extra_state: bool = False,
) -> dict[str, Any]:
    """The structure of a shard, as JSON: two shards fit together, and into an engine, only when it is equal."""
    return {
        "kind": kind,
        "world_size": world_size,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "param_groups": [list(keys) for keys in param_groups],
        "extra_state": extra_state,
        "tensors": [[s.name, s.dtype, list(s.shape)] for s in layout.specs],
    }


def fingerprint(structure: dict[str, Any]) -> bytes:
    return xxhash.xxh3_128_digest(canonical(structure))


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first thing in which two structures differ, in words; "" when they are equal."""
    for key, words in (
        ("world_size", "number of ranks"),
        ("kind", "way DeepSpeed keeps the state (ZeRO stage, precision)"),
        ("optimizer", "optimizer"),
        ("scheduler", "learning-rate scheduler"),
        ("param_groups", "parameter groups of the optimizer"),
        ("extra_state", "whether extra_state was given"),
    ):
        if found.get(key) != expected[key]:
            return f"{words}: the snapshot has {found.get(key)}, this run {expected[key]}"
    theirs = {t[0]: t[1:] for t in found.get("tensors", [])}
    ours = {t[0]: t[1:] for t in expected["tensors"]}
    for name in ours:
        if name not in theirs:
            return f"tensor {name}: this run has it, the snapshot does not"
        if theirs[name] != list(ours[name]):
            return f"tensor {name}: the snapshot has {theirs[name]}, this run {list(ours[name])}"
    for name in theirs:
        if name not in ours:
            return f"tensor {name}: the snapshot has it, this run does not"
    return "" if found == expected else "order of the tensors"


@dataclass(frozen=True)
class Manifest:
    """The manifest of a committed slot.

    Attributes:
        layout: of the tensors present.
        structure: as :func:`describe` made it.
        tree: the values, as ``tree.pack`` made them.
        arrays: the small arrays ``tree`` refers to, as views of the tail.
        parameters: what of the model lies where; empty in a snapshot that an older release took.
    """

    layout: Layout
    structure: dict[str, Any]
    tree: Any
    arrays: list[memoryview]
    parameters: list[Placed]


def encode_tail(layout_json: bytes, tree: Any, arrays: Sequence[Any]) -> bytes:
    """The tail of a slot.

    Args:
        layout_json: :func:`layout_json`'s, made once: it is the large and unchanging part.
        arrays: bytes-like, contiguous.
    """
    views = [memoryview(a).cast("B") if memoryview(a).nbytes else memoryview(b"") for a in arrays]
    head = b'{"layout":%s,"tree":%s,"arrays":%s}' % (
        layout_json,
        json.dumps(tree, separators=(",", ":")).encode(),
        json.dumps([v.nbytes for v in views]).encode(),
    )
    parts: list[Any] = [struct.pack("<Q", len(head)), head]
    position = 8 + len(head)
    for view in views:
        gap = align(position, ALIGN) - position
        parts += [bytes(gap), view]
        position += gap + view.nbytes
    return b"".join(parts)


def layout_json(
    layout: Layout, present: Sequence[int], structure: dict[str, Any], parameters: Sequence[Placed] = ()
) -> bytes:
    """``present``: indices of the tensors that the snapshot holds (an optimizer makes its moments in its first step)."""
    # Beside the structure, not in it: snapshots of older releases must still fit.
    placed = {"parameters": [list(p) for p in parameters]} if parameters else {}
    return json.dumps(
        {
            "tensors": [
                [layout.specs[i].name, layout.specs[i].dtype, list(layout.specs[i].shape), layout.offsets[i]]
                for i in present
            ],
            "topology": structure,  # its name since version 1, and in the checkpoints of existing run directories
            **placed,
        },
        separators=(",", ":"),
    ).encode()


def decode_tail(raw: memoryview, tail_offset: int) -> Manifest:
    """The inverse of :func:`encode_tail`; ``raw`` was already checked against its checksum.

    Raises:
        SnapshotError: it does not hold together.
    """
    try:
        (length,) = struct.unpack_from("<Q", raw, 0)
        if length > len(raw) - 8:
            raise ValueError(f"manifest of {length} bytes in a tail of {len(raw)}")
        value = json.loads(bytes(raw[8 : 8 + length]))
        specs, offsets = [], []
        end = PAGE
        for name, dtype, shape, offset in value["layout"]["tensors"]:
            spec = TensorSpec(str(name), str(dtype), tuple(int(n) for n in shape))
            if any(n < 0 for n in spec.shape) or offset < end or offset + spec.nbytes > tail_offset:
                raise ValueError(f"tensor {name} at {offset} lies outside {end}..{tail_offset}")
            end = offset + spec.nbytes
            specs.append(spec)
            offsets.append(int(offset))
        arrays, position = [], 8 + length
        for nbytes in value["arrays"]:
            position = align(position, ALIGN)
            if nbytes < 0 or position + nbytes > len(raw):
                raise ValueError(f"array of {nbytes} bytes at {position} in a tail of {len(raw)}")
            arrays.append(raw[position : position + nbytes])
            position += nbytes
        layout = Layout(tuple(specs), tuple(offsets), tail_offset)
        placed = [Placed(str(n), tuple(s), str(t), *at) for n, s, t, *at in value["layout"].get("parameters", ())]
        return Manifest(layout, dict(value["layout"]["topology"]), value["tree"], arrays, placed)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise SnapshotError(
            f"expected a snapshot manifest; got one that does not hold together: {error}; start again with resume=never"
        ) from None
