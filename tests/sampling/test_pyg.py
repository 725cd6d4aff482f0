"""The sampler inside PyG's NodeLoader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData
from torch_geometric.datasets import FakeDataset
from torch_geometric.loader import NodeLoader
from torch_geometric.nn import SAGEConv
from torch_geometric.utils import k_hop_subgraph, trim_to_layer

from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.sampling.pyg import PyGSampler
from tests.sampling.test_sampling import random_edges


def graph(num_nodes: int = 150, num_edges: int = 2000) -> Data:
    edge_index = torch.from_numpy(random_edges(num_nodes, num_edges).T.copy())
    edge_index = edge_index[:, edge_index[1] != 5]  # node 5 is isolated on the receiving side
    torch.manual_seed(0)
    return Data(
        x=torch.randn(num_nodes, 8),
        y=torch.randint(0, 3, (num_nodes,)),
        edge_index=edge_index,
        edge_attr=torch.rand(edge_index.shape[1], 1) + 0.1,
    )


class SAGE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList([SAGEConv(8, 8), SAGEConv(8, 3)])

    def forward(self, x, edge_index, trim=None):
        for i, layer in enumerate(self.layers):
            if trim is not None:
                x, edge_index, _ = trim_to_layer(i, *trim, x, edge_index)
            x = layer(x, edge_index).relu()
        return x


def test_batches_are_subgraphs_with_the_seeds_first():
    data, fanouts = graph(), [4, 3]
    loader = NodeLoader(data, PyGSampler(data, fanouts, seed=0), input_nodes=torch.arange(0, 150, 4), batch_size=10)
    seen = []
    for batch in loader:
        seen.append(batch.n_id[: batch.batch_size])
        assert torch.equal(batch.x, data.x[batch.n_id]) and torch.equal(batch.y, data.y[batch.n_id])
        assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
        assert torch.equal(batch.edge_attr, data.edge_attr[batch.e_id])
        assert len(batch.e_id.unique()) == len(batch.e_id)  # without replacement
        assert len(batch.n_id.unique()) == len(batch.n_id)
        assert sum(batch.num_sampled_nodes) == batch.num_nodes and sum(batch.num_sampled_edges) == batch.num_edges
        # Every node but those of the last hop has drawn min(fanout of its hop, in-degree) edges.
        hop = np.repeat(np.arange(3), batch.num_sampled_nodes)
        drawn = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes).numpy()
        degree = torch.bincount(data.edge_index[1], minlength=150)[batch.n_id].numpy()
        want = np.where(hop < 2, np.minimum(degree, np.array([*fanouts, 0])[hop]), 0)
        np.testing.assert_array_equal(drawn, want)
    assert torch.equal(torch.cat(seen), torch.arange(0, 150, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_on_all_neighbors_gives_what_it_gives_on_the_whole_graph(workers):
    data, model = graph(), SAGE()
    whole = model(data.x, data.edge_index)
    loader = NodeLoader(data, PyGSampler(data, [-1, -1]), batch_size=64, num_workers=workers)
    parts, trimmed = [], []
    for batch in loader:
        parts.append(model(batch.x, batch.edge_index)[: batch.batch_size])
        trim = (batch.num_sampled_nodes, batch.num_sampled_edges)
        trimmed.append(model(batch.x, batch.edge_index, trim)[: batch.batch_size])
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(torch.cat(trimmed), whole)


def test_all_neighbors_are_the_k_hop_subgraph():
    data = graph(400, 600)
    batch = next(iter(NodeLoader(data, PyGSampler(data, [-1, -1]), input_nodes=torch.tensor([3, 50]), batch_size=2)))
    nodes, _, _, _ = k_hop_subgraph([3, 50], 2, data.edge_index)
    assert torch.equal(batch.n_id.sort().values, nodes)


def test_the_same_seed_repeats_a_run_and_epochs_differ():
    data = graph()

    def edges(seed: int) -> list[list[int]]:
        loader = NodeLoader(data, PyGSampler(data, [2, 2], seed=seed), batch_size=50)
        return [[*batch.e_id.tolist()] for _ in range(2) for batch in loader]

    assert edges(1) == edges(1) != edges(2)
    assert edges(1)[:3] != edges(1)[3:]


def test_weights_are_drawn_by():
    edge_index = torch.stack([torch.arange(1, 11), torch.zeros(10, dtype=torch.long)])
    data = Data(edge_index=edge_index, num_nodes=11, w=torch.tensor([1e6] * 2 + [1e-6] * 8))
    for batch in NodeLoader(data, PyGSampler(data, [2], weight="w"), input_nodes=torch.zeros(5).long(), batch_size=1):
        assert batch.n_id.tolist() == [0, 1, 2]


def test_bad_arguments_say_what_is_wrong():
    data = graph()
    for fanouts in (10, [], [0], [2.5], "10", ["10"], None):
        with pytest.raises(ConfigError, match=r"expected a list of positive integers or -1 .* such as \[10, 5\]; got"):
            PyGSampler(data, fanouts)
    PyGSampler(data, np.array([3, -1])), PyGSampler(data, (3, -1))
    for wrong in (HeteroData(), Data(x=data.x), FakeDataset(num_graphs=1)):
        with pytest.raises(DataError, match=r"edge_index; got \w+\. Of a data set give one graph, dataset\[0\]"):
            PyGSampler(wrong, [1])
    for weight in ("weihgt", 3, data.edge_attr):
        with pytest.raises(DataError, match="name of an edge attribute .*; got .* This data has edge_attr$"):
            PyGSampler(data, [1], weight=weight)
    bare = Data(edge_index=data.edge_index, num_nodes=150)
    with pytest.raises(DataError, match="got 'w'. This data has no edge attributes"):
        PyGSampler(bare, [1], weight="w")
    with pytest.raises(DataError, match=r"edge_index\[0\].*0\.\.1; got 0\.\.7"):
        PyGSampler(Data(edge_index=torch.tensor([[0, 7], [1, 1]]), num_nodes=2), [1])
    with pytest.raises(DataError, match="positive"):
        PyGSampler(Data(edge_index=torch.tensor([[0], [1]]), num_nodes=2, w=torch.zeros(1)), [1], weight="w")
