#!/usr/bin/env python
"""Get a data set ready: `python launch/prepare.py dataset=cora [export=edges.csv]`.

It downloads and converts the data set where there is a network (compute nodes often have none), describes it, and exports
its edges as CSV on request.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gemini_gnn.compose import command, compose, take

PURPOSE = (
    "Download, convert and describe a data set. export=FILE.csv[.gz] also writes its edges as source,target[,weight]."
)


def main(arguments: list[str]) -> int:
    from gemini_gnn.graph.datasets import fingerprint, load_dataset
    from gemini_gnn.graph.datasets.export import export_edges, summary

    overrides, extras = take(arguments, "export")
    settings = compose(overrides)
    config = settings.dataset

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    began = time.monotonic()
    graph = load_dataset(config, progress, require_labels=False, layout=settings.features.layout)
    rows = (
        {"graph": f"{graph.name} [{fingerprint(config)}]"}
        | summary(graph)
        | {"loaded in": f"{time.monotonic() - began:.2f} s"}
    )
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
    if "export" in extras:
        export_edges(graph, Path(extras["export"]).expanduser())
        print(f"{'edges in':<{width}}  {extras['export']}")
    return 0


if __name__ == "__main__":
    command(main, PURPOSE)
