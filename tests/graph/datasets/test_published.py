"""Published data sets: files in their formats (written by data_files.py, and the real ones where present) -> Graph."""

import contextlib
import io
import os
import shutil
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import ConfigError, DataError, GeminiError
from gemini_gnn.graph.datasets import fingerprint, import_third_party, load_dataset, third_party
from gemini_gnn.graph.sparse import SparseRows, dense
from tests import data_files

DATA = os.environ.get("GEMINI_GNN_DATA", "")


@pytest.fixture
def config(tmp_path):
    return DatasetConfig(root=str(tmp_path / "data"), cache=str(tmp_path / "cache"))


@pytest.fixture
def in_process(monkeypatch):
    """The program that imports, called in this process: PyG is imported once for all tests, not once per test."""
    import torch

    def run_loader(data_set, root, out, download):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            mode = "download" if download else "offline"
            code = import_third_party.main(data_set.loader, data_set.argument, str(root), str(out), mode)
        return None if code == 0 else said.getvalue().strip().splitlines()[-1]

    monkeypatch.setattr(torch, "load", torch.load)  # what the program does to its own process is undone here
    monkeypatch.setitem(sys.modules, "outdated", None)
    monkeypatch.setattr(third_party, "run_loader", run_loader)


def edges_of(graph):
    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))
    return np.array(sorted(zip(graph.row.tolist(), target.tolist(), strict=True)))


def both_ways(edges):
    return np.unique(np.concatenate([edges, edges[:, ::-1]]), axis=0)


def tree(folder: Path):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_planetoid_through_its_own_process_from_a_read_only_root(config):
    truth = data_files.planetoid(Path(config.root), "Cora")
    folders = [p for p in [Path(config.root), *Path(config.root).rglob("*")] if p.is_dir()]
    before = tree(Path(config.root))
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        graph = load_dataset(replace(config, name="cora"))
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)
    assert tree(Path(config.root)) == before
    np.testing.assert_array_equal(graph.x, truth["x"])
    np.testing.assert_array_equal(graph.y, truth["y"])
    np.testing.assert_array_equal(edges_of(graph), truth["edges"])
    np.testing.assert_array_equal(np.flatnonzero(graph.train_mask), truth["train"])
    np.testing.assert_array_equal(np.flatnonzero(graph.test_mask), truth["test"])
    assert graph.val_mask.sum() == 500
    left = [p for p in Path(config.cache).rglob("*") if p.is_file()]
    assert {p.suffix for p in left} == {".npy", ".json", ".lock"}, "only plain arrays stay"
    assert not [p for p in Path(config.cache).rglob("*.tmp")]


def test_imported_once_then_read_without_the_files(config, in_process, monkeypatch):
    data_files.planetoid(Path(config.root), "PubMed")
    first = load_dataset(replace(config, name="pubmed"))
    identity = fingerprint(replace(config, name="pubmed"))

    def never(*_):
        raise AssertionError("imported a second time")

    monkeypatch.setattr(third_party, "run_loader", never)
    again = load_dataset(replace(config, name="PubMed"))
    np.testing.assert_array_equal(first.x, again.x)
    shutil.rmtree(config.root)
    assert load_dataset(replace(config, name="pubmed")).num_edges == first.num_edges
    assert fingerprint(replace(config, name="pubmed")) == identity


def test_other_files_are_another_graph(config, in_process):
    data_files.planetoid(Path(config.root), "Cora")
    cora = replace(config, name="cora")
    first, old = load_dataset(cora), fingerprint(cora)
    shutil.rmtree(config.root)
    data_files.planetoid(Path(config.root), "Cora", without_test=None)
    assert fingerprint(cora) == old, "the same contents at another time are the same graph"
    path = Path(config.root, "planetoid/Cora/raw/ind.cora.x")
    label = Path(config.root, "planetoid/Cora/raw/ind.cora.test.index")
    label.write_text("\n".join(reversed(label.read_text().split())) + "\n")
    assert path.exists() and fingerprint(cora) != old
    assert not np.array_equal(load_dataset(cora).x, first.x)


def test_citeseer_has_test_nodes_without_rows(config, in_process):
    truth = data_files.planetoid(Path(config.root), "CiteSeer", without_test=577)
    graph = load_dataset(replace(config, name="citeseer"))
    np.testing.assert_array_equal(graph.x, truth["x"])
    assert not graph.test_mask[577] and graph.test_mask.sum() == 39


@pytest.mark.parametrize("name", ["chameleon", "squirrel"])
def test_wikipedia_network(config, in_process, name):
    truth = data_files.wikipedia(Path(config.root), name)
    config = replace(config, name=name)
    stored = load_dataset(config)
    np.testing.assert_array_equal(edges_of(stored), truth["edges"])
    np.testing.assert_array_equal(stored.x, truth["x"])
    undirected = load_dataset(replace(config, undirected=True))
    np.testing.assert_array_equal(edges_of(undirected), both_ways(truth["edges"]))
    for split in (0, 7):
        graph = load_dataset(replace(config, split=str(split)))
        np.testing.assert_array_equal(graph.train_mask, (np.arange(30) + split) % 5 < 3)
        np.testing.assert_array_equal(graph.test_mask, (np.arange(30) + split) % 5 == 4)
    np.testing.assert_array_equal(stored.train_mask, np.arange(30) % 5 < 3)
    with pytest.raises(ConfigError, match=r"dataset.split: expected default or 0\.\.9 or random.*got '10'"):
        load_dataset(replace(config, split="10"))


def test_wikics(config, in_process):
    truth = data_files.wikics(Path(config.root))
    graph = load_dataset(replace(config, name="wikics", split="19"))
    np.testing.assert_array_equal(edges_of(graph), truth["edges"])
    np.testing.assert_array_equal(graph.train_mask, truth["train"][:, 19])
    assert graph.test_mask.sum() == 5, "one test set for all splits"
    np.testing.assert_array_equal(graph.x, truth["x"])


@pytest.mark.parametrize(
    "name, file",
    [
        ("computers", "amazon/Computers/raw/amazon_electronics_computers.npz"),
        ("photo", "amazon/Photo/raw/amazon_electronics_photo.npz"),
        ("coauthor_cs", "coauthor/CS/raw/ms_academic_cs.npz"),
        ("coauthor_physics", "coauthor/Physics/raw/ms_academic_phy.npz"),
    ],
)
def test_amazon_and_coauthor(config, in_process, name, file):
    truth = data_files.shchur(Path(config.root, file))
    graph = load_dataset(replace(config, name=name))
    np.testing.assert_array_equal(edges_of(graph), truth["edges"])
    np.testing.assert_array_equal(graph.x, truth["x"])
    assert (graph.train_mask.sum(), graph.val_mask.sum(), graph.test_mask.sum()) == (24, 8, 8)
    assert not (graph.train_mask & graph.val_mask).any() and not (graph.train_mask & graph.test_mask).any()
    other = load_dataset(replace(config, name=name, seed=1))
    assert not np.array_equal(other.train_mask, graph.train_mask)


def test_ogb(config, in_process):
    pytest.importorskip("ogb", reason="the optional extra gemini-gnn[ogb] is not installed")
    truth = data_files.ogb(Path(config.root), "ogbn-arxiv", "time")
    before = tree(Path(config.root))
    graph = load_dataset(replace(config, name="ogbn-arxiv"))
    np.testing.assert_array_equal(edges_of(graph), truth["edges"])
    np.testing.assert_array_equal(graph.x, truth["x"])
    np.testing.assert_array_equal(graph.y, truth["y"])
    np.testing.assert_array_equal(np.flatnonzero(graph.train_mask), truth["train"])
    assert (graph.val_mask.sum(), graph.test_mask.sum()) == (4, 4)
    assert tree(Path(config.root)) == before


def test_absent_without_network_says_what_to_put_where(config, in_process, monkeypatch):
    def no_network(url):
        raise ConnectionError(f"no network: {url}")

    monkeypatch.setattr(import_third_party, "require_network", no_network)
    with pytest.raises(DataError) as caught:
        load_dataset(replace(config, name="photo"))
    for part in ("amazon/Photo/raw", "amazon_electronics_photo.npz", "no network", "launch/prepare.py", config.root):
        assert part in str(caught.value)
    assert not list(Path(config.cache).rglob("*.npy")) and not list(Path(config.cache).rglob("*.tmp"))


def test_no_answer_is_noticed_soon(monkeypatch):
    monkeypatch.setattr(import_third_party, "NETWORK_TIMEOUT_S", 0.2)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="no network: http://127.0.0.1:1"):
        import_third_party.require_network("http://127.0.0.1:1/nothing/listens/here")
    assert time.monotonic() - began < 5


def test_downloads_go_to_the_cache(config, in_process, monkeypatch, tmp_path):
    """The loader 'downloads' (copies files made elsewhere); they are kept in the cache, not in the root."""
    from torch_geometric.datasets import Amazon

    elsewhere = tmp_path / "elsewhere"
    data_files.shchur(elsewhere / "photo.npz")
    Path(config.root).mkdir()
    monkeypatch.setattr(import_third_party, "require_network", lambda url: None)
    monkeypatch.setattr(Amazon, "download", lambda self: shutil.copy(elsewhere / "photo.npz", self.raw_paths[0]))
    photo = replace(config, name="photo")
    graph = load_dataset(photo)
    kept = Path(config.cache, "raw/amazon/Photo/raw/amazon_electronics_photo.npz")
    assert graph.num_nodes == 40 and kept.is_file() and not list(Path(config.root).rglob("*"))
    shutil.rmtree(Path(config.cache, "imported"))
    monkeypatch.setattr(Amazon, "download", lambda self: pytest.fail("downloaded twice"))
    assert load_dataset(photo).num_nodes == 40


def test_damaged_files_are_named(config, in_process):
    data_files.planetoid(Path(config.root), "Cora")
    Path(config.root, "planetoid/Cora/raw/ind.cora.allx").write_bytes(b"not a pickle")
    with pytest.raises(
        DataError, match=r"expected the files as published in .*planetoid/Cora/raw.* Put whole ones there"
    ):
        load_dataset(replace(config, name="cora"))
    Path(config.root, "planetoid/Cora/raw/ind.cora.allx").unlink()
    with pytest.raises(
        DataError, match=r"prepare.py dataset=cora` .*, or put ind\.cora\.allx into .*planetoid/Cora/raw"
    ):
        load_dataset(replace(config, name="cora"))
    assert not list(Path(config.cache).rglob("*.npy"))


def test_unwritable_cache(config, in_process, tmp_path):
    data_files.shchur(Path(config.root, "amazon/Photo/raw/amazon_electronics_photo.npz"))
    (tmp_path / "file").write_text("")
    with pytest.raises(GeminiError, match="dataset.cache"):
        load_dataset(replace(config, name="photo", cache=str(tmp_path / "file" / "cache")))


@pytest.mark.data
@pytest.mark.parametrize(
    "name, folder, nodes, edges, features, classes, split, digest",
    [
        ("cora", "planetoid/Cora", 2708, 10556, 1433, 7, (140, 500, 1000), "5af2a37cae0582ff"),
        ("chameleon", "wikipedia_network/chameleon", 2277, 36101, 2325, 5, (1092, 729, 456), "75945500e763c39e"),
        ("computers", "amazon/Computers", 13752, 491722, 767, 10, (8251, 2751, 2750), "0411e9ccaa69eacc"),
    ],
)
def test_real_graphs(config, in_process, name, folder, nodes, edges, features, classes, split, digest):
    if not DATA or not Path(DATA, folder).is_dir():
        pytest.skip(f"GEMINI_GNN_DATA has no {folder}")
    graph = load_dataset(replace(config, name=name, root=DATA))
    assert (graph.num_nodes, graph.num_edges, graph.x.shape[1], graph.num_classes) == (nodes, edges, features, classes)
    assert tuple(int(mask.sum()) for mask in (graph.train_mask, graph.val_mask, graph.test_mask)) == split
    assert xxhash.xxh3_64_hexdigest(dense(graph.x).tobytes()) == digest, "the numbers of PyG's own dense x"
    if isinstance(graph.x, SparseRows):  # as imported before features could be sparse
        (file,) = Path(config.cache, "imported").glob("*/x.npz")
        file.unlink()
        np.save(file.with_suffix(".npy"), graph.x.dense())
        again = load_dataset(replace(config, name=name, root=DATA))
        assert isinstance(again.x, SparseRows) and np.array_equal(again.x.dense(), graph.x.dense())
