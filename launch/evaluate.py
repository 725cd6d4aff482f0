#!/usr/bin/env python
"""Evaluate a finished run: `python launch/evaluate.py run_dir=runs/cora [out=FOLDER] [dataset=... ...]`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemini_gnn.compose import command, compose, take
from gemini_gnn.config import from_mapping, to_mapping
from gemini_gnn.errors import ConfigError
from gemini_gnn.observe.progress import say
from gemini_gnn.observe.run_directory import read_config

PURPOSE = """Evaluate a finished run by exact layer-wise inference.
  python launch/evaluate.py run_dir=runs/cora               on the graph it was trained on
  python launch/evaluate.py run_dir=runs/cora dataset=...   on another graph with the same features
  out=FOLDER   folder for predictions.npy, embeddings.npy, logits.npy and ids.npy (default RUN_DIR/evaluation);
               row i of each is node ids[i], in the order of the original data"""


def main(arguments: list[str]) -> int:
    from gemini_gnn import api
    from gemini_gnn.graph import datasets
    from gemini_gnn.graph.partition.folder import PartitionedGraph
    from gemini_gnn.training import metrics

    overrides, named = take(arguments, "run_dir", "out")
    if "run_dir" not in named:
        raise ConfigError("expected run_dir=FOLDER of a finished run")
    run_dir = Path(named["run_dir"])
    trained = read_config(run_dir)
    if any(a.startswith("dataset=") for a in overrides):
        config = compose(overrides)
    else:  # the run's own data set, with changes such as dataset.root=...
        from omegaconf import OmegaConf

        config = from_mapping(OmegaConf.merge(to_mapping(trained), OmegaConf.from_dotlist(overrides)))
    if config.dataset.name == "partitioned":
        graph = PartitionedGraph.open(str(config.partition.folder)).as_graph()
    else:
        graph = datasets.load_dataset(config.dataset, say, require_labels=False, layout=config.features.layout)
    out = Path(named.get("out") or run_dir / "evaluation")
    out.mkdir(parents=True, exist_ok=True)
    found = api.predict(run_dir, graph)
    for name, array in found.items():
        np.save(out / f"{name}.npy", array)
    print(f"{graph.name}: {graph.num_nodes:,} nodes, {graph.num_edges:,} edges")
    for split in ("train", "val", "test"):
        mask = getattr(graph, f"{split}_mask")
        if mask.any():
            got = metrics.from_counts(metrics.counts(found["logits"][mask], graph.y[mask]))
            values = "  ".join(f"{k} {v:.4f}" for k, v in got.items())
            print(f"  {split:<5} {int(mask.sum()):>9,} nodes  {values}")
    print(f"written to {out}: {', '.join(f'{name}.npy' for name in found)}")
    return 0


if __name__ == "__main__":
    command(main, PURPOSE)
