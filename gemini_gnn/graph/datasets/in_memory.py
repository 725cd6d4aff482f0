"""Graphs that are already in Python: PyG Data, NetworkX, a folder of .npy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemini_gnn.errors import DataError
from gemini_gnn.graph.datasets.assemble import RawGraph, assemble
from gemini_gnn.graph.datasets.files import from_scipy, read_folder
from gemini_gnn.graph.datasets.splits import PARTS
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.sparse import SparseRows, from_csr

if TYPE_CHECKING:
    import networkx
    import torch
    import torch_geometric.data


def from_pyg(data: torch_geometric.data.Data, name: str = "data", **settings: Any) -> Graph:
    """A :class:`Graph` from a homogeneous PyG ``Data``: ``edge_index``, and what it has of ``x``, ``y``, ``edge_weight``
    and the three masks. ``x`` may be sparse: of torch (CSR, coalesced COO), a SparseTensor, or of SciPy.

    Args:
        settings: ``undirected, normalize, split, seed, featureless, layout, require_labels`` as in :func:`assemble`.

    Raises:
        DataError: no ``edge_index``, several node types, another sparse array, or what :func:`assemble` refuses.
    """
    import torch

    edge_index = getattr(data, "edge_index", None)
    if edge_index is None or not hasattr(edge_index, "numpy"):
        raise DataError(
            f"{name}: expected a homogeneous PyG Data with edge_index [2, edges]; got {type(data).__name__}"
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise DataError(f"{name}: expected edge_index [2, edges]; got {list(edge_index.shape)}")

    def array(key: str) -> np.ndarray | None:
        value = getattr(data, key, None)
        if value is None:
            return None
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            got = value.layout if isinstance(value, torch.Tensor) else type(value).__name__
            dense = f"torch.as_tensor(data.{key})"
            for method in ("toarray()", "to_dense()"):  # of SciPy; of torch and torch-sparse
                if hasattr(value, method[:-2]):
                    dense = f"torch.as_tensor(data.{key}.{method})"
            raise DataError(f"{name}: expected {key} as a dense tensor; got {got}. Give `data.{key} = {dense}`")
        return numpy_of(value)

    x = sparse_of(name, getattr(data, "x", None))
    # Where nobody said it, PyG takes the rows of x for the nodes; but it does not know those of SciPy's matrices.
    num_nodes = int(data.num_nodes) if x is None or "num_nodes" in data else len(x)
    source, target = edge_index.detach().cpu().numpy()
    masks = {part: mask for part in PARTS if (mask := array(f"{part}_mask")) is not None}
    return assemble(
        RawGraph(
            name=name,
            num_nodes=num_nodes,
            source=source,
            target=target,
            weight=array("edge_weight"),
            x=array("x") if x is None else x,
            y=array("y"),
            masks=masks,
            notes={"made": "from a PyG Data"},
        ),
        **settings,
    )


def sparse_of(name: str, x: Any) -> SparseRows | None:
    """The rows of a sparse ``x``; None where it is not sparse, or of a kind that has no rows.

    Raises:
        DataError: a torch tensor that is not coalesced, or a matrix of SciPy that contradicts itself.
    """
    import scipy.sparse
    import torch

    if scipy.sparse.issparse(x):
        try:
            return from_scipy(x)
        except ValueError as error:
            raise DataError(f"{name}: expected x as a matrix [nodes, features]; got {error}") from None
    if hasattr(x, "csr"):  # SparseTensor of torch-sparse, which need not be installed
        ptr, index, value = x.csr()
        return from_csr(numpy_of(ptr), numpy_of(index), None if value is None else numpy_of(value), int(x.size(1)))
    if not isinstance(x, torch.Tensor) or x.ndim != 2 or x.layout not in (torch.sparse_coo, torch.sparse_csr):
        return None
    if x.layout is torch.sparse_coo:
        if not x.is_coalesced():
            raise DataError(
                f"{name}: expected every feature of x once; got a sparse tensor that is not coalesced. Give "
                "`data.x = data.x.coalesce()`, which adds up what is there twice"
            )
        x = x.to_sparse_csr()
    return from_csr(numpy_of(x.crow_indices()), numpy_of(x.col_indices()), numpy_of(x.values()), x.shape[1])


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    if str(tensor.dtype) == "torch.bfloat16":  # which numpy does not have
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def from_networkx(
    graph: networkx.Graph,
    name: str = "networkx",
    *,
    features: str = "x",
    label: str = "y",
    split: str = "split",
    weight: str = "weight",
    **settings: Any,
) -> Graph:
    """A :class:`Graph` from a NetworkX graph; an undirected one is stored in both directions.

    Nodes keep their order; their names become ``node_ids`` unless they are 0, 1, 2, ... already.

    Args:
        features, label: node attributes (a sequence of numbers; a class number). Features must be on all nodes or none,
            a node without label is unlabelled.
        split: node attribute "train" | "val" | "test"; without it the split is drawn.
        weight: edge attribute, on all edges or none.
        settings: ``undirected, normalize, seed, featureless, layout, require_labels`` as in :func:`assemble`; ``split_by`` is
            its ``split``.

    Raises:
        DataError: attributes on some but not all, or what :func:`assemble` refuses.
    """
    nodes = list(graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    edges = [(number[u], number[v], data.get(weight)) for u, v, data in graph.edges(data=True)]
    pairs = np.array([edge[:2] for edge in edges], dtype=np.int64).reshape(-1, 2)
    given = [edge[2] for edge in edges if edge[2] is not None]
    if len(given) not in (0, len(edges)):
        raise DataError(f"{name}: expected {weight!r} on all {len(edges)} edges or on none; {len(given)} have it")
    source, target, weights = pairs[:, 0], pairs[:, 1], np.array(given, dtype=np.float64) if given else None
    if not graph.is_directed():
        back = source != target
        source, target = np.concatenate([source, target[back]]), np.concatenate([target, source[back]])
        weights = None if weights is None else np.concatenate([weights, weights[back]])

    attributes = [graph.nodes[node] for node in nodes]
    rows = [a[features] for a in attributes if features in a]
    if len(rows) not in (0, len(nodes)):
        without = next(node for node, a in zip(nodes, attributes, strict=True) if features not in a)
        raise DataError(
            f"{name}: expected {features!r} on all {len(nodes)} nodes or on none; {len(rows)} have it, {without!r} has not"
        )
    try:
        x = np.array(rows, dtype=np.float32) if rows else None
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: expected {features!r} to be number sequences of one length; {error}") from None
    labelled = any(label in a for a in attributes)
    parts = np.array([str(a.get(split, "")) for a in attributes])
    if unknown := set(parts.tolist()) - {*PARTS, ""}:
        raise DataError(
            f"{name}: expected node attribute {split!r} to be train, val or test; got {sorted(unknown)[:3]}"
        )
    if "split_by" in settings:
        settings["split"] = settings.pop("split_by")
    return assemble(
        RawGraph(
            name=name,
            num_nodes=len(nodes),
            source=source,
            target=target,
            weight=weights,
            x=x.reshape(len(nodes), -1) if x is not None else None,
            y=np.array([a.get(label, -1) for a in attributes]) if labelled else None,
            masks={part: parts == part for part in PARTS} if (parts != "").any() else {},
            node_ids=ids_of(nodes),
            notes={"made": "from a NetworkX graph"},
        ),
        **settings,
    )


def ids_of(nodes: list[Any]) -> np.ndarray | None:
    """Node names as int64 or unicode ``[nodes]``; None where they are 0, 1, 2, ..."""
    if all(isinstance(node, int) for node in nodes):
        ids = np.array(nodes, dtype=np.int64)
        return None if np.array_equal(ids, np.arange(len(ids))) else ids
    return np.array([str(node) for node in nodes])


def from_folder(path: str | Path, name: str | None = None, **settings: Any) -> Graph:
    """A :class:`Graph` from a folder of ``.npy`` files: ``edge_index`` ``[2, edges]`` (or ``source`` and ``target``), and
    what there is of ``edge_weight, x, y, train_mask, val_mask, test_mask, node_ids``. Sparse features are ``x.npz``, as
    ``scipy.sparse.save_npz`` writes it.

    Args:
        settings: ``undirected, normalize, split, seed, featureless, layout, require_labels`` as in :func:`assemble`.

    Raises:
        DataError: no such folder, an unknown or damaged file, or what :func:`assemble` refuses.
    """
    folder = Path(path).expanduser()
    return assemble(read_folder(folder, name or folder.resolve().name), **settings)
