"""Where data lies, what it hashes to, .npy and .npz files, and folders of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import DataError
from gemini_gnn.graph.datasets.assemble import RawGraph
from gemini_gnn.graph.sparse import SparseRows, from_csr

WINDOW_BYTES = 1 << 20
WINDOWS = 64


def cache_folder(config: DatasetConfig) -> Path:
    """``dataset.cache``, else ``$GEMINI_GNN_CACHE``, else ``~/.cache/gemini_gnn``. Everything we write goes here."""
    return Path(config.cache or os.environ.get("GEMINI_GNN_CACHE") or "~/.cache/gemini_gnn").expanduser()


def root_folder(config: DatasetConfig) -> Path:
    """``dataset.root``, else ``$GEMINI_GNN_DATA``, else ``<cache>/raw``. Never written to, unless it is the last."""
    chosen = config.root or os.environ.get("GEMINI_GNN_DATA")
    return Path(chosen).expanduser() if chosen else cache_folder(config) / "raw"


def user_file(config: DatasetConfig, setting: str) -> Path | None:
    """The file a setting names: as it stands, else within the data root.

    Raises:
        DataError: in neither place.
    """
    value = getattr(config, setting)
    if value is None:
        return None
    for path in (Path(value).expanduser(), root_folder(config) / value):
        if path.exists():
            return path
    raise DataError(f"dataset.{setting}: expected a file; there is no {value} here or in {root_folder(config)}")


def digest_of_files(paths: Iterable[Path], salt: str = "") -> str:
    """16 hex digits for names and contents, wherever the files lie. Cheap when asked again in the same process."""
    import xxhash

    hasher = xxhash.xxh3_64(salt.encode())
    for path in paths:
        about = path.stat()
        hasher.update(f"{path.name}\0{_digest(path, about.st_size, about.st_mtime_ns)}\0".encode())
    return hasher.hexdigest()


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Of a whole file up to 64 MiB; beyond, of its size and 64 windows of 1 MiB, evenly spread. An edit of a huge file that
    keeps its size and misses every window goes unseen; reading 50 GB before every start would be the alternative."""
    import xxhash

    hasher = xxhash.xxh3_64(str(size).encode())
    step = max(WINDOW_BYTES, (size - WINDOW_BYTES) // (WINDOWS - 1))
    with open(path, "rb") as file:
        for begin in range(0, size, step):
            file.seek(begin)
            hasher.update(file.read(WINDOW_BYTES))
    return hasher.hexdigest()


def load_npy(path: Path) -> np.ndarray:
    """A ``.npy`` file with at least one dimension, memory-mapped.

    Raises:
        DataError: absent, damaged, or holding Python objects (which would need pickle).
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a .npy file; there is none") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: expected a .npy file of numbers; got: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise DataError(f"{path}: expected a .npy array with one row per node or edge; got {type(array).__name__}")
    return array


def load_npz(path: Path) -> SparseRows:
    """The matrix in an ``.npz`` of ``scipy.sparse.save_npz``, in memory.

    Raises:
        DataError: absent, damaged, or holding something else; Python objects would need pickle, which SciPy refuses.
    """
    import zipfile

    import scipy.sparse

    try:
        return from_scipy(scipy.sparse.load_npz(path))
    except FileNotFoundError:
        raise DataError(f"{path}: expected an .npz file; there is none") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected the .npz of scipy.sparse.save_npz(path, matrix); got: {error}") from None


def from_scipy(matrix: Any) -> SparseRows:
    """A ``scipy.sparse`` matrix or array ``[rows, width]``: its columns unchecked, and those of a row not summed.

    Raises:
        ValueError: one dimension, or indices that contradict the matrix.
    """
    if matrix.ndim != 2:
        raise ValueError(f"{matrix.ndim} dimensions")
    rows, width = matrix.shape
    if matrix.format == "csr":
        return from_csr(matrix.indptr, matrix.indices, matrix.data, width)
    if matrix.format in ("csc", "bsr"):
        matrix.check_format(full_check=True)  # SciPy converts without looking where an index points
    matrix = matrix.tocoo()
    order = np.lexsort((matrix.col, matrix.row))  # tocsr() would sum what is there twice
    ptr = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(matrix.row, minlength=rows), out=ptr[1:])
    return from_csr(ptr, matrix.col[order], matrix.data[order], width)


def read_folder(
    folder: Path,
    name: str,
    *,
    default_split: str = "random:0.6,0.2,0.2",
    symmetric: bool = False,
    notes: dict[str, str] | None = None,
) -> RawGraph:
    """A folder of ``.npy``: ``edge_index`` ``[2, edges]`` (or ``source`` and ``target``), and what there is of
    ``edge_weight, x, y, train_mask, val_mask, test_mask, node_ids``. Sparse features are ``x.npz`` (:func:`load_npz`).

    Raises:
        DataError: no edges, or no way to tell how many nodes there are.
    """
    if not folder.is_dir():
        found = "this is a file; an edge list is read by dataset=edge_list" if folder.exists() else "there is none"
        raise DataError(f"{folder}: expected a folder of .npy files; {found}")
    array = {path.stem: load_npy(path) for path in sorted(folder.glob("*.npy"))}
    known = {"edge_index", "source", "target", "edge_weight", "x", "y", "node_ids"}
    known |= {"train_mask", "val_mask", "test_mask"}
    if unknown := set(array) - known | {path.name for path in folder.glob("*.npz")} - {"x.npz"}:
        raise DataError(
            f"{folder}: expected only {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}; rename or remove them"
        )
    x: np.ndarray | SparseRows | None = array.get("x")
    if (folder / "x.npz").exists():
        if x is not None:
            raise DataError(f"{folder}: expected x.npy or x.npz; got both; remove one")
        x = load_npz(folder / "x.npz")
    if "edge_index" in array:
        edges = array["edge_index"]
        if edges.ndim != 2 or edges.shape[0] != 2:
            hint = "; save it transposed" if edges.ndim == 2 and edges.shape[1] == 2 else ""
            raise DataError(f"{folder}/edge_index.npy: expected [2, edges]; got {list(edges.shape)}{hint}")
        source, target = edges
    elif "source" in array and "target" in array:
        source, target = array["source"], array["target"]
    else:
        raise DataError(f"{folder}: expected edge_index.npy [2, edges], or source.npy and target.npy; there is neither")
    rows = next((len(found) for found in (x, array.get("y"), array.get("node_ids")) if found is not None), None)
    if rows is None:
        rows = max((int(ids.max()) + 1 for ids in (source, target) if len(ids)), default=0)
    return RawGraph(
        name=name,
        num_nodes=rows,
        source=source,
        target=target,
        weight=array.get("edge_weight"),
        x=x,
        y=array.get("y"),
        masks={part: array[f"{part}_mask"] for part in ("train", "val", "test") if f"{part}_mask" in array},
        node_ids=array.get("node_ids"),
        default_split=default_split,
        symmetric=symmetric,
        notes=notes or {"folder": str(folder)},
    )
