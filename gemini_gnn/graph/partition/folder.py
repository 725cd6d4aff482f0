"""The partitioned graph: a folder that a machine maps without reading it.

::

    meta.json                format version, graph, fingerprint, method, settings, counts, bounds [parts + 1],
                             halo_ptr [parts + 1], quality, checksum (xxh3_128 of the file) of every array
    original.npy             int64 [nodes]            new id -> original id
    colptr.npy               int64 [nodes + 1]        CSC of in-edges in new ids,
    row.npy                  int32 or int64 [edges]   within a column ascending by *original* id of the source
    edge_weight.npy          float32 [edges]          only for weighted graphs
    x.npy                    float32 [nodes, features]; or, of sparse features,
    x_ptr.npy                int64 [nodes + 1]        where the stored values of a node begin in the arrays below
    x_index.npy              int32 [stored]           their columns, ascending within a node
    x_value.npy              float32 [stored]         left out when every stored value is 1
    y.npy                    int64 [nodes] or uint8 [nodes, classes]
    train_mask.npy val_mask.npy test_mask.npy         bool [nodes]
    halo.npy                 int32 or int64           per part the remote in-neighbors of its nodes, new ids ascending,
                                                      cut by halo_ptr
    node_ids.npy             the user's ids by *original* id, where they are not 0..nodes-1
    held.json                only on machines that hold the features of some parts: see :mod:`held`

Glossary: *original id*, the position in the :class:`Graph`; *new id*, the position after sorting by (part, original id),
so that part p owns the new ids ``bounds[p]..bounds[p + 1] - 1``; *halo*, nodes that a part's nodes have as in-neighbors
and that another part owns.

A folder is written beside its place under another name, made durable, and renamed: a reader finds all of it or nothing.
No pickle: ``np.load(allow_pickle=False)`` and JSON.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.array_folder import Progress, map_features, map_shaped, read_json, ticking, verify_arrays
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.partition.assign import ranges
from gemini_gnn.graph.partition.held import DIVIDED, Held
from gemini_gnn.graph.partition.held import expect as expect_held
from gemini_gnn.graph.partition.held import read as read_held
from gemini_gnn.graph.partition.quality import Quality
from gemini_gnn.graph.partition.shard import GraphShard
from gemini_gnn.graph.sparse import SparseRows

FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 knew only dense features
MASKS = ("train_mask", "val_mask", "test_mask")


@dataclass(frozen=True)
class Meta:
    """The contents of ``meta.json``.

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
class PartitionedGraph:
    """A partitioned graph, its arrays mapped read-only; see the module's docstring for their shapes and order.

    Attributes:
        x: rows of parts that are not ``held`` read as 0, so rows are taken through :meth:`part`, which refuses them.
        held: which parts' features are here; None: all.
    """

    folder: Path
    meta: Meta
    bounds: np.ndarray
    original: np.ndarray
    colptr: np.ndarray
    row: np.ndarray
    edge_weight: np.ndarray | None
    x: np.ndarray | SparseRows
    y: np.ndarray
    train_mask: np.ndarray
    val_mask: np.ndarray
    test_mask: np.ndarray
    halo: np.ndarray
    halo_ptr: np.ndarray
    node_ids: np.ndarray | None
    held: Held | None = None

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
        """Map a folder that :mod:`gemini_gnn.graph.partition.write` made. Reads ``meta.json`` and the array headers only.

        Args:
            verify: also read every array and compare its checksum.

        Raises:
            PartitionError: missing, damaged, truncated, or of another format version.
        """
        folder = Path(folder)
        meta = _parse_meta(folder, read_json(folder, "meta.json", "a partitioned graph", READABLE))
        held = read_held(folder)
        if held is not None and held.fingerprint != meta.fingerprint:
            raise PartitionError(f"{folder}: held.json is of another graph; delete the folder and distribute it again")
        if verify:
            _verify(folder, meta, held)
        n, m = meta.num_nodes, meta.num_edges
        y_shape = (n, meta.num_classes) if meta.multi_label else (n,)
        shapes = {
            "original": (n,), "colptr": (n + 1,), "row": (m,), "edge_weight": (m,), "y": y_shape, "train_mask": (n,),
            "val_mask": (n,), "test_mask": (n,), "halo": (meta.halo_ptr[-1],), "node_ids": (n,),
        }  # fmt: skip
        x: np.ndarray | SparseRows = map_features(folder, meta.checksums, n, meta.feature_width)
        arrays: dict[str, np.ndarray | None] = {}
        for name, shape in shapes.items():
            if name in ("edge_weight", "node_ids") and name not in meta.checksums:
                arrays[name] = None
                continue
            arrays[name] = map_shaped(folder, name, shape)
        if int(arrays["colptr"][-1]) != m:  # type: ignore[index]
            raise PartitionError(f"{folder}/colptr.npy does not cover {m} edges; delete the folder and partition again")
        return cls(
            folder=folder,
            meta=meta,
            bounds=np.array(meta.bounds, dtype=np.int64),
            halo_ptr=np.array(meta.halo_ptr, dtype=np.int64),
            x=x,
            held=held,
            **arrays,  # type: ignore[arg-type]
        )

    def verify_checksums(self, progress: Progress | None = None, *, features: bool = True) -> None:
        """Read the arrays, as far as they are held, and compare their checksums with ``meta.json`` and ``held.json``.

        Args:
            progress: told now and then while it takes long.
            features: False leaves out ``x`` and ``x_value``: the largest arrays, and no kernel takes an address from them.
                ``x_ptr`` and ``x_index`` are addresses (a column is a row of the first weight matrix), so they are read.

        Raises:
            PartitionError: naming the array.
        """
        with ticking(f"reading {self.folder} to compare its checksums", progress or (lambda _: None)):
            _verify(self.folder, self.meta, self.held, () if features else ("x", "x_value"))

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
            named = {"parts": "number of parts", "graph": "graph (or other dataset settings)"}.get(what, what)
            raise PartitionError(
                f"{self.folder} was made for another {named}: expected {value}, got {found[what]}{name}; "
                "delete it, choose another partition.folder, or leave partition.folder unset"
            )

    def owner(self, ids: np.ndarray) -> np.ndarray:
        """The part of each new id: int64, of the shape of ``ids``."""
        return np.searchsorted(self.bounds, ids, side="right") - 1

    def part(self, p: int) -> GraphShard:
        """Part ``p`` as views.

        Raises:
            PartitionError: no such part, or its features are not held here.
        """
        if not 0 <= p < self.parts:
            raise PartitionError(f"{self.folder}: expected a part in 0..{self.parts - 1}; got {p}")
        expect_held(self.folder, self.held, [p])
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
        return inverse(self.original)

    def as_graph(self) -> Graph:
        """The graph it was made from, in the order of the original ids: a copy in memory.

        Raises:
            PartitionError: features of some parts are not held here.
        """
        expect_held(self.folder, self.held, range(self.parts))
        new = self.new_of_original()
        degree = np.diff(self.colptr)[new]
        colptr = np.zeros(self.num_nodes + 1, dtype=np.int64)
        np.cumsum(degree, out=colptr[1:])
        at = ranges(self.colptr[new], degree)  # columns ascend by original id already
        return Graph(
            name=self.meta.graph,
            colptr=colptr,
            row=self.original[self.row[at]].astype(self.row.dtype, copy=False),
            x=self.x[new],
            y=self.y[new],
            num_classes=self.num_classes,
            train_mask=self.train_mask[new],
            val_mask=self.val_mask[new],
            test_mask=self.test_mask[new],
            edge_weight=None if self.edge_weight is None else self.edge_weight[at],
            node_ids=self.node_ids,
            notes=dict(self.meta.notes),
        )


def _verify(folder: Path, meta: Meta, held: Held | None, without: Container[str] = ()) -> None:
    pieces = held.pieces if held else ()
    whole = {name: sum_ for name, sum_ in meta.checksums.items() if not (held and name in DIVIDED)}
    whole = {name: sum_ for name, sum_ in whole.items() if name not in without}
    verify_arrays(folder, whole, [piece for piece in pieces if piece[0] not in without])


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


def inverse(permutation: np.ndarray) -> np.ndarray:
    """int64 ``result[permutation[i]] = i``."""
    inverse = np.empty(len(permutation), dtype=np.int64)
    inverse[permutation] = np.arange(len(permutation))
    return inverse
