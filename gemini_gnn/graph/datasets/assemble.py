"""From what a file held to a :class:`Graph`: the one path every data set takes, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from gemini_gnn.errors import DataError
from gemini_gnn.graph.datasets.features import degree_features, normalized, random_features
from gemini_gnn.graph.datasets.splits import choose_split
from gemini_gnn.graph.graph import Graph, from_edges
from gemini_gnn.graph.sparse import SparseRows, laid_out


@dataclass(frozen=True)
class RawGraph:
    """A graph as it was read: nothing checked, ordered, mirrored or normalised yet.

    Attributes:
        source, target: integer ``[edges]``, ids 0..num_nodes-1.
        weight: ``[edges]`` or None.
        x: ``[nodes, features]``, an array or SparseRows, or None; y: ``[nodes]``, ``[nodes, 1]`` or ``[nodes, classes]`` or None.
        masks: "train", "val", "test" -> bool ``[nodes]`` or ``[nodes, splits]``; empty without an official split.
        default_split: what ``dataset.split=default`` means here.
        symmetric: the edges are already stored in both directions, once each.
    """

    name: str
    num_nodes: int
    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None = None
    x: np.ndarray | SparseRows | None = None
    y: np.ndarray | None = None
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    node_ids: np.ndarray | None = None
    default_split: str = "random:0.6,0.2,0.2"
    symmetric: bool = False
    notes: dict[str, str] = field(default_factory=dict)


def assemble(
    raw: RawGraph,
    *,
    undirected: bool = False,
    normalize: str = "none",
    split: str = "default",
    seed: int = 0,
    featureless: str = "degree",
    layout: str = "auto",
    require_labels: bool = True,
) -> Graph:
    """The validated graph in canonical order.

    As stored, duplicate edges stay parallel edges and self-loops stay. ``undirected`` mirrors every edge and keeps one
    per direction, so that making an undirected graph undirected changes nothing; of merged weights the largest stays.

    Args:
        layout: "auto" | "dense" | "sparse", the form of the features (``features.layout``). Features that are made here,
            and those of ``normalize="zscore"``, are dense.
        require_labels: False accepts a graph without labels (``y`` is -1 and all masks are empty).

    Raises:
        DataError: see :meth:`Graph.validate`; ids out of range; labels missing or not class numbers.
        ConfigError: ``split`` or ``featureless`` ask for what this graph does not have.
    """
    n = raw.num_nodes
    if n < 1:
        raise DataError(f"{raw.name}: expected at least one node; got none")
    source, target, weight = checked_edges(raw)
    if undirected and not raw.symmetric:
        source, target, weight = mirrored(source, target, n, weight)
    if weight is not None:
        # Parallel edges keep the order they come in; ordered by weight it does not depend on the order of the lines.
        order = np.argsort(weight, kind="stable")
        source, target, weight = source[order], target[order], weight[order]
    colptr, row, weight = from_edges(source, target, n, weight)

    x: np.ndarray | SparseRows
    scaled = normalize
    if raw.x is not None:
        x, made = checked_features(raw, "dense" if normalize == "zscore" else layout), "as stored"
        if normalize == "zscore" and (isinstance(raw.x, SparseRows) or layout == "sparse"):
            scaled = "zscore, which makes the features dense"
    elif featureless == "degree":
        x, made = degree_features(colptr, row), "log in-degree, log out-degree, 1 (the graph has no features)"
    else:
        x, made = random_features(featureless, n, seed), f"{featureless} (the graph has no features)"
    x = normalized(x, normalize)
    if isinstance(x, SparseRows):
        x = laid_out(x, layout)  # features that were all 1 have values now, and may no longer be much smaller

    if raw.y is None and require_labels:
        raise DataError(
            f"{raw.name}: expected a class label per node to train on; the graph has none. "
            "Give dataset.labels (.npy or .csv `id,label`), `y` of the Data object, or y.npy in the folder"
        )
    y, num_classes = (np.full(n, -1, dtype=np.int64), 0) if raw.y is None else checked_labels(raw)
    labelled = y >= 0 if y.ndim == 1 else np.ones(n, dtype=bool)
    if raw.y is None:
        masks, chosen = {part: np.zeros(n, dtype=bool) for part in ("train", "val", "test")}, "none (no labels)"
    else:
        masks, chosen = choose_split(raw.name, raw.masks, split, raw.default_split, labelled, seed)
    for part, mask in masks.items():
        if mask.shape == (n,) and (bad := mask & ~labelled).any():
            raise DataError(
                f"{raw.name}: {int(bad.sum())} nodes of the {part} split have no label, the first is node "
                f"{shown_id(raw, int(np.argmax(bad)))}; leave them out of the split (predictions are made for all nodes)"
            )
    graph = Graph(
        name=raw.name,
        colptr=colptr,
        row=row,
        x=x,
        y=y,
        num_classes=num_classes,
        train_mask=masks["train"],
        val_mask=masks["val"],
        test_mask=masks["test"],
        edge_weight=weight,
        node_ids=raw.node_ids,
        notes={**raw.notes, "features": made, "normalize": scaled, "split": chosen},
    )
    graph.validate(labels=require_labels)
    return graph


def shown_id(raw: RawGraph, node: int) -> str:
    """The id the user knows ``node`` by."""
    return str(node if raw.node_ids is None else raw.node_ids[node])


def checked_edges(raw: RawGraph) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Sources, targets and weights, with all that :func:`from_edges` takes for granted.

    Raises:
        DataError: lengths differ, ids are not integers or outside 0..nodes-1, weights not positive and finite.
    """
    source, target, weight = np.asarray(raw.source), np.asarray(raw.target), raw.weight
    if source.shape != target.shape or source.ndim != 1:
        raise DataError(
            f"{raw.name}: expected one source and one target per edge; got shapes {source.shape} and {target.shape}"
        )
    for what, ids in (("source", source), ("target", target)):
        if ids.dtype.kind not in "iu":
            raise DataError(f"{raw.name}: expected integer {what} ids; got {ids.dtype}")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= raw.num_nodes):
            at = int(np.argmax((ids < 0) | (ids >= raw.num_nodes)))
            raise DataError(
                f"{raw.name}: expected {what} ids in 0..{raw.num_nodes - 1} ({raw.num_nodes} nodes); "
                f"edge {at} has {int(ids[at])}"
            )
    if weight is not None:
        weight = np.asarray(weight)
        weight = weight[:, 0] if weight.ndim == 2 and weight.shape[1] == 1 else weight
        if weight.shape != source.shape:
            raise DataError(f"{raw.name}: expected one weight per edge ({len(source)}); got {list(weight.shape)}")
        weight = weight.astype(np.float32, copy=False)
        good = np.isfinite(weight) & (weight > 0)
        if not good.all():
            at = int(np.argmin(good))
            raise DataError(
                f"{raw.name}: expected positive, finite edge weights; edge {at} ({shown_id(raw, int(source[at]))} -> "
                f"{shown_id(raw, int(target[at]))}) has {weight[at]}"
            )
    return source, target, weight


def mirrored(
    source: np.ndarray, target: np.ndarray, num_nodes: int, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Every edge in both directions, once each; of the weights that meet the largest stays (not the sum: a file that
    already lists both directions must not double)."""
    low, high = np.minimum(source, target).astype(np.int64), np.maximum(source, target).astype(np.int64)
    key = low * num_nodes + high
    if weight is None:
        key.sort()  # not np.unique: its hash table takes five times as long on 5 M random keys
        key, merged = key[np.append(key[1:] != key[:-1], True)[: len(key)]], None
    else:
        order = np.lexsort((weight, key))
        key, merged = key[order], weight[order]
        last = np.append(key[1:] != key[:-1], True)[: len(key)]
        key, merged = key[last], merged[last]
    low, high = key // num_nodes, key % num_nodes
    other = low != high  # a self-loop is its own mirror image
    both = None if merged is None else np.concatenate([merged, merged[other]])
    return np.concatenate([low, high[other]]), np.concatenate([high, low[other]]), both


def checked_features(raw: RawGraph, layout: str) -> np.ndarray | SparseRows:
    """``x`` as float32 ``[nodes, features]`` in the form that ``layout`` names (see :func:`assemble`).

    Raises:
        DataError: wrong shape, not numbers, NaN or infinite; columns of sparse rows out of range, unsorted or repeated.
    """
    given = raw.x if isinstance(raw.x, SparseRows) else np.asanyarray(raw.x)  # a memory-mapped array stays one
    if given.ndim != 2 or len(given) != raw.num_nodes:
        raise DataError(
            f"{raw.name}: expected one feature row per node, [{raw.num_nodes}, width]; got {list(given.shape)}"
        )
    if given.dtype.kind not in "fiub":
        raise DataError(f"{raw.name}: expected numbers as features; got {given.dtype}")
    name_of = partial(shown_id, raw)
    if isinstance(given, SparseRows):
        given.validate(f"{raw.name}: features", name_of)
    x = laid_out(given, layout)
    if isinstance(x, SparseRows):
        if x is not given:
            x.validate(f"{raw.name}: features", name_of)
        return x
    x = x if x.dtype == np.float32 else x.astype(np.float32)
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{raw.name}: features of {int((~finite).sum())} nodes are NaN or infinite; the first is node "
            f"{shown_id(raw, int(np.argmin(finite)))}. Replace them, or leave the column out"
        )
    return x


def checked_labels(raw: RawGraph) -> tuple[np.ndarray, int]:
    """``y`` as int64 ``[nodes]`` or uint8 ``[nodes, classes]``, and the number of classes.

    Raises:
        DataError: wrong shape, or not class numbers 0, 1, 2, ... (-1: unlabelled) / zeros and ones.
    """
    y = np.asarray(raw.y)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim not in (1, 2) or len(y) != raw.num_nodes:
        raise DataError(f"{raw.name}: expected one label row per node ({raw.num_nodes}); got {list(y.shape)}")
    if y.ndim == 2:
        if not np.isin(y, (0, 1)).all():
            raise DataError(f"{raw.name}: labels [nodes, classes] must be 0 or 1; got {np.unique(y)[:5].tolist()} ...")
        return y.astype(np.uint8), y.shape[1]
    if y.dtype.kind == "f":  # NaN is how float label files say "unlabelled"
        y = np.where(np.isnan(y), -1, y)
    if y.dtype.kind not in "fiub" or not np.all(y == np.floor(y)):
        raise DataError(f"{raw.name}: expected class numbers 0, 1, 2, ... as labels (-1: unlabelled); got {y.dtype}")
    y = y.astype(np.int64)
    if y.min() < -1:
        at = int(np.argmin(y))
        raise DataError(
            f"{raw.name}: labels must be 0, 1, 2, ... (-1: unlabelled); node {shown_id(raw, at)} has {int(y[at])}"
        )
    num_classes = int(y.max()) + 1
    if num_classes == 0:
        raise DataError(f"{raw.name}: every label is -1 (unlabelled); there is nothing to train on")
    if num_classes > max(int((y >= 0).sum()), 2):
        raise DataError(
            f"{raw.name}: labels run up to {num_classes - 1} but only {int((y >= 0).sum())} nodes have one; "
            f"expected class numbers 0, 1, 2, ... (node {shown_id(raw, int(np.argmax(y)))} has {int(y.max())})"
        )
    return y, num_classes
