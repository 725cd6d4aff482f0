"""Ranks that have nothing take part in every collective: training, both ways of evaluation, and what is read afterwards.

The first, a middle or the last rank owns a few nodes without edges, so it has no halo and sends nothing. They are
unlabelled (no seeds, nothing to count), or seeds without neighbors. The same graph on one rank tells the right result.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gemini_gnn
from gemini_gnn.config import ModelConfig
from gemini_gnn.graph.graph import Graph, from_edges
from gemini_gnn.graph.partition.write import write_partitioned
from gemini_gnn.graph.sparse import sparse
from gemini_gnn.halo.exchange import HaloExchange
from gemini_gnn.models.build import build_model
from gemini_gnn.sampling.in_edges import ReplicatedInEdges
from gemini_gnn.sampling.partitioned import PartitionedInEdges
from gemini_gnn.sampling.sampler import NeighborSampler
from gemini_gnn.training.evaluate import Evaluation
from tests.ranks import run_ranks
from tests.trainers import logs, train_ranks, trained

ROOT = Path(__file__).parents[2]
WORLD, SMALL, LARGE = 3, 2, 23  # nodes of the part that has nothing, and of each other part


def graph_and_parts(poor: int, *, labelled: bool = False, edges: int = 300) -> tuple[Graph, np.ndarray]:
    """A graph, and the part of each node: ``poor`` has ``SMALL`` nodes that no edge touches."""
    rng = np.random.default_rng(4)
    sizes = [SMALL if part == poor else LARGE for part in range(WORLD)]
    parts = rng.permutation(np.repeat(np.arange(WORLD), sizes))
    rich, n = np.flatnonzero(parts != poor), len(parts)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64) + 2 * (x[:, 1] > 0)
    masks = [rng.permutation(n) % 3 == 0, np.zeros(n, bool), np.zeros(n, bool)]
    masks[1] = ~masks[0] & (np.arange(n) % 2 == 0)
    masks[2] = ~masks[0] & ~masks[1]
    for mask, kept in zip(masks, (labelled, False, False), strict=True):
        mask[parts == poor] = kept
    if not labelled:
        y[parts == poor] = -1
    colptr, row, _ = from_edges(*rng.choice(rich, (2, edges)), n)
    return Graph("nothing", colptr, row, x, y, 4, *masks), parts


def write(graph: Graph, parts: np.ndarray, folder: Path) -> list[str]:
    write_partitioned(graph, parts, folder, method="by-hand", settings={}, fingerprint="none")
    return ["dataset=partitioned", f"partition.folder={folder}"]


SETTINGS = ["training.epochs=3", "model.hidden=8", "model.dropout=0", "optimizer=sgd", "sampling.order=global"]
SETTINGS += ["sampling.fanouts=[3,2]", "evaluation.batch_size=5"]


@pytest.mark.parametrize(
    ("poor", "labelled", "settings"),
    [
        (0, False, ["model=sage"]),
        (1, False, ["model=gcn", "sampling.topology=partitioned", "deepspeed=zero3"]),
        (2, False, ["model=gat", "sampling.prefetch=0", "deepspeed=zero1"]),
        (0, True, ["model=gat", "evaluation.fanouts=[3,2]", "sampling.topology=partitioned"]),
        (1, True, ["model=sage", "model.aggregator=max", "evaluation.fanouts=[-1,-1]"]),
        (2, True, ["model=gcn", "sampling.topology=partitioned", "features.in_ram=false"]),
        (2, False, ["model._target_=own_model.GIN"]),
    ],
)
def test_training_is_that_of_one_rank_which_has_everything(tmp_path, monkeypatch, poor, labelled, settings):
    monkeypatch.syspath_prepend(ROOT / "examples")  # the trainers get this process's path
    graph, parts = graph_and_parts(poor, labelled=labelled)
    found = []
    for world, of_nodes, batch_size in ((1, parts * 0, 12), (WORLD, parts, 4)):
        data = write(graph, of_nodes, tmp_path / f"parts-{world}")
        given = [*SETTINGS, *settings, *data, f"sampling.batch_size={batch_size}"]
        found.append(trained(world, tmp_path / f"run-{world}", *given))
    (expected, one), (losses, result) = found
    assert len(losses) > 3
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert (result["val_accuracy"], result["test_accuracy"]) == (one["val_accuracy"], one["test_accuracy"])


@pytest.mark.parametrize("topology", ["replicated", "partitioned"])
@pytest.mark.parametrize("batch_size", [4, -1])
def test_local_batches_of_a_rank_without_seeds(tmp_path, topology, batch_size):
    graph, parts = graph_and_parts(1)
    settings = [*SETTINGS, "sampling.order=local", "optimizer=adam", f"sampling.batch_size={batch_size}"]
    losses, _ = trained(
        WORLD, tmp_path / "run", *settings, *write(graph, parts, tmp_path / "parts"), f"sampling.topology={topology}"
    )
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("topology", ["replicated", "partitioned"])
def test_a_graph_without_edges(tmp_path, topology):
    graph, parts = graph_and_parts(0, labelled=True, edges=0)
    found = [
        trained(
            world,
            tmp_path / f"run-{world}",
            *SETTINGS,
            *write(graph, of_nodes, tmp_path / f"parts-{world}"),
            f"sampling.batch_size={12 // world}",
            f"sampling.topology={topology}",
        )
        for world, of_nodes in ((1, parts * 0), (WORLD, parts))
    ]
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)


def test_evaluate_py_reads_the_run_of_a_rank_that_had_nothing(tmp_path):
    graph, parts = graph_and_parts(2)
    data = write(graph, parts, tmp_path / "parts")
    codes = train_ranks(WORLD, tmp_path / "run", *SETTINGS, *data)
    assert codes == [0] * WORLD, logs(tmp_path / "run", WORLD)
    command = [sys.executable, "launch/evaluate.py", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits = np.load(tmp_path / "run" / "evaluation" / "logits.npy")
    assert logits.shape == (graph.num_nodes, 4) and np.isfinite(logits).all()
    bare, _ = graph_and_parts(2, edges=0)
    lonely = parts == 2  # without edges in both graphs: the same prediction in both
    np.testing.assert_array_equal(gemini_gnn.predict(tmp_path / "run", bare)["logits"][lonely], logits[lonely])


# -- a rank that owns no node at all: no partition has one yet, the collectives allow it ---------------------------------


def evaluates(rank, world, poor, model, exact, partitioned):
    graph, _ = graph_and_parts(poor)
    n = graph.num_nodes
    bounds = np.array([[0, 0, 20, n], [0, 20, 20, n], [0, 20, n, n]][poor])
    begin, end = int(bounds[rank]), int(bounds[rank + 1])
    assert (begin == end) == (rank == poor)
    group = torch.distributed.new_group(backend="gloo")
    exchange = HaloExchange(group, bounds, rank, chunk_bytes=1 << 20, timeout_s=30)
    ids = np.arange(n)
    whole = ReplicatedInEdges(graph.colptr, graph.row, ids)
    edges = slice(graph.colptr[begin], graph.colptr[end])
    part = PartitionedInEdges(graph.colptr[begin : end + 1], graph.row[edges], ids[begin:end], bounds, rank, exchange)
    fanouts = [-1] if exact else [-1, -1]
    net = build_model(ModelConfig(name=model, hidden=8), 5, 4, seed=0)

    def evaluation(in_edges, exchange, begin, end, batch_size, x=graph.x):
        sampler = NeighborSampler(in_edges, fanouts, seed=0)
        rows, largest = x[begin:end], int(np.diff(exchange.bounds).max())
        return Evaluation(sampler, exchange, rows, begin, end, largest, batch_size, torch.device("cpu"), exact)

    alone = HaloExchange(None, np.array([0, n]), 0, chunk_bytes=1 << 20, timeout_s=1)
    expected = evaluation(whole, alone, 0, n, n)
    for x, embeddings in itertools.product((graph.x, sparse(graph.x)), (False, True)):
        mine = evaluation(part if partitioned else whole, exchange, begin, end, 7, x)
        got = mine.logits(net, embeddings)
        torch.testing.assert_close(got, expected.logits(net, embeddings)[begin:end])
        assert torch.equal(got, mine.logits(net, embeddings)), "from kept blocks"


@pytest.mark.parametrize("poor", [0, 1, 2])
@pytest.mark.parametrize(
    ("model", "exact", "partitioned"), [("sage", True, False), ("gcn", True, True), ("gat", False, True)]
)
def test_evaluation_by_a_rank_that_owns_nothing(poor, model, exact, partitioned):
    run_ranks(evaluates, WORLD, poor, model, exact, partitioned)
