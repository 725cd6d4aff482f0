"""Facts about a graph that no data set has to say."""

import numpy as np
import pytest

from gemini_gnn.graph.graph import Graph, from_edges, one_way_share
from gemini_gnn.graph.partition.write import write_partitioned
from tests.trainers import logs, trained


def share(source, target, nodes):
    colptr, row, _ = from_edges(np.array(source, dtype=np.int64), np.array(target, dtype=np.int64), nodes)
    return one_way_share(colptr, row, np.arange(nodes))


def test_the_share_of_edges_without_a_reverse(tmp_path):
    rng = np.random.default_rng(0)
    source, target = rng.integers(5000, size=(2, 20_000))
    both = np.concatenate([source, target]), np.concatenate([target, source])
    loops = np.arange(5000)
    assert share(source, target, 5000) > 0.95 and share(*both, 5000) == 0
    assert share(np.concatenate([source, loops]), np.concatenate([target, loops]), 5000) > 0.95, "a loop is no reverse"
    half = np.concatenate([both[0], source + 5000]), np.concatenate([both[1], target + 5000])
    assert share(*half, 10_000) == pytest.approx(1 / 3, abs=0.1)
    star = np.zeros(4999, dtype=np.int64), np.arange(1, 5000)
    assert share(*star, 5000) == 1 and share(np.concatenate(star), np.concatenate(star[::-1]), 5000) == 0
    assert share([], [], 3) == 0 and share([1], [1], 3) == 0
    # Renumbered by a partition, columns ascend by original id.
    colptr, row, _ = from_edges(*both, 5000)
    x, y, mask = np.ones((5000, 1), np.float32), np.zeros(5000, np.int64), np.ones(5000, bool)
    graph = Graph("both", colptr, row, x, y, 1, mask, mask, mask)
    parts = write_partitioned(
        graph, rng.permutation(5000) % 3, tmp_path / "p", method="x", settings={}, fingerprint="x"
    )
    assert one_way_share(parts.colptr, parts.row, parts.original) == 0


@pytest.mark.parametrize("undirected", [False, True])
def test_the_start_names_the_setting_for_a_file_that_lists_each_edge_once(tmp_path, undirected):
    rng = np.random.default_rng(1)
    np.savetxt(tmp_path / "edges.csv", rng.integers(60, size=(300, 2)), fmt="%d", delimiter=",")
    (tmp_path / "labels.csv").write_text("".join(f"{node},{node % 2}\n" for node in range(60)))
    settings = [
        "dataset=edge_list",
        f"dataset.path={tmp_path / 'edges.csv'}",
        f"dataset.labels={tmp_path / 'labels.csv'}",
    ]
    settings += [f"dataset.cache={tmp_path / 'cache'}", f"dataset.undirected={undirected}", "training.epochs=1"]
    for again in ("made", "found"):  # also where the partition is there already
        trained(1, tmp_path / again, *settings)
        assert ("read it with dataset.undirected=true" in logs(tmp_path / again, 1)) == (not undirected)
