"""``launch/partition.py`` as a user runs it, and the picture it draws."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.partition import plot
from gemini_gnn.graph.partition.assign import partition_nodes
from gemini_gnn.graph.partition.folder import PartitionedGraph
from tests.graph.partition.test_assign import graph_of, two_cliques
from tests.graph.partition.test_distribute import sent
from tests.graph.partition.test_folder import written

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path, *arguments):
    environ = {**os.environ, "GEMINI_GNN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "launch" / "partition.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, cwd=tmp_path)


SMALL = ("dataset=blocks", "dataset.nodes=300", "dataset.degree=6", "partition.parts=3")


def test_the_command_makes_draws_checks_and_finds_it_again(tmp_path):
    folder = str(tmp_path / "parts")
    made = run(tmp_path, *SMALL, "partition.method=metis", "partition.plot=true", f"partition.folder={folder}")
    assert made.returncode == 0, made.stderr
    assert "edge cut" in made.stdout and "predicted with fanouts [10, 10]" in made.stdout and "made now" in made.stdout
    assert (Path(folder) / "parts.png").read_bytes().startswith(b"\x89PNG")
    pg = PartitionedGraph.open(folder, verify=True)
    assert pg.parts == 3 and np.ptp(pg.meta.train) <= 1

    checked = run(tmp_path, "--check", folder)
    assert checked.returncode == 0 and "edge hash equal" in checked.stdout, checked.stderr
    checked = run(tmp_path, *SMALL, "--check", folder)
    assert checked.returncode == 0 and "bit for bit" in checked.stdout, checked.stderr

    shown = run(tmp_path, "dataset=partitioned", f"partition.folder={folder}")
    assert shown.returncode == 0 and "was there already" in shown.stdout, shown.stderr
    assert shown.stdout.splitlines()[:3] == made.stdout.splitlines()[:3]

    other = run(tmp_path, *SMALL, "partition.method=hash", f"partition.folder={folder}")
    assert other.returncode == 2 and "made for another method: expected hash, got metis" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("partition.parts=301", "dataset.nodes=300"), "301 parts for 300 nodes"),
        (("dataset.nodes=300",), "partition.parts: expected the number of parts"),
        (("partition.parts=2", "partition.method=scotch"), "scotch"),
        (("--check",), "--check: expected a folder"),
        (("--check", "nowhere"), "no meta.json"),
        (("--distribute",), "--distribute: expected a hostfile"),
        (("--distribute", "hosts"), "--distribute HOSTFILE --to FOLDER: expected both"),
        (("--distribute", "hosts", "--to", "there"), "--to: expected an absolute path"),
        (("--distribute", "hosts", "--to", "/there"), "cannot read the hostfile hosts"),
        (("--distribute", "srun", "--to", "/there"), "--distribute srun: expected to be in an allocation"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_positions_keep_parts_apart_and_pairs_are_counted_once(tmp_path):
    pg = written(two_cliques(6), tmp_path / "p", parts=4)
    pairs = plot.node_pairs(pg)
    assert len(pairs) == 2 * 15 + 1 and (pairs[:, 0] < pairs[:, 1]).all()
    part = pg.owner(np.arange(12))
    place = plot.layout(pairs, part, 4)
    assert np.isfinite(place).all() and np.array_equal(place, plot.layout(pairs, part, 4))
    middle = np.array([place[part == p].mean(axis=0) for p in range(4)])
    nearest = np.argmin(((place[:, None] - middle[None]) ** 2).sum(axis=2), axis=1)
    assert np.array_equal(nearest, part)


def test_a_turned_island_looks_towards_its_neighbors():
    points = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert plot.turned(points, points[:1], np.array([[0.0, 5.0]]))[0] == pytest.approx([0, 1], abs=1e-9)
    assert plot.turned(points, points[:0], points[:0]) is points


def test_odd_graphs_are_drawn_and_large_ones_refused(tmp_path, monkeypatch):
    lonely = graph_of([0, 1], [0, 1], 20)  # self-loops only
    pg = written(lonely, tmp_path / "p", parts=20)
    assert plot.plot_partitioned(pg, tmp_path / "lonely.png").stat().st_size > 1000
    one = written(two_cliques(3), tmp_path / "q", parts=1)
    assert plot.plot_partitioned(one, tmp_path / "one.png").stat().st_size > 1000
    with pytest.raises(PartitionError, match="cannot write"):
        plot.plot_partitioned(one, tmp_path / "absent" / "one.png")
    monkeypatch.setattr(plot, "MAX_NODES", 5)
    with pytest.raises(PartitionError, match="at most 5 nodes"):
        plot.plot_partitioned(one, tmp_path / "big.png")


@pytest.mark.data
@pytest.mark.skipif("GEMINI_GNN_DATA" not in os.environ, reason="GEMINI_GNN_DATA is not set")
def test_cuts_of_real_graphs(tmp_path):
    from gemini_gnn.compose import compose
    from gemini_gnn.graph.datasets import load_dataset

    for name, most in (("ego_twitter", 0.09), ("computers", 0.14)):
        config = compose([f"dataset={name}", f"dataset.cache={tmp_path}"])
        graph = load_dataset(config.dataset, require_labels=False)
        target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))
        degree = np.diff(graph.colptr)
        part = partition_nodes(graph, "metis", 4)
        assert np.mean(part[graph.row] != part[target]) < most
        assert np.bincount(part).max() / (graph.num_nodes / 4) < 1.05
        part = partition_nodes(graph, "hash", 4)
        edges = np.bincount(part, weights=degree)
        assert edges.max() / edges.min() < 1.5


def test_machines_and_parts_must_fit(tmp_path):
    (tmp_path / "hosts").write_text("h0 slots=2\nh1 slots=2\nh2 slots=2\n")
    done = run(tmp_path, *SMALL, "--distribute", "hosts", "--to", "/there", "recovery.standby_machines=1")
    assert (
        done.returncode == 2
        and "partition.parts: expected one per rank, 4 (2 machines that train, slots=2)" in done.stderr
    )
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_training_without_the_own_features_ends_before_it_begins(tmp_path):
    folder = sent(written(two_cliques(6), tmp_path / "p", parts=1), [], tmp_path / "got").folder
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "dataset=partitioned", f"partition.folder={folder}"]
    done = subprocess.run(
        [*command, f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 2 and f"error: {folder} on " in done.stderr, done.stderr
    assert "has no features of part 0: " in done.stderr and "--distribute HOSTFILE" in done.stderr
    assert not (tmp_path / "run").exists()
