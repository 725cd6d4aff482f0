"""Graphs that are already in Python (PyG, NetworkX, .npy), what they share with all others, and launch/prepare.py."""

import subprocess
import sys
from pathlib import Path

import networkx
import numpy as np
import pytest

from gemini_gnn.compose import CONFIGS, compose
from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.graph.datasets import fingerprint, from_folder, from_networkx, from_pyg, load_dataset
from gemini_gnn.graph.datasets.export import export_edges, summary
from gemini_gnn.graph.datasets.features import normalized

ROOT = Path(__file__).parents[3]


def edges_of(graph):
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))
    return list(zip(graph.row.tolist(), target.tolist(), strict=True))


@pytest.fixture
def folder(tmp_path):
    """A directed triangle with a tail, in the layout of ``from_folder``."""
    place = tmp_path / "mine"
    place.mkdir()
    arrays = {
        "edge_index": np.array([[0, 1, 2, 3], [1, 2, 0, 0]]),
        "x": np.arange(8.0).reshape(4, 2),
        "y": np.array([0, 1, 0, 1]),
        "train_mask": np.array([1, 1, 0, 0], dtype=bool),
        "val_mask": np.array([0, 0, 1, 0], dtype=bool),
        "test_mask": np.array([0, 0, 0, 1], dtype=bool),
    }
    for name, array in arrays.items():
        np.save(place / f"{name}.npy", array)
    return place


def test_importing_stays_light():
    code = (
        "import sys, gemini_gnn.graph.datasets; "
        "print([m for m in ('torch', 'torch_geometric', 'pandas', 'scipy', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_folder(folder):
    graph = from_folder(folder)
    assert graph.name == "mine" and edges_of(graph) == [(2, 0), (3, 0), (0, 1), (1, 2)]
    assert graph.x.dtype == np.float32 and graph.train_mask.tolist() == [True, True, False, False]
    through_config = load_dataset(DatasetConfig(name="folder", path=str(folder)))
    assert edges_of(through_config) == edges_of(graph)
    before = fingerprint(DatasetConfig(name="folder", path=str(folder)))
    np.save(folder / "y.npy", np.array([0, 1, 1, 1]))
    assert fingerprint(DatasetConfig(name="folder", path=str(folder))) != before


def test_folder_with_source_target_weights_ids_and_numbered_splits(folder):
    (folder / "edge_index.npy").unlink()
    np.save(folder / "source.npy", np.array([0, 3], dtype=np.int32))
    np.save(folder / "target.npy", np.array([1, 1], dtype=np.int32))
    np.save(folder / "edge_weight.npy", np.array([0.5, 2.0]))
    np.save(folder / "node_ids.npy", np.array(["a", "b", "c", "d"]))
    np.save(folder / "train_mask.npy", np.eye(4, 2, dtype=bool))
    graph = from_folder(folder, split="1")
    assert edges_of(graph) == [(0, 1), (3, 1)] and graph.edge_weight.tolist() == [0.5, 2.0]
    assert np.flatnonzero(graph.train_mask).tolist() == [1] and graph.node_ids.tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "name, array, wanted",
    [
        ("edge_index", np.array([[0, 1], [1, 4]]), r"target ids in 0\.\.3 \(4 nodes\); edge 1 has 4"),
        ("edge_index", np.array([[0, -1], [1, 2]]), r"source ids in 0\.\.3 \(4 nodes\); edge 1 has -1"),
        ("edge_index", np.array([[0, 1, 2]]), r"edge_index\.npy: expected \[2, edges\]; got \[1, 3\]"),
        ("edge_index", np.array([[0.0, 1], [1, 2]]), "expected integer source ids; got float64"),
        ("edge_weight", np.array([1.0, -1, 1, 1]), r"positive, finite edge weights; edge 1 \(1 -> 2\) has -1"),
        ("edge_weight", np.ones(3), r"expected one weight per edge \(4\); got \[3\]"),
        ("y", np.array([0, 1, 0]), r"expected one label row per node \(4\); got \[3\]"),
        ("train_mask", np.ones(3, dtype=bool), r"expected train_mask with one entry per node \(4\); got \[3\]"),
        ("train_mask", np.zeros(4, dtype=bool), "the training split is empty"),
        ("train_mask", np.array([0, 1, 2, 3]), "expected train_mask to hold true or false"),
        ("labels", np.ones(4), "expected only .* got labels; rename"),
    ],
)
def test_folder_with_a_wrong_array(folder, name, array, wanted):
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(DataError, match=wanted):
        from_folder(folder)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match=r"expected a folder of \.npy files"):
        from_folder(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"expected edge_index\.npy"):
        from_folder(tmp_path)


def test_pyg_data():
    import torch
    from torch_geometric.data import Data, HeteroData

    data = Data(
        x=torch.arange(6.0).reshape(3, 2),
        edge_index=torch.tensor([[0, 1, 0], [1, 2, 1]]),
        y=torch.tensor([[0], [1], [-1]]),
        train_mask=torch.tensor([True, True, False]),
        edge_weight=torch.tensor([2.0, 1.0, 1.0]),
    )
    graph = from_pyg(data, name="mine")
    assert edges_of(graph) == [(0, 1), (0, 1), (1, 2)] and graph.edge_weight.tolist() == [1, 2, 1]
    assert graph.y.tolist() == [0, 1, -1] and graph.num_classes == 2 and not graph.val_mask.any()
    undirected = from_pyg(data, undirected=True, normalize="l1")
    assert edges_of(undirected) == [(1, 0), (0, 1), (2, 1), (1, 2)] and undirected.edge_weight.tolist() == [2, 2, 1, 1]
    assert np.allclose(undirected.x.sum(axis=1), 1)
    bare = from_pyg(Data(edge_index=data.edge_index, num_nodes=5), require_labels=False, featureless="random:3")
    assert bare.num_nodes == 5 and bare.x.shape == (5, 3)
    for wrong in (HeteroData(), Data(x=data.x)):
        with pytest.raises(DataError, match="expected a homogeneous PyG Data with edge_index"):
            from_pyg(wrong)


def test_networkx():
    g = networkx.Graph()
    for node, label in (("b", 0), ("a", 1), ("c", None)):
        g.add_node(node, x=[float(ord(node)), 1.0], **({} if label is None else {"y": label}))
    g.nodes["b"]["split"] = g.nodes["a"]["split"] = "train"
    g.add_edge("b", "a", weight=2)
    g.add_edge("a", "c", weight=3)
    g.add_edge("c", "c", weight=4)
    graph = from_networkx(g)
    assert graph.node_ids.tolist() == ["b", "a", "c"] and graph.x[:, 0].tolist() == [98, 97, 99]
    assert edges_of(graph) == [(1, 0), (0, 1), (2, 1), (1, 2), (2, 2)], "a self-loop once, all others both ways"
    assert graph.edge_weight.tolist() == [2, 2, 3, 3, 4] and graph.y.tolist() == [0, 1, -1]
    assert graph.train_mask.tolist() == [True, True, False]

    directed = networkx.MultiDiGraph([(0, 1), (0, 1), (2, 1)])
    networkx.set_node_attributes(directed, {0: 0, 1: 1, 2: 0}, "class")
    graph = from_networkx(directed, label="class", split="random:1,0,0")
    assert edges_of(graph) == [(0, 1), (0, 1), (2, 1)] and graph.node_ids is None and graph.x.shape == (3, 3)


def test_networkx_with_gaps():
    g = networkx.path_graph(3)
    with pytest.raises(DataError, match="expected a class label"):
        from_networkx(g)
    g.nodes[1]["x"] = [1.0]
    with pytest.raises(DataError, match="expected 'x' on all 3 nodes or on none; 1 have it, 0 has not"):
        from_networkx(g)
    networkx.set_node_attributes(g, {0: [1.0], 1: [1.0, 2.0], 2: [3.0]}, "x")
    with pytest.raises(DataError, match="number sequences of one length"):
        from_networkx(g)
    g.edges[0, 1]["weight"] = 1.0
    with pytest.raises(DataError, match="expected 'weight' on all 2 edges or on none; 1 have it"):
        from_networkx(g)


def test_normalising():
    x = np.array([[3, -4], [0, 0], [1, 0]], dtype=np.float32)
    assert normalized(x, "none") is x
    assert np.allclose(normalized(x, "l1"), [[3 / 7, -4 / 7], [0, 0], [1, 0]])
    assert np.allclose(normalized(x, "l2"), [[0.6, -0.8], [0, 0], [1, 0]])
    z = normalized(np.hstack([x, np.full((3, 1), 0.1, np.float32)]), "zscore")
    assert np.allclose(z[:, :2].mean(axis=0), 0, atol=1e-6) and np.allclose(z[:, :2].std(axis=0), 1, atol=1e-6)
    assert (z[:, 2] == 0).all(), "a constant column"
    assert all(normalized(x, how).dtype == np.float32 for how in ("l1", "l2", "zscore"))


def test_names():
    with pytest.raises(
        ConfigError, match=r"dataset\.name: expected one of blocks, .*got 'coar' \(did you mean cora\?\)"
    ):
        load_dataset(DatasetConfig(name="coar"))
    with pytest.raises(
        ConfigError, match=r"dataset\.path: expected its default None, because dataset\.name=cora does not"
    ):
        fingerprint(DatasetConfig(name="Cora", path="x.csv"))


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONFIGS / "dataset").glob("*.yaml")))
def test_every_config_of_the_group_is_accepted(option, tmp_path):
    """All of them compose; all that need no files load."""
    from gemini_gnn.graph.datasets import checked

    config = compose([f"dataset={option}"]).dataset
    if config.name == "partitioned":
        return
    checked(config)
    if option in ("sbm", "erdos_renyi", "barabasi_albert", "powerlaw", "blocks"):
        load_dataset(compose([f"dataset={option}", "dataset.nodes=500"]).dataset)


def test_export_and_read_back(tmp_path):
    g = networkx.DiGraph()
    g.add_weighted_edges_from([("a", "b", 0.1), ("b, junior", "a", 2.5), ("a", "a", 3)])
    networkx.set_node_attributes(g, {"a": 0, "b": 1, "b, junior": 0}, "y")
    graph = from_networkx(g)
    for name in ("edges.csv", "edges.csv.gz"):
        export_edges(graph, tmp_path / name)
        config = DatasetConfig(name="edge_list", path=str(tmp_path / name), ids="str")
        back = load_dataset(config, require_labels=False)

        def named(g):
            return sorted((str(g.node_ids[u]), str(g.node_ids[v])) for u, v in edges_of(g))

        assert named(back) == named(graph)
        assert sorted(back.edge_weight.tolist()) == sorted(graph.edge_weight.tolist())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edges.csv", "edges.csv.gz"]
    with pytest.raises(DataError, match="cannot write"):
        export_edges(graph, tmp_path / "missing" / "edges.csv")
    assert summary(graph)["homophily"] == "0.667"


def test_prepare(folder, tmp_path):
    def prepare(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "launch" / "prepare.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = prepare("dataset=folder", f"dataset.path={folder}", f"+export={tmp_path / 'edges.csv'}")
    assert done.returncode == 0, done.stderr
    assert "train / val / test" in done.stdout and "2 / 1 / 1" in done.stdout
    assert (tmp_path / "edges.csv").read_text() == "2,0\n3,0\n0,1\n1,2\n"
    wrong = prepare("dataset=folder", f"dataset.path={tmp_path / 'none'}")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: dataset.path: expected a file")
    assert "Traceback" not in wrong.stderr
