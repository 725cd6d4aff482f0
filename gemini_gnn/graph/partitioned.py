"""The partitioned graph: a folder that a machine maps without reading it.

::

    meta.json                format version, graph, fingerprint, method, settings, counts, bounds [parts + 1],
                             halo_ptr [parts + 1], quality, checksum (xxh3_128 of the file) of every array
    original.npy             int64 [nodes]            new id -> original id
    colptr.npy               int64 [nodes + 1]        CSC of in-edges in new ids,
    row.npy                  int32 or int64 [edges]   within a column ascending by *original* id of the source
    edge_weight.npy          float32 [edges]          only for weighted graphs
    x.npy                    float32 [nodes, features]
    y.npy                    int64 [nodes] or uint8 [nodes, classes]
    train_mask.npy val_mask.npy test_mask.npy         bool [nodes]
    halo.npy                 int32 or int64           per part the remote in-neighbors of its nodes, new ids ascending,
                                                      cut by halo_ptr
    node_ids.npy             the user's ids by *original* id, where they are not 0..nodes-1

Glossary: *original id*, the position in the :class:`Graph`; *new id*, the position after sorting by (part, original id),
so that part p owns the new ids ``bounds[p]..bounds[p + 1] - 1``; *halo*, nodes that a part's nodes have as in-neighbors
and that another part owns.

A folder is written beside its place under another name, made durable, and renamed: whoever finds it finds all of it.
No pickle: ``np.load(allow_pickle=False)`` and JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gemini_gnn.config import Config, PartitionConfig
from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.array_folder import (
    Progress,
    locked,
    map_array,
    new_folder,
    read_json,
    ticking,
    verify_arrays,
    write_array,
    write_json,
)
from gemini_gnn.graph.partitioning import partition_nodes, ranges
from gemini_gnn.graph.quality import Quality, chunks, halo_of, measure
from gemini_gnn.graph.topology import Graph
from gemini_gnn.hashing import splitmix64

FORMAT_VERSION = 1
CHUNK_BYTES = 64 << 20  # of feature rows held in memory while writing
MASKS = ("train_mask", "val_mask", "test_mask")


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` holds.

    Attributes:
        graph, fingerprint: name and fingerprint of the source graph. method, settings: how it was partitioned.
        bounds, halo_ptr: ``[parts + 1]``.
        train, val, test: ``[parts]`` numbers of nodes.
        edge_hash: sum over the edges of a hash of (original source, original target), modulo 2^64, taken from the
            *source* graph: proves without it that no edge was lost, doubled or changed.
        checksums: array name -> xxh3_128 of the file.
        notes: provenance of the source graph, for people.
    """

    format_version: int
    graph: str
    fingerprint: str
    method: str
    settings: dict[str, Any]
    parts: int
    num_nodes: int
    num_edges: int
    feature_width: int
    num_classes: int
    multi_label: bool
    bounds: list[int]
    halo_ptr: list[int]
    train: list[int]
    val: list[int]
    test: list[int]
    edge_hash: int
    quality: Quality
    checksums: dict[str, str]
    notes: dict[str, str]


@dataclass(frozen=True)
class GraphShard:
    """One part: views into the arrays of a :class:`PartitionedGraph`, or into its own files after :meth:`load`.

    Attributes:
        part: its number. begin, end: it owns the new ids ``begin..end - 1``. bounds: of all parts, int64 ``[parts+1]``.
        original: int64 ``[owned]`` original ids.
        colptr: int64 ``[owned + 1]``, offsets into the edges of the *whole* graph: those of the part begin at
            ``colptr[0]``.
        row: ``[edges of the part]`` new ids of the sources. edge_weight: float32, aligned, or None.
        halo: ``[halo nodes]`` new ids of remote in-neighbors, ascending.
        x, y, train_mask, val_mask, test_mask: rows of the owned nodes.
        num_classes: of the graph.
    """

    part: int
    begin: int
    end: int
    bounds: np.ndarray
    original: np.ndarray
    colptr: np.ndarray
    row: np.ndarray
    edge_weight: np.ndarray | None
    halo: np.ndarray
    x: np.ndarray
    y: np.ndarray
    train_mask: np.ndarray
    val_mask: np.ndarray
    test_mask: np.ndarray
    num_classes: int

    @property
    def owned(self) -> range:
        """New ids of the owned nodes."""
        return range(self.begin, self.end)

    @property
    def num_nodes(self) -> int:
        return self.end - self.begin

    @property
    def num_edges(self) -> int:
        return len(self.row)

    @property
    def multi_label(self) -> bool:
        return self.y.ndim == 2

    def in_neighbors(self, node: int) -> np.ndarray:
        """New ids of the sources of the in-edges of an owned node, in canonical order.

        Raises:
            PartitionError: the node belongs to another part.
        """
        if not self.begin <= node < self.end:
            owner = int(np.searchsorted(self.bounds, node, side="right")) - 1
            raise PartitionError(
                f"expected a node of part {self.part} ({self.begin}..{self.end - 1}); got {node}, owned by part {owner}"
            )
        first, last = self.colptr[node - self.begin : node - self.begin + 2] - self.colptr[0]
        return self.row[first:last]

    def save(self, folder: str | os.PathLike) -> None:
        """Write this part alone, for a machine without the shared file system.

        Raises:
            PartitionError: the folder exists already or cannot be written.
        """
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        scalars = {name: arrays.pop(name) for name in ("part", "begin", "end", "num_classes")}
        with new_folder(Path(folder)) as place:
            checksums = {
                name: write_array(place, name, array.dtype, array.shape, [array])
                for name, array in arrays.items()
                if array is not None
            }
            write_json(place, {"format_version": FORMAT_VERSION, **scalars, "checksums": checksums}, "shard.json")

    @classmethod
    def load(cls, folder: str | os.PathLike, *, verify: bool = False) -> GraphShard:
        """Map what :meth:`save` wrote; ``verify`` reads it all and compares the checksums.

        Raises:
            PartitionError: missing, damaged, or of another version.
        """
        folder = Path(folder)
        meta = read_json(folder, "shard.json", "a saved part", FORMAT_VERSION)
        try:
            names = list(meta["checksums"])
            scalars = {name: int(meta[name]) for name in ("part", "begin", "end", "num_classes")}
        except (KeyError, TypeError, ValueError) as error:
            raise PartitionError(f"{folder / 'shard.json'} is damaged ({error!r}); save the part again") from None
        if verify:
            verify_arrays(folder, meta["checksums"])
        arrays = {name: map_array(folder, name) for name in names}
        missing = {f.name for f in fields(cls)} - set(scalars) - set(arrays) - {"edge_weight"}
        if missing:
            raise PartitionError(f"{folder}: expected arrays {sorted(missing)}; save the part again")
        return cls(**scalars, **{"edge_weight": None, **arrays})  # type: ignore[arg-type]


@dataclass(frozen=True)
class PartitionedGraph:
    """A partitioned graph, its arrays mapped read-only; see the module's docstring for their shapes and order."""

    folder: Path
    meta: Meta
    bounds: np.ndarray
    original: np.ndarray
    colptr: np.ndarray
    row: np.ndarray
    edge_weight: np.ndarray | None
    x: np.ndarray
    y: np.ndarray
    train_mask: np.ndarray
    val_mask: np.ndarray
    test_mask: np.ndarray
    halo: np.ndarray
    halo_ptr: np.ndarray
    node_ids: np.ndarray | None

    @property
    def num_nodes(self) -> int:
        return self.meta.num_nodes

    @property
    def num_edges(self) -> int:
        return self.meta.num_edges

    @property
    def parts(self) -> int:
        return self.meta.parts

    @property
    def num_classes(self) -> int:
        return self.meta.num_classes

    @property
    def multi_label(self) -> bool:
        return self.meta.multi_label

    @classmethod
    def open(cls, folder: str | os.PathLike, *, verify: bool = False) -> PartitionedGraph:
        """Map a folder that :func:`write_partitioned` made. Reads ``meta.json`` and the array headers only.

        Args:
            verify: also read every array and compare its checksum.

        Raises:
            PartitionError: missing, damaged, truncated, or of another format version.
        """
        folder = Path(folder)
        meta = _parse_meta(folder, read_json(folder, "meta.json", "a partitioned graph", FORMAT_VERSION))
        if verify:
            verify_arrays(folder, meta.checksums)
        n, m = meta.num_nodes, meta.num_edges
        y_shape = (n, meta.num_classes) if meta.multi_label else (n,)
        shapes = {
            "original": (n,), "colptr": (n + 1,), "row": (m,), "edge_weight": (m,), "x": (n, meta.feature_width),
            "y": y_shape, "train_mask": (n,), "val_mask": (n,), "test_mask": (n,), "halo": (meta.halo_ptr[-1],),
            "node_ids": (n,),
        }  # fmt: skip
        arrays: dict[str, np.ndarray | None] = {}
        for name, shape in shapes.items():
            if name in ("edge_weight", "node_ids") and name not in meta.checksums:
                arrays[name] = None
                continue
            array = arrays[name] = map_array(folder, name)
            if array.shape != shape:
                raise PartitionError(
                    f"{folder / name}.npy: expected shape {list(shape)} as meta.json says; got {list(array.shape)}; "
                    "delete the folder and partition again"
                )
        if int(arrays["colptr"][-1]) != m:  # type: ignore[index]
            raise PartitionError(f"{folder}/colptr.npy does not cover {m} edges; delete the folder and partition again")
        return cls(
            folder=folder,
            meta=meta,
            bounds=np.array(meta.bounds, dtype=np.int64),
            halo_ptr=np.array(meta.halo_ptr, dtype=np.int64),
            **arrays,  # type: ignore[arg-type]
        )

    def verify_checksums(self) -> None:
        """Read every array and compare its checksum with ``meta.json``.

        Raises:
            PartitionError: naming the array.
        """
        verify_arrays(self.folder, self.meta.checksums)

    def expect(
        self,
        *,
        fingerprint: str | None = None,
        method: str | None = None,
        parts: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse a folder made for something else. None: do not care.

        Raises:
            PartitionError: naming what differs and what to do.
        """
        meta = self.meta
        wanted: dict[str, Any] = {"graph": fingerprint, "method": method, "parts": parts}
        if settings is not None:
            wanted["settings"] = dict(settings)
        found = {"graph": meta.fingerprint, "method": meta.method, "parts": meta.parts, "settings": meta.settings}
        for what, value in wanted.items():
            if value is None or value == found[what]:
                continue
            name = f" ({meta.graph})" if what == "graph" else ""
            raise PartitionError(
                f"{self.folder} was made for another {what}: expected {value}, got {found[what]}{name}; "
                "delete it, choose another partition.folder, or leave partition.folder unset"
            )

    def owner(self, ids: np.ndarray) -> np.ndarray:
        """The part of each new id: int64, of the shape of ``ids``."""
        return np.searchsorted(self.bounds, ids, side="right") - 1

    def part(self, p: int) -> GraphShard:
        """Part ``p`` as views.

        Raises:
            PartitionError: no such part.
        """
        if not 0 <= p < self.parts:
            raise PartitionError(f"{self.folder}: expected a part in 0..{self.parts - 1}; got {p}")
        begin, end = int(self.bounds[p]), int(self.bounds[p + 1])
        edges = slice(int(self.colptr[begin]), int(self.colptr[end]))
        return GraphShard(
            part=p,
            begin=begin,
            end=end,
            bounds=self.bounds,
            original=self.original[begin:end],
            colptr=self.colptr[begin : end + 1],
            row=self.row[edges],
            edge_weight=None if self.edge_weight is None else self.edge_weight[edges],
            halo=self.halo[self.halo_ptr[p] : self.halo_ptr[p + 1]],
            x=self.x[begin:end],
            y=self.y[begin:end],
            train_mask=self.train_mask[begin:end],
            val_mask=self.val_mask[begin:end],
            test_mask=self.test_mask[begin:end],
            num_classes=self.num_classes,
        )

    def train_seeds(self, p: int) -> np.ndarray:
        """New ids of the training nodes of part ``p``, ascending: int64."""
        return self._marked(self.train_mask, p)

    def val_nodes(self, p: int) -> np.ndarray:
        """New ids of the validation nodes of part ``p``, ascending: int64."""
        return self._marked(self.val_mask, p)

    def test_nodes(self, p: int) -> np.ndarray:
        """New ids of the test nodes of part ``p``, ascending: int64."""
        return self._marked(self.test_mask, p)

    def _marked(self, mask: np.ndarray, p: int) -> np.ndarray:
        begin = int(self.bounds[p])
        return np.flatnonzero(mask[begin : int(self.bounds[p + 1])]) + begin

    def new_of_original(self) -> np.ndarray:
        """The inverse of ``original``: int64 ``[nodes]``, new id by original id."""
        return _inverse(self.original)


def write_partitioned(
    graph: Graph,
    assignment: np.ndarray,
    folder: str | os.PathLike,
    *,
    method: str,
    settings: Mapping[str, Any],
    fingerprint: str,
    progress: Progress | None = None,
) -> PartitionedGraph:
    """Write ``graph`` cut into parts, and map the result.

    Holds, besides the graph, two int64 per node and chunks of fixed size; features are never copied as a whole.

    Args:
        graph: the graph. assignment: integer ``[nodes]``, the part of each node; every part 0..max has one.
        folder: must not exist, or be empty.
        method, settings, fingerprint: written to ``meta.json``; what :meth:`PartitionedGraph.expect` compares.
        progress: told what is being written.

    Raises:
        PartitionError: the folder exists or cannot be written, or the assignment has an empty part.
    """
    n = graph.num_nodes
    say = progress or (lambda _: None)
    sizes = np.bincount(assignment)
    if len(assignment) != n or not sizes.all():
        raise PartitionError(
            f"{graph.name}: expected a part for each of {n} nodes and no empty part; got {len(assignment)} nodes, "
            f"part sizes {sizes.tolist()[:20]}"
        )
    parts = len(sizes)
    kind = np.dtype(np.int32 if n < 2**31 else np.int64)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    original = np.argsort(assignment, kind="stable").astype(np.int64, copy=False)
    new_of = _inverse(original).astype(kind, copy=False)
    colptr = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.diff(graph.colptr)[original], out=colptr[1:])

    def of_edges(values: np.ndarray) -> Iterator[np.ndarray]:
        for begin, end in chunks(colptr, 0, n):
            nodes = original[begin:end]
            yield values[ranges(graph.colptr[nodes], graph.colptr[nodes + 1] - graph.colptr[nodes])]

    def of_nodes(values: np.ndarray) -> Iterator[np.ndarray]:
        step = max(1, CHUNK_BYTES // max(1, values[:1].nbytes))
        for begin in range(0, n, step):
            yield values[original[begin : begin + step]]

    checksums: dict[str, str] = {}
    with new_folder(Path(folder)) as place:

        def write(name: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
            dtype = np.dtype(dtype)
            if dtype.itemsize * int(np.prod(shape)) > CHUNK_BYTES:
                say(f"writing {name} of {graph.name} ({dtype.itemsize * int(np.prod(shape)) / 2**20:,.0f} MiB)")
            checksums[name] = write_array(place, name, dtype, shape, pieces)

        write("original", np.int64, (n,), [original])
        write("colptr", np.int64, (n + 1,), [colptr])
        write("row", kind, (graph.num_edges,), (new_of[piece] for piece in of_edges(graph.row)))
        if graph.edge_weight is not None:
            write("edge_weight", np.float32, (graph.num_edges,), of_edges(graph.edge_weight))
        write("x", np.float32, graph.x.shape, of_nodes(graph.x))
        write("y", graph.y.dtype, graph.y.shape, of_nodes(graph.y))
        for name in MASKS:
            write(name, np.bool_, (n,), of_nodes(getattr(graph, name)))
        if graph.node_ids is not None:
            write("node_ids", graph.node_ids.dtype, (n,), [graph.node_ids])

        row = map_array(place, "row")
        halos, cut = [], 0
        for p in range(parts):
            halo, crossing = halo_of(int(bounds[p]), int(bounds[p + 1]), colptr, row)
            halos.append(halo.astype(kind))
            cut += crossing
        halo_ptr = np.concatenate([[0], np.cumsum([len(halo) for halo in halos])]).astype(np.int64)
        write("halo", kind, (int(halo_ptr[-1]),), halos)
        per_part = {name: np.bincount(assignment[getattr(graph, name)], minlength=parts).tolist() for name in MASKS}
        meta = Meta(
            format_version=FORMAT_VERSION,
            graph=graph.name,
            fingerprint=fingerprint,
            method=method,
            settings=dict(settings),
            parts=parts,
            num_nodes=n,
            num_edges=graph.num_edges,
            feature_width=graph.x.shape[1],
            num_classes=graph.num_classes,
            multi_label=graph.multi_label,
            bounds=bounds.tolist(),
            halo_ptr=halo_ptr.tolist(),
            train=per_part["train_mask"],
            val=per_part["val_mask"],
            test=per_part["test_mask"],
            edge_hash=edge_hash(graph.colptr, graph.row),
            quality=measure(
                bounds, colptr, graph.train_mask[original], np.diff(halo_ptr).tolist(), cut, 4 * graph.x.shape[1]
            ),
            checksums=checksums,
            notes={str(k): str(v) for k, v in graph.notes.items()},
        )
        write_json(place, asdict(meta), "meta.json")
    return PartitionedGraph.open(folder)


def edge_hash(colptr: np.ndarray, row: np.ndarray, original: np.ndarray | None = None) -> int:
    """Order-free hash of the edges: the sum of splitmix64(splitmix64(source) + target) over them, modulo 2^64.

    Args:
        colptr, row: in-edges. original: original id of each node, where they are numbered differently.
    """
    total = 0
    for begin, end in chunks(colptr, 0, len(colptr) - 1):
        target = np.repeat(np.arange(begin, end), np.diff(colptr[begin : end + 1]))
        source = row[colptr[begin] : colptr[end]]
        if original is not None:
            source, target = original[source], original[target]
        with np.errstate(over="ignore"):
            total += int(np.sum(splitmix64(splitmix64(source) + target.astype(np.uint64)), dtype=np.uint64))
    return total % 2**64


def _parse_meta(folder: Path, value: dict[str, Any]) -> Meta:
    try:
        meta = Meta(**{**value, "quality": Quality(**value["quality"])})
        sound = (
            len(meta.bounds) == len(meta.halo_ptr) == meta.parts + 1
            and all(
                isinstance(number, int) for number in (*meta.bounds, *meta.halo_ptr, meta.num_nodes, meta.num_edges)
            )
            and meta.bounds[0] == 0
            and meta.bounds[-1] == meta.num_nodes
            and meta.bounds == sorted(meta.bounds)
            and meta.halo_ptr == sorted(meta.halo_ptr)
        )
    except (KeyError, TypeError) as error:
        raise PartitionError(
            f"{folder / 'meta.json'} is damaged ({error}); delete the folder and partition again"
        ) from None
    if not sound:
        raise PartitionError(
            f"{folder / 'meta.json'} contradicts itself (bounds, halo_ptr, counts); delete the folder and partition again"
        )
    return meta


def _inverse(permutation: np.ndarray) -> np.ndarray:
    inverse = np.empty(len(permutation), dtype=np.int64)
    inverse[permutation] = np.arange(len(permutation))
    return inverse


# One partition per graph, method, parts and settings, made once


def open_or_make(
    config: Config, parts: int, load: Callable[[], Graph], fingerprint: str, progress: Progress | None = None
) -> PartitionedGraph:
    """The partitioned graph a run needs: found, or made here.

    Who owns what: the folder is complete from the moment it has its name (see :mod:`array_folder`), so a reader needs no
    lock. Makers take a ``flock`` on ``.<folder>.lock`` beside it, the second waits and then opens what the first
    made; the kernel drops the lock of a maker that dies at any point, and the next one starts afresh, removing what the
    dead one left. Where the file system knows no locks two jobs may do the work twice: the rename that comes second
    fails, and that job opens the other's.

    Args:
        config: its ``dataset`` and ``partition``. parts: number of parts.
        load: called only when the partition has to be made.
        fingerprint: of the graph that ``load`` returns.

    Raises:
        PartitionError: ``partition.folder`` holds something else or is damaged, more parts than nodes, no room, or
            another process held the lock for longer than ``partition.timeout_s``.
    """
    partition = config.partition
    settings = partition_settings(partition)
    folder = partition_folder(config, parts, fingerprint)
    say = progress or (lambda _: None)

    def found() -> PartitionedGraph | None:
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        graph = PartitionedGraph.open(folder)
        graph.expect(fingerprint=fingerprint, method=partition.method, parts=parts, settings=settings)
        return graph

    if (graph := found()) is not None:
        return graph
    with locked(folder, partition.timeout_s, say):
        if (graph := found()) is not None:
            return graph
        source = load()
        what = f"cutting {source.name} ({source.num_nodes:,} nodes, {source.num_edges:,} edges) into {parts} parts"
        with ticking(f"{what} with {partition.method}", say):
            assignment = partition_nodes(source, partition.method, parts, partition.seed, partition.balance_edges)
        try:
            return write_partitioned(
                source,
                assignment,
                folder,
                method=partition.method,
                settings=settings,
                fingerprint=fingerprint,
                progress=progress,
            )
        except PartitionError:
            if (graph := found()) is not None:  # no locks here, and another job came first
                return graph
            raise


def partition_settings(partition: PartitionConfig) -> dict[str, Any]:
    """The settings that change the assignment beside method and parts."""
    return {"balance_edges": partition.balance_edges, "seed": partition.seed}


def partition_folder(config: Config, parts: int, fingerprint: str) -> Path:
    """``partition.folder``, or ``<cache>/partitions/<name>-<fingerprint>-<method>-<parts>-<settings hash>``."""
    if config.partition.folder:
        return Path(config.partition.folder).expanduser()
    import xxhash

    from gemini_gnn.graph.datasets import cache_folder

    rest = json.dumps([FORMAT_VERSION, partition_settings(config.partition)], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "_", config.dataset.name)
    key = f"{name}-{fingerprint}-{config.partition.method}-{parts}-{xxhash.xxh3_64_hexdigest(rest.encode())[:8]}"
    return cache_folder(config.dataset) / "partitions" / key
