"""Test accuracy without the graph and without the features, as JSON: `python launch/baselines.py [OVERRIDES]`.

Computed once per data set, then read from the cache folder.
"""

from __future__ import annotations

import json

from gemini_gnn.compose import command, compose

PURPOSE = "Print the test accuracy of two baselines: logistic regression on features alone, and structure alone."


def main(arguments: list[str]) -> int:
    from gemini_gnn.files import write_atomically
    from gemini_gnn.graph import datasets
    from gemini_gnn.graph.baselines import features_only_accuracy, structure_only_accuracy
    from gemini_gnn.graph.datasets.files import cache_folder

    config = compose(arguments)
    kept = cache_folder(config.dataset) / "baselines" / f"{datasets.fingerprint(config.dataset)}.json"
    if not kept.exists():
        graph = datasets.load_dataset(config.dataset, layout=config.features.layout)
        found = {
            "features alone": features_only_accuracy(graph),
            "structure alone": structure_only_accuracy(graph),
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(found))
    print(kept.read_text())
    return 0


if __name__ == "__main__":
    command(main, PURPOSE)
