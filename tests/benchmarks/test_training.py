"""The contenders of benchmarks/training.py take their steps, whatever PyG's NeighborLoader returns."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.loader import NodeLoader

from gemini_gnn.sampling.pyg import PyGSampler

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


class LikeTorchSparse(PyGSampler):
    """Returns what PyG's own sampler does on torch-sparse: no numbers of nodes and edges by hop."""

    def sample_from_nodes(self, index, **kwargs):
        out = super().sample_from_nodes(index, **kwargs)
        out.num_sampled_nodes = out.num_sampled_edges = None
        return out


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("peer", [None, PyGSampler, LikeTorchSparse])  # nothing installed, pyg-lib, torch-sparse
def test_steps_of_the_pyg_loops(monkeypatch, trim, peer):
    import training

    colptr, row = training.skewed_graph(300, 3000)
    rng = np.random.default_rng(0)
    x, y = torch.randn(300, training.FEATURES), torch.from_numpy(rng.integers(training.CLASSES, size=300))
    seeds = [rng.choice(300, 20, replace=False) for _ in range(2)]

    def neighbor_loader(data):
        return (None, "not installed") if peer is None else (NodeLoader(data, peer(data, training.FANOUTS)), None)

    monkeypatch.setattr(training, "pyg_neighbor_loader", neighbor_loader)
    step = training.pyg_step(colptr, row, x, y, seeds, time.perf_counter, trim)
    found = [step(i) for i in range(2)]
    assert all(np.isfinite(result["loss"]) and result["edges"] > 0 for result in found)
    direct = peer is PyGSampler or (peer is LikeTorchSparse and not trim)
    assert all((result["batches_from"] == "NeighborLoader") == direct for result in found)


def test_the_parts_of_a_step_and_of_what_two_ranks_lose_add_up():
    """One rank: 10 s, of it 9 of CPU time. Two: 6 s, of it 5 of CPU time and 0.5 of waiting, so 0.5 s are nobody's."""
    import training

    def step(wall_s, wait_s, scale):
        phases = {"input": 0.0, "forward": wall_s - wait_s, "backward": 0.0, "others": wait_s, "reduce": 0.0}
        phases |= {"update": 0.0, "report": 0.0, "snapshot": 0.0, "exposed": 0.0, "input_others": 0.0}
        cpu = {"forward": 6.0, "backward": 0.0, "sample": 1.0, "fetch": 1.0, "update": 0.5, "input": 0.25}
        return {"phases_s": phases, "cpu_s": {name: s * scale for name, s in cpu.items()} | {"process": 9 * scale}}

    one = training.parts_of_step([step(10.0, 0.0, 1.0)])
    two = training.parts_of_step([step(6.0, 0.5, 5 / 9)] * 2)
    assert sum(one.values()) == pytest.approx(10.0) and sum(two.values()) == pytest.approx(6.0)
    assert one["other processes, rest"] == pytest.approx(1.0) and one["other threads (gloo, files)"] == 0.25
    assert (two["waiting for the slower rank"], two["other processes, rest"]) == pytest.approx((0.5, 0.5))
    lost = training.second_ranks_time(one, two, 5 / 9)
    assert sum(lost.values()) == pytest.approx(6.0 - 10.0 / 2)
    assert lost["more work: less overlap"] == pytest.approx(8.0 * (5 / 9 - 0.5))
    assert lost["forward, backward"] == pytest.approx(0.0)
