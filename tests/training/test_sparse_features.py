"""Bag-of-words features, sparse from the partitioned graph to the model, beside the same features dense."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gemini_gnn
from gemini_gnn.compose import compose
from gemini_gnn.graph.graph import Graph, from_edges
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.sparse import SparseRows, sparse
from gemini_gnn.models.csr import destinations
from gemini_gnn.models.tensors import SparseFeatures, moved_features, needs_dense
from gemini_gnn.training import groups
from gemini_gnn.training.data import BatchSource, features_said, in_layout
from tests.ranks import run_ranks
from tests.trainers import logs, train_ranks, trained

NODES, WORDS, CLASSES = 400, 300, 4
SETTINGS = ["dataset=partitioned", "training.epochs=2", "sampling.batch_size=16", "sampling.fanouts=[4,3]"]
SETTINGS += ["sampling.order=global", "optimizer=sgd", "model.hidden=16", "model.dropout=0"]
HERE = "tests.training.test_sparse_features"


class Bag(torch.nn.Module):
    """One linear layer over the neighbors' mean. What it is given depends on what its class declares."""

    expected: type = torch.Tensor

    def __init__(self, in_features, hidden, num_classes, layers):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes)

    def forward(self, x, blocks):
        assert type(x) is self.expected, type(x)
        h = self.linear(x.dense() if isinstance(x, SparseFeatures) else x.to(self.linear.weight.dtype))
        for block in blocks:
            sums = torch.zeros(block.num_dst, h.shape[1], dtype=h.dtype)
            h = sums.index_add(0, destinations(block), h[block.indices]) + h[: block.num_dst]
        return h


class SparseBag(Bag):
    takes_sparse = True
    expected = SparseFeatures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Partitioned graphs by (parts, method): rows of about 15 words, two thirds of them of the node's class."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, CLASSES, NODES)
    x = (draw.random((NODES, WORDS)) < 0.015).astype(np.float32)
    x[draw.random((NODES, WORDS)) < np.where(np.arange(WORDS) % CLASSES == y[:, None], 0.14, 0)] = 1
    x *= draw.choice([1, 0.5, 3.25], x.shape).astype(np.float32)
    source = draw.integers(0, NODES, 6 * NODES)
    same = np.array([draw.choice(np.flatnonzero(y == y[i])) for i in source])
    colptr, row, _ = from_edges(np.concatenate([source, same]), np.concatenate([same, source]), NODES)
    graph = Graph("bags", colptr, row, x, y, CLASSES, *(np.arange(NODES) % 4 == i for i in (0, 2, 3)))
    root = tmp_path_factory.mktemp("parts")
    made = {}
    for parts, method in ((1, "hash"), (2, "hash"), (2, "metis")):
        made[parts, method] = root / f"{parts}-{method}"
        gemini_gnn.partition(graph, made[parts, method], parts=parts, method=method)
    return made


def settings_of(folders, world, layout, *more, method="hash"):
    return [*SETTINGS, f"partition.folder={folders[world, method]}", f"features.layout={layout}", *more]


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_the_layout_is_the_folders_unless_another_is_asked_for():
    ones = np.eye(3, 8, dtype=np.float32)
    rows = sparse(ones)
    assert in_layout(ones, "auto", 2) is in_layout(ones, "dense", 2) is ones
    assert in_layout(rows, "auto", 2) is in_layout(rows, "sparse", 2) is rows and rows.value is None
    assert np.array_equal(in_layout(rows, "dense", 2), ones)
    assert in_layout(ones, "sparse", 1).value is None
    beside = in_layout(
        ones, "sparse", 2
    )  # another rank's part may hold other values than 1: then all ranks send values
    assert beside.value.tolist() == [1, 1, 1] and np.array_equal(beside.dense(), ones)


@pytest.mark.parametrize(
    ("held", "given", "device", "made_dense", "said"),
    [
        ("dense", "dense", "cpu", True, []),
        ("sparse", "sparse", "cpu", False, ["features: sparse, 4.0 MB in memory of rank 0 (dense: 50.0 MB); "]),
        (
            "sparse",
            "dense",
            "cpu",
            True,
            ["features: sparse, 4.0 MB", "the rows of each batch are made dense: Bag takes"],
        ),
        (
            "sparse",
            "sparse",
            "cuda",
            True,
            ["features: sparse, 4.0 MB", "on the GPU the features of each batch are dense"],
        ),
        ("dense", "sparse", "cpu", True, ["features: dense, 50.0 MB in memory of rank 0 (sparse: 4.0 MB); "]),
    ],
)
def test_the_start_says_the_layout_and_both_sizes(held, given, device, made_dense, said):
    ptr = np.linspace(0, 487_500, 12_501).astype(np.int64)
    rows = SparseRows(ptr, np.zeros(487_500, np.int32), np.ones(487_500, np.float32), 1000)
    forms = {"dense": np.zeros((2, 2), np.float32), "sparse": rows}
    source = SimpleNamespace(
        x=forms[held],
        part=SimpleNamespace(x=forms[given]),
        graph=SimpleNamespace(parts=2),
        rank=0,
        device=torch.device(device),
        dense=made_dense,
    )
    lines = features_said(source, Bag(3, 1, 2, 1))
    assert len(lines) == len(said) and all(line.startswith(begin) for line, begin in zip(lines, said, strict=True))


def test_only_a_declared_model_on_the_cpu_gets_sparse_features():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not needs_dense(SparseBag(3, 1, 2, 1), cpu)
    assert needs_dense(SparseBag(3, 1, 2, 1), cuda) and needs_dense(Bag(3, 1, 2, 1), cpu)
    x = SparseFeatures(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1], dtype=torch.int32), None, 4)
    assert moved_features(x, cpu, dense=True).tolist() == [[0, 0, 1, 0], [1, 1, 0, 0]]
    there = moved_features(x, torch.device("meta"), dense=True)  # reads nothing back from the device
    assert there.shape == (2, 4) and there.device.type == "meta"


# -- batches -----------------------------------------------------------------------------------------------------------


def same_batches(rank, world, folder, precision):
    group = torch.distributed.new_group() if world > 1 else None
    place = groups.Groups(rank, world, "gloo", torch.device("cpu"), range(rank, rank + 1), group, None, None, None)
    sources = [
        BatchSource(
            PartitionedGraph.open(folder),
            compose([f"features.layout={layout}", f"training.precision={precision}", "sampling.batch_size=16"]),
            place,
        )
        for layout in ("dense", "sparse", "sparse")
    ]
    sources[2].dense = True
    for key in sources[0].step_keys(0) + sources[0].step_keys(1):
        dense, stored, made_dense = (source.make(key).x for source in sources)
        assert isinstance(stored, SparseFeatures) and stored.dtype == dense.dtype
        assert torch.equal(stored.dense(), dense) and torch.equal(made_dense, dense)
    return sources[0].remote_bytes, sources[1].remote_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "method"), [(1, "hash"), (2, "hash"), (2, "metis")])
def test_batches_hold_the_same_bits_in_both_layouts(folders, world, method, precision):
    for whole, stored in run_ranks(same_batches, world, folders[world, method], precision):  # bytes received
        assert (whole, stored) == (0, 0) if world == 1 else 0 < 5 * stored < whole


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sage", "gcn", "gat"])
def test_losses_of_both_layouts_agree_on_one_and_two_ranks(folders, tmp_path, model):
    """Sparse products add the same terms in another order, and no zeros: one rounding of float32 is 6e-8, and 300 words, 16
    hidden values and the steps of two epochs leave less than 1e-5 of a loss."""
    dense, expected = trained(1, tmp_path / "dense", *settings_of(folders, 1, "dense", f"model={model}"))
    assert dense[-1] < dense[0]
    for world, method in ((1, "hash"), (2, "metis")):
        more = [f"model={model}", f"sampling.batch_size={16 // world}", f"deepspeed=zero{world + 1}"]
        run = tmp_path / f"sparse-{world}"
        losses, result = trained(world, run, *settings_of(folders, world, "sparse", *more, method=method))
        np.testing.assert_allclose(losses, dense, rtol=1e-5)
        assert result["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=0.01)
        where = "0.1 MB in memory (dense: 0.5 MB)" if world == 1 else "0.0 MB in memory of rank 0 (dense: 0.2 MB)"
        assert f"features: sparse, {where}; features.layout=dense chooses the other" in logs(run, 1)


@pytest.mark.parametrize("settings", [["deepspeed=zero0"], ["deepspeed=zero1"], ["deepspeed=zero3"], ["training=bf16"]])
def test_a_model_gets_what_its_class_declares(folders, tmp_path, settings):
    """Through DeepSpeed, and in the evaluation by batches."""
    found = [
        trained(2, tmp_path / name, *settings_of(folders, 2, "sparse", f"model._target_={HERE}.{name}", *settings))
        for name in ("Bag", "SparseBag")
    ]
    assert found[0][0] == found[1][0] and found[0][1]["test_accuracy"] == found[1][1]["test_accuracy"]
    said = "the rows of each batch are made dense: Bag takes no sparse features"
    assert said in logs(tmp_path / "Bag", 1) and "made dense" not in logs(tmp_path / "SparseBag", 1)
    assert "unknown inputs" not in logs(tmp_path / "SparseBag", 2), "of DeepSpeed, which looks for tensors in arguments"


def test_sparse_batches_ahead_and_after_a_kill_are_the_same_bits(folders, tmp_path):
    more = ["sampling.batch_size=8", "training.epochs=3", "model.dropout=0.5", "snapshot=nfs", "snapshot.nfs_every=5"]
    settings = settings_of(folders, 2, "sparse", *more)
    expected, _ = trained(2, tmp_path / "undisturbed", *settings)
    assert trained(2, tmp_path / "alone", *settings, "sampling.prefetch=0")[0] == expected
    train_ranks(2, tmp_path / "run", *settings, "faults.at=kill-rank 1 @ step 14")
    losses, _ = trained(2, tmp_path / "run", *settings, "resume=must")
    assert "going on after step 10" in logs(tmp_path / "run", 2)
    assert losses == expected
