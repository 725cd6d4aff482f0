"""One part of a partitioned graph: what one rank owns, and what it needs of the others."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.array_folder import (
    feature_arrays,
    map_array,
    map_features,
    new_folder,
    read_json,
    verify_arrays,
    write_array,
    write_json,
)
from gemini_gnn.graph.sparse import SparseRows

FORMAT_VERSION = 2  # of a part saved alone
READABLE = (1, 2)  # 1 knew only dense features


@dataclass(frozen=True)
class GraphShard:
    """One part: views into the arrays of a ``PartitionedGraph``, or into its own files after :meth:`load`.

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
    x: np.ndarray | SparseRows
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
        scalars["feature_width"] = self.x.shape[1]
        arrays |= feature_arrays(arrays.pop("x"))
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
        meta = read_json(folder, "shard.json", "a saved part", READABLE)
        try:
            names = list(meta["checksums"])
            scalars = {name: int(meta[name]) for name in ("part", "begin", "end", "num_classes")}
            width = int(meta["feature_width"]) if "x_ptr" in names else 0
        except (KeyError, TypeError, ValueError) as error:
            raise PartitionError(f"{folder / 'shard.json'} is damaged ({error!r}); save the part again") from None
        if verify:
            verify_arrays(folder, meta["checksums"])
        arrays: dict[str, Any] = {name: map_array(folder, name) for name in names if not name.startswith("x_")}
        if "x_ptr" in names:
            arrays["x"] = map_features(folder, names, scalars["end"] - scalars["begin"], width)
        missing = {f.name for f in fields(cls)} - set(scalars) - set(arrays) - {"edge_weight"}
        if missing:
            raise PartitionError(f"{folder}: expected arrays {sorted(missing)}; save the part again")
        return cls(**scalars, **{"edge_weight": None, **arrays})  # type: ignore[arg-type]
