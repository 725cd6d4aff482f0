"""Small files in the formats that published data sets come in, written from scratch for tests.

Each writer takes the data root, writes what a download would have left there, and returns the truth: a dict of arrays.
"""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import scipy.sparse as sp


def one_hot(y: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.int32)[y]


def planetoid(root: Path, name: str, without_test: int | None = None) -> dict[str, np.ndarray]:
    """``ind.<name>.*``: 20 training nodes, 500 to validate (fixed by the loader), 40 to test; a ring with a chord.

    Args:
        without_test: a node in the test range that has no row (CiteSeer has such); it gets zeros and label 0.
    """
    rng = np.random.default_rng(0)
    n, train, labelled, classes, width = 600, 20, 560, 3, 5
    x = (rng.random((n, width)) < 0.4).astype(np.float32)
    y = rng.integers(classes, size=n)
    test = np.array([node for node in rng.permutation(np.arange(labelled, n)) if node != without_test])
    if without_test is not None:
        x[without_test], y[without_test] = 0, 0
    graph = {v: [(v - 1) % n, (v + 1) % n] for v in range(n)}
    graph[0] = [*graph[0], 0, 300]  # a self-loop and a chord
    graph[300] = [*graph[300], 0]
    folder = root / "planetoid" / name / "raw"
    folder.mkdir(parents=True)
    parts = {
        "x": sp.csr_matrix(x[:train]),
        "tx": sp.csr_matrix(x[test]),
        "allx": sp.csr_matrix(x[:labelled]),
        "y": one_hot(y[:train], classes),
        "ty": one_hot(y[test], classes),
        "ally": one_hot(y[:labelled], classes),
        "graph": graph,
    }
    for part, value in parts.items():
        (folder / f"ind.{name.lower()}.{part}").write_bytes(pickle.dumps(value, protocol=2))
    (folder / f"ind.{name.lower()}.test.index").write_text("".join(f"{node}\n" for node in test))
    pairs = {(u, v) for u, others in graph.items() for v in others if u != v}
    return {"x": x, "y": y, "edges": np.array(sorted(pairs)), "train": np.arange(train), "test": np.sort(test)}


def wikipedia(root: Path, name: str) -> dict[str, np.ndarray]:
    """geom-gcn's files: tab-separated nodes and directed links, ten splits."""
    rng = np.random.default_rng(1)
    n, classes, width = 30, 5, 4
    x, y = rng.integers(2, size=(n, width)), np.arange(n) % classes
    edges = np.unique(rng.integers(n, size=(80, 2)), axis=0)
    folder = root / "wikipedia_network" / name / "geom_gcn" / "raw"
    folder.mkdir(parents=True)
    rows = [f"{i}\t{','.join(map(str, x[i]))}\t{y[i]}" for i in range(n)]
    (folder / "out1_node_feature_label.txt").write_text("\n".join(["node_id\tfeature\tlabel", *rows, ""]))
    lines = [f"{u}\t{v}" for u, v in rng.permutation(edges)]
    (folder / "out1_graph_edges.txt").write_text("\n".join(["node_id\tnode_id", *lines, ""]))
    for i in range(10):
        part = (np.arange(n) + i) % 5
        masks = {"train_mask": part < 3, "val_mask": part == 3, "test_mask": part == 4}
        np.savez(folder / f"{name}_split_0.6_0.2_{i}.npz", **{k: m.astype(np.uint8) for k, m in masks.items()})
    return {"x": x.astype(np.float32), "y": y, "edges": edges}


def wikics(root: Path) -> dict[str, np.ndarray]:
    """``data.json``: links as lists per node, 20 splits of training and validation nodes, one test set."""
    rng = np.random.default_rng(2)
    n, width = 25, 3
    x, y = rng.standard_normal((n, width)).round(3), np.arange(n) % 4
    links = [sorted(set(rng.integers(n, size=3).tolist()) - {i}) for i in range(n)]
    part = np.arange(n) % 5
    masks = {
        "train_masks": [((np.arange(n) + i) % 20 < 5) & (part != 0) for i in range(20)],
        "val_masks": [((np.arange(n) + i) % 20 == 7) & (part != 0) for i in range(20)],
        "stopping_masks": [((np.arange(n) + i) % 20 == 9) & (part != 0) for i in range(20)],
    }
    folder = root / "wikics" / "raw"
    folder.mkdir(parents=True)
    content = {key: [mask.tolist() for mask in several] for key, several in masks.items()}
    content |= {"features": x.tolist(), "labels": y.tolist(), "links": links, "test_mask": (part == 0).tolist()}
    (folder / "data.json").write_text(json.dumps(content))
    edges = {(u, v) for u, others in enumerate(links) for v in others}
    both = np.array(sorted(edges | {(v, u) for u, v in edges}))
    return {"x": x.astype(np.float32), "y": y, "edges": both, "train": np.array(masks["train_masks"]).T}


def shchur(path: Path) -> dict[str, np.ndarray]:
    """The .npz of gnn-benchmark (Amazon, Coauthor): CSR adjacency in one direction and CSR counts as features."""
    rng = np.random.default_rng(3)
    n, width = 40, 6
    x = sp.csr_matrix(rng.integers(3, size=(n, width)).astype(np.float32))
    y = np.arange(n) % 4
    adjacency = sp.csr_matrix((np.ones(60, np.float32), rng.integers(n, size=(2, 60))), shape=(n, n))
    adjacency.sum_duplicates()
    path.parent.mkdir(parents=True)
    np.savez(
        path,
        labels=y,
        **{f"attr_{k}": getattr(x, k) for k in ("data", "indices", "indptr", "shape")},
        **{f"adj_{k}": getattr(adjacency, k) for k in ("data", "indices", "indptr", "shape")},
    )
    u, v = adjacency.nonzero()
    edges = np.unique(np.array([(a, b) for a, b in zip([*u, *v], [*v, *u], strict=True) if a != b]), axis=0)
    return {"x": (x.toarray() > 0).astype(np.float32), "y": y, "edges": edges}


def ogb(root: Path, name: str, split: str) -> dict[str, np.ndarray]:
    """An unpacked OGB archive: ``raw/*.csv.gz`` and ``split/<kind>/*.csv.gz``, nothing else."""
    rng = np.random.default_rng(4)
    n, width = 20, 3
    x, y = rng.standard_normal((n, width)).round(4), np.arange(n) % 5
    edges = np.unique(rng.integers(n, size=(50, 2)), axis=0)
    raw, splits = root / "ogb" / name.replace("-", "_") / "raw", root / "ogb" / name.replace("-", "_") / "split" / split
    raw.mkdir(parents=True)
    splits.mkdir(parents=True)

    def write(path: Path, rows: np.ndarray) -> None:
        text = "".join(",".join(map(str, np.atleast_1d(row).tolist())) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0))

    write(raw / "edge.csv.gz", edges)
    write(raw / "node-feat.csv.gz", x)
    write(raw / "node-label.csv.gz", y)
    write(raw / "node_year.csv.gz", 2000 + y)
    write(raw / "num-node-list.csv.gz", np.array([n]))
    write(raw / "num-edge-list.csv.gz", np.array([len(edges)]))
    for part, nodes in (("train", range(12)), ("valid", range(12, 16)), ("test", range(16, 20))):
        write(splits / f"{part}.csv.gz", np.array(nodes))
    return {"x": x.astype(np.float32), "y": y, "edges": edges, "train": np.arange(12)}
