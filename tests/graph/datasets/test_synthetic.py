"""Generators: what they promise of degrees, blocks and labels, that a seed is a graph, and the two baselines."""

from dataclasses import replace

import numpy as np
import pytest

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import ConfigError, DataError
from gemini_gnn.graph.baselines import features_only_accuracy, logistic_regression, structure_only_accuracy
from gemini_gnn.graph.datasets import fingerprint, load_dataset
from gemini_gnn.graph.datasets.synthetic import (
    NAMES,
    block_pairs,
    configuration_pairs,
    powerlaw_degrees,
    preferential_pairs,
)


def ends(graph):
    return graph.row, np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))


@pytest.fixture(scope="module")
def blocks():
    return load_dataset(DatasetConfig())


@pytest.mark.parametrize("name", NAMES)
def test_every_generator(name):
    config = DatasetConfig(name=name, nodes=3_000, degree=10, classes=5, groups=1, feature_dim=7)
    graph = load_dataset(config)
    source, target = ends(graph)
    assert (source != target).all(), "no self-loops"
    key = source.astype(np.int64) * 3_000 + target
    assert len(np.unique(key)) == len(key), "no parallel edges"
    assert np.array_equal(np.sort(key), np.sort(target.astype(np.int64) * 3_000 + source)), "both directions"
    assert 8.5 < graph.num_edges / 3_000 <= 10
    assert graph.x.shape == (3_000, 7) and graph.num_classes == 5
    assert [int(m.sum()) for m in (graph.train_mask, graph.val_mask, graph.test_mask)] == [300, 300, 2_400]
    again, other = load_dataset(config), load_dataset(replace(config, seed=1))
    for array in ("colptr", "row", "x", "y", "train_mask"):
        assert np.array_equal(getattr(graph, array), getattr(again, array)), "a seed is a graph"
        assert not np.array_equal(getattr(graph, array), getattr(other, array))
    assert (
        fingerprint(config) == fingerprint(replace(config, cache="/elsewhere")) != fingerprint(replace(config, seed=1))
    )


def test_the_default_graph_is_the_one_described(blocks):
    source, target = ends(blocks)
    y, group = blocks.y, blocks.y % 4
    assert (blocks.num_nodes, blocks.num_classes, blocks.x.shape[1]) == (20_000, 12, 64)
    assert [int(m.sum()) for m in (blocks.train_mask, blocks.val_mask, blocks.test_mask)] == [2_000, 2_000, 16_000]
    assert 11.8 < blocks.num_edges / blocks.num_nodes <= 12
    inside, near = y[source] == y[target], group[source] == group[target]
    assert abs(inside.mean() - 0.5) < 0.01, "half the edges inside the class"
    assert abs((near & ~inside).sum() / (~inside).sum() - 0.6) < 0.01, "60 % of the rest inside the super-group"
    means = np.array([blocks.x[y == c].mean(axis=0) for c in range(12)])
    assert np.allclose(np.linalg.norm(means, axis=1), 2.0, atol=0.15), "2.0 x unit class mean"
    assert abs((blocks.x - means[y]).std() - 1) < 0.01
    degree = np.diff(blocks.colptr)
    assert 8 * degree.mean() < degree.max() < 50 * degree.mean(), "propensities reach from 1 to 50"


def test_baselines_know_half_each(blocks):
    features, structure = features_only_accuracy(blocks), structure_only_accuracy(blocks)
    # Measured over seeds 0..3: .593-.603 and .575-.596; chance is .083.
    assert 0.56 < features < 0.63 and 0.55 < structure < 0.62
    assert features == features_only_accuracy(blocks) and structure == structure_only_accuracy(blocks)


def test_baselines_are_blind_to_the_other_half(blocks):
    noise = np.random.default_rng(0).standard_normal(blocks.x.shape).astype(np.float32)
    assert features_only_accuracy(replace(blocks, x=noise)) < 0.12
    assert structure_only_accuracy(replace(blocks, x=noise)) == structure_only_accuracy(blocks)
    no_edges = replace(blocks, colptr=np.zeros_like(blocks.colptr), row=blocks.row[:0])
    assert structure_only_accuracy(no_edges) < 0.12
    assert features_only_accuracy(no_edges) == features_only_accuracy(blocks)
    with pytest.raises(DataError, match="test split is empty"):
        features_only_accuracy(replace(blocks, test_mask=np.zeros(20_000, dtype=bool)))


def test_logistic_regression_finds_the_minimum():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 3)), rng.integers(3, size=50)
    weights = logistic_regression(x, y, np.zeros((4, 3)), penalty=0.1)
    logits = x @ weights[:-1] + weights[-1]
    error = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(3)[y]
    gradient = np.vstack([x.T @ error / 50 + 0.1 * weights[:-1], error.mean(axis=0)])
    assert np.abs(gradient).max() < 1e-4


def test_blocks_without_others_send_their_edges_elsewhere():
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4
    u, v = block_pairs(y, y, np.ones(400), 4_000, 0.5, 0.6, rng)  # each class is its own super-group
    assert abs((y[u] == y[v]).mean() - 0.5) < 0.05
    one = np.zeros(400, dtype=np.int64)
    u, v = block_pairs(one, one, np.ones(400), 4_000, 0.5, 0.6, rng)  # there is nowhere else to go
    assert u.min() >= 0 and v.max() < 400 and len(np.unique(v)) > 390


def test_powerlaw_degrees_have_the_mean_and_the_minimum_asked_for():
    for mean, least in ((12, 5), (20, 5), (40, 2)):
        degrees = powerlaw_degrees(200_000, mean, least, np.random.default_rng(0))
        assert degrees.min() >= least and abs(degrees.mean() - mean) < 0.05 * mean
        assert degrees.max() > 50 * mean, "skewed"
    ends_of = np.bincount(np.concatenate(configuration_pairs(degrees, np.random.default_rng(1))), minlength=200_000)
    assert (degrees - ends_of).sum() in (0, 1), "every edge end is used, but for an odd one"


def test_preferential_attachment_follows_degrees():
    new, old = preferential_pairs(20_000, 3, np.random.default_rng(0))
    assert (old <= new).all() and np.array_equal(np.bincount(new), np.full(20_000, 3))
    degree = np.bincount(np.concatenate([new, old]))
    # P(degree >= k) = m (m + 1) / (k (k + 1)) in the limit (Bollobas et al. 2001)
    for k in (6, 12, 30):
        assert abs((degree >= k).mean() / (3 * 4 / (k * (k + 1))) - 1) < 0.15
    assert degree[:100].mean() > 20 * degree[10_000:].mean() / 4


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"nodes": 1}, r"dataset\.nodes: expected at least 2; got 1"),
        ({"degree": 0.0}, r"dataset\.degree: expected more than 0"),
        ({"nodes": 100, "degree": 100.0}, r"less than dataset\.nodes=100; got 100"),
        ({"classes": 0}, r"dataset\.classes"),
        ({"groups": 13}, r"dataset\.groups: expected 1 to dataset\.classes=12; got 13"),
        ({"feature_dim": 0}, r"dataset\.feature_dim"),
        ({"name": "powerlaw", "min_degree": 12.0}, r"dataset\.min_degree: .*less than dataset\.degree=12"),
        ({"min_degree": 3.0}, r"dataset\.min_degree: expected its default 5\.0, because dataset\.name=blocks does not"),
    ],
)
def test_impossible_sizes(settings, wanted):
    with pytest.raises(ConfigError, match=wanted):
        load_dataset(DatasetConfig(**settings))
