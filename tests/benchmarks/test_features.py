"""The contenders of benchmarks/features.py get the graph that its text describes."""

import sys
from pathlib import Path

import numpy as np

from gemini_gnn.compose import compose
from gemini_gnn.graph.datasets import load_dataset

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def test_words_and_their_twin_with_one_feature(tmp_path):
    import features

    features.write_words(tmp_path / "words", nodes=300, width=600, filled=0.05)
    dataset = ["dataset=folder", f"dataset.path={tmp_path / 'words'}", "dataset.split='random:0.6,0.2,0.2'"]
    config = compose(features.settings(dataset, "dense", 1, 1, tmp_path / "run", tmp_path / "cache"))
    features.narrow(config, tmp_path / "narrow")
    words = load_dataset(config.dataset, layout="dense")
    config.dataset.path = str(tmp_path / "narrow")
    twin = load_dataset(config.dataset)
    assert words.x.shape == (300, 600) and twin.x.shape == (300, 1)
    assert 0.04 < (words.x == 1).mean() <= 0.05 and set(np.unique(words.x)) == {0.0, 1.0}
    assert np.array_equal(words.row, twin.row) and np.array_equal(words.colptr, twin.colptr)


def test_an_epoch_of_pyg(tmp_path):
    import features

    features.write_words(tmp_path / "words", nodes=300, width=600, filled=0.05)
    dataset = ["dataset=folder", f"dataset.path={tmp_path / 'words'}", "dataset.split='random:0.6,0.2,0.2'"]
    config = compose(features.settings(dataset, "dense", 1, 1, tmp_path / "run", tmp_path / "cache"))
    assert features.pyg_epoch(config)(0) > 0
