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
