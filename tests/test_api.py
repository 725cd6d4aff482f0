"""gemini_gnn from Python, as in a notebook: several trainings in one process."""

import copy
import errno
import os
import re
import sys
import types
from pathlib import Path

import networkx
import numpy as np
import pytest
import scipy.sparse
import torch
from torch_geometric.data import Data
from torch_geometric.datasets import FakeDataset

import gemini_gnn
from gemini_gnn.api import settings_to_config
from gemini_gnn.compose import compose, exit_with
from gemini_gnn.errors import ConfigError, DataError, PartitionError, RunDirError
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.sparse import SparseRows, dense

SETTINGS = {"training.epochs": 2, "model.hidden": 8, "logger.tensorboard": False, "logger.progress": False}


def data(seed=0, n=120, width=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    masks = {f"{name}_mask": torch.arange(n) % 3 == i for i, name in enumerate(("train", "val", "test"))}
    edges = torch.randint(0, n, (2, 400), generator=generator)
    return Data(x=x, y=(x[:, 0] > 0).long(), edge_index=edges, **masks)


def test_train_twice_in_one_process_and_leave_nothing(tmp_path):
    hook = sys.excepthook
    first = gemini_gnn.train(data(), tmp_path / "one", SETTINGS)
    assert sys.excepthook is hook, "later tracebacks of the notebook would begin with [rank0]:"
    second = gemini_gnn.train(data(), tmp_path / "two", SETTINGS)
    assert first["test_accuracy"] == second["test_accuracy"] and first["steps"] == second["steps"]
    assert not os.environ.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}, (
        "a later job would think it belongs to this one"
    )
    with pytest.raises(RunDirError, match="finished run"):
        gemini_gnn.train(data(), tmp_path / "one", SETTINGS)


def test_a_failed_call_leaves_no_data_behind_for_the_next(tmp_path):
    with pytest.raises(ConfigError, match="one fanout per layer"):
        gemini_gnn.train(data(0), tmp_path / "run", {**SETTINGS, "sampling.fanouts": [5]})
    gemini_gnn.train(data(1, n=90), tmp_path / "run", SETTINGS)
    found = gemini_gnn.predict(tmp_path / "run", data(1, n=90))
    assert found["predictions"].shape == (90,)
    # What launch/evaluate.py does: the graph of the run, back from its partition.
    again = gemini_gnn.predict(tmp_path / "run", PartitionedGraph.open(tmp_path / "run" / "partition"))
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_settings_of_the_data_set_apply_to_data_from_python(tmp_path):
    plain = gemini_gnn.partition(data(), tmp_path / "a", parts=1)
    both = gemini_gnn.partition(data(), tmp_path / "b", parts=1, undirected=True, normalize="l1")
    assert both.num_edges > plain.num_edges and np.abs(both.x).sum(axis=1) == pytest.approx(1)
    gemini_gnn.train(data(), tmp_path / "run", {**SETTINGS, "dataset.undirected": True})
    assert PartitionedGraph.open(tmp_path / "run" / "partition").num_edges == both.num_edges
    bare = gemini_gnn.partition(networkx.path_graph(9), tmp_path / "c", parts=3)  # no labels: not to be trained on
    assert bare.num_classes == 0
    for graph, setting, value in ((data(), "dataset.nodes", 1), (plain, "dataset.normalize", "l1")):
        with pytest.raises(ConfigError, match=f"{setting}: .*leave it out"):
            gemini_gnn.train(graph, tmp_path / "other", {**SETTINGS, setting: value})
    with pytest.raises(DataError, match="expected a class label per node"):
        gemini_gnn.train(networkx.path_graph(9), tmp_path / "other", SETTINGS)


@pytest.mark.parametrize(
    ("settings", "mirrored"),
    [({"dataset": {"undirected": True}}, True), ({"dataset.undirected": "false"}, False)],
)
def test_what_is_read_is_what_the_checked_settings_say(tmp_path, monkeypatch, settings, mirrored):
    heard = []
    monkeypatch.setattr("gemini_gnn.training.job.in_process", lambda config: heard.append(config) or 130)
    given = copy.deepcopy(settings)
    with pytest.raises(RunDirError, match="stopped before its end"):
        gemini_gnn.train(data(), tmp_path / "run", given)
    assert given == settings, "the caller's own dict was written to"
    assert heard[0].dataset.undirected == mirrored and heard[0].dataset.name == "partitioned"
    edges = gemini_gnn.partition(data(), tmp_path / "expected", parts=1, undirected=mirrored).num_edges
    assert PartitionedGraph.open(tmp_path / "run" / "partition").num_edges == edges


def test_nested_settings_are_put_over_the_others():
    config = settings_to_config({"snapshot.mode": "none", "snapshot": {"every": 3}, "model.kwargs": {"a": {"b": 1}}})
    assert (config.snapshot.mode, config.snapshot.every, config.model.kwargs) == ("none", 3, {"a": {"b": 1}})
    with pytest.raises(ConfigError, match="seed"):
        settings_to_config({"seed.x": 1})


def test_groups_are_named_as_on_the_command_line(tmp_path):
    settings = {"model.heads": 2, "model": "gat", "snapshot": "nfs", "training": "bf16", "experiment": "exactness"}
    config = settings_to_config(settings)
    assert config == compose(["dataset=partitioned", *(f"{name}={value}" for name, value in settings.items())])
    assert (config.model.name, config.model.heads, config.snapshot.mode) == ("gat", 2, "nfs")
    with pytest.raises(ConfigError, match="model: expected one of gat, gcn, sage; got 'gta'.*did you mean gat"):
        settings_to_config({"model": "gta"})
    with pytest.raises(ConfigError, match="dataset=cora: the data is given from Python"):
        gemini_gnn.train(data(), tmp_path / "run", {**SETTINGS, "dataset": "cora"})
    nfs = {"snapshot": "nfs", "snapshot.nfs_every": 1}
    result = gemini_gnn.train(data(), tmp_path / "run", {**SETTINGS, "model": "gat", **nfs})
    assert (result["config"]["model"]["name"], result["config"]["snapshot"]["mode"]) == ("gat", "nfs")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_predictions_read_the_data_as_the_training_did(tmp_path):
    reading = {"dataset.normalize": "l2", "dataset.undirected": True, "dataset.split": "random:0.5,0.3,0.2"}
    gemini_gnn.train(data(), tmp_path / "run", {**SETTINGS, **reading})
    trained_on = gemini_gnn.predict(tmp_path / "run", PartitionedGraph.open(tmp_path / "run" / "partition"))
    unlabelled = Data(x=data().x, edge_index=data().edge_index)
    for given in (data(), unlabelled):
        assert np.array_equal(gemini_gnn.predict(tmp_path / "run", given)["logits"], trained_on["logits"])


def test_networkx_and_folders_of_npy(tmp_path):
    graph = networkx.karate_club_graph()
    for node, values in graph.nodes(data=True):
        values["x"] = [float(node == i) for i in range(34)]
        values["y"] = int(values.pop("club") == "Officer")
    gemini_gnn.partition(graph, tmp_path / "parts", parts=2)
    source = data()
    folder = tmp_path / "arrays"
    folder.mkdir()
    for name in ("x", "y", "edge_index", "train_mask", "val_mask", "test_mask"):
        np.save(folder / f"{name}.npy", source[name].numpy())
    result = gemini_gnn.train(folder, tmp_path / "run", SETTINGS)
    assert result["world_size"] == 1 and 0 <= result["test_accuracy"] <= 1


def test_a_model_may_be_read_by_whoever_may_read_its_run(tmp_path, monkeypatch, capsys):
    gemini_gnn.train(data(), tmp_path / "run", SETTINGS)
    modes = {name: (tmp_path / "run" / name).stat().st_mode for name in ("model.safetensors", "model.json")}
    assert modes["model.safetensors"] == modes["model.json"], modes

    def denied(path):  # as it would be for another user, but nothing is for root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    weights, reading = tmp_path / "run" / "model.safetensors", Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: denied(path) if path == weights else reading(path))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        exit_with(lambda _: gemini_gnn.load(tmp_path / "run"))
    said = capsys.readouterr().err
    assert said.startswith(f"error: {weights}: you have no permission") and said.count("\n") == 1


class NotLoggedIn(types.ModuleType):
    """The package wandb, of somebody without a key."""

    class Error(Exception):
        pass

    def init(self, **_):
        raise self.Error("No API key configured.")


@pytest.mark.parametrize(
    "wandb, said", [(None, "pip install wandb"), (NotLoggedIn("wandb"), "No API key.*`wandb login`")]
)
def test_wandb_that_cannot_be_used_is_said_before_training(tmp_path, monkeypatch, wandb, said):
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # None: as if it were not installed
    with pytest.raises(ConfigError, match=f"logger.wandb=true: expected .*{said}"):
        gemini_gnn.train(data(), tmp_path / "run", {**SETTINGS, "logger.wandb": True})
    assert not (tmp_path / "run" / "losses.csv").exists()


def test_a_damaged_partition_is_refused_before_it_is_sampled(tmp_path):
    graph = gemini_gnn.partition(data(), tmp_path / "parts", parts=1)
    with open(tmp_path / "parts" / "row.npy", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff\xff\xff\x7f")  # an edge from a node far beyond the last: sampling would read foreign memory
    with pytest.raises(PartitionError, match=r"row\.npy: expected checksum .* delete the folder and make it again"):
        gemini_gnn.train(graph, tmp_path / "run", SETTINGS)


def test_a_graph_without_validation_nodes_is_refused(tmp_path):
    bare = data()
    bare.val_mask[:] = False
    with pytest.raises(DataError, match="no validation nodes"):
        gemini_gnn.train(bare, tmp_path / "run", SETTINGS)


def test_a_data_set_is_not_a_graph(tmp_path):
    gemini_gnn.train(data(), tmp_path / "run", SETTINGS)
    fake = FakeDataset(num_graphs=2)
    said = r"got the PyG data set FakeDataset of 2\. Give one of its graphs: dataset\[0\]"
    with pytest.raises(DataError, match=said):
        gemini_gnn.train(fake, tmp_path / "other", SETTINGS)
    with pytest.raises(DataError, match=said):
        gemini_gnn.predict(tmp_path / "run", fake)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (
            torch.eye(120).to_sparse_csc(),
            r"got torch\.sparse_csc\. Give `data\.x = torch\.as_tensor\(data\.x\.to_dense\(\)\)`",
        ),
        (np.eye(120), r"got ndarray\. Give `data\.x = torch\.as_tensor\(data\.x\)`"),
    ],
)
def test_features_of_another_kind_are_refused(tmp_path, x, said):
    given = data()
    given.x = x
    with pytest.raises(DataError, match=f"expected x as a dense tensor; {said}"):
        gemini_gnn.train(given, tmp_path / "run", SETTINGS)
    given.x = eval(re.search("`data.x = (.*)`", said.replace("\\", ""))[1], {"torch": torch, "data": given})
    assert gemini_gnn.partition(given, tmp_path / "parts", parts=1).x.shape == (120, 120)


@pytest.mark.parametrize("x", [torch.eye(120), torch.eye(120).to_sparse_csr(), scipy.sparse.eye(120).tocsr()])
def test_the_layout_decides_the_form_of_the_features(tmp_path, x):
    given = data()
    given.x = x
    for layout, form in (("auto", SparseRows), ("sparse", SparseRows), ("dense", np.ndarray)):
        made = gemini_gnn.partition(given, tmp_path / layout, parts=2, layout=layout)
        assert isinstance(made.x, form) and np.array_equal(dense(made.as_graph().x), np.eye(120))
    graph = made.as_graph()
    assert isinstance(gemini_gnn.partition(graph, tmp_path / "kept", parts=1).x, np.ndarray)
    assert isinstance(gemini_gnn.partition(graph, tmp_path / "asked", parts=1, layout="sparse").x, SparseRows)


def test_bfloat16_features_are_read(tmp_path):
    given = data()
    given.x = given.x.bfloat16()
    assert np.array_equal(gemini_gnn.partition(given, tmp_path / "parts", parts=1).x, given.x.float().numpy())


def test_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a PyG Data"):
        gemini_gnn.partition(42, tmp_path / "parts", parts=2)


def test_predictions_do_not_depend_on_the_form_of_the_features(tmp_path):
    """Embeddings differ by rounding: a GEMM sums a row in another order than the sparse product."""
    given = data()
    given.x = torch.eye(120)
    gemini_gnn.train(given, tmp_path / "run", {**SETTINGS, "training.epochs": 3})
    found = {}
    for form, x in (("dense", given.x), ("sparse", given.x.to_sparse_csr())):
        given.x = x
        found[form] = gemini_gnn.predict(tmp_path / "run", given)
    assert np.array_equal(found["dense"]["predictions"], found["sparse"]["predictions"])
    np.testing.assert_allclose(found["dense"]["embeddings"], found["sparse"]["embeddings"], rtol=1e-5, atol=1e-6)
