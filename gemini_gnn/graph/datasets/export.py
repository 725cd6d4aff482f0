"""A graph in a few lines of text; and its edges as a file for other programs."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np

from gemini_gnn.errors import DataError
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.partition.quality import described


def summary(graph: Graph) -> dict[str, str]:
    """Name -> text, for a table. Homophily is the share of edges whose two ends have the same label."""
    degree = np.diff(graph.colptr)
    rows = {
        "nodes": f"{graph.num_nodes:,} ({int((degree == 0).sum()):,} without in-edges)",
        "edges": f"{graph.num_edges:,} directed{'' if graph.edge_weight is None else ', weighted'}",
        "in-degree": f"mean {degree.mean():.2f}, median {np.median(degree):.0f}, max {degree.max():,}",
        "features": f"{described(graph.x)}, {graph.notes.get('features', 'as given')}",
    }
    if graph.num_classes == 0:
        rows["classes"] = "no labels: can be partitioned and sampled, not trained on"
    elif graph.multi_label:
        rows["classes"] = f"{graph.num_classes}, several per node"
    else:
        labelled = int((graph.y >= 0).sum())
        rows["classes"] = f"{graph.num_classes}, {labelled:,} nodes labelled"
        target = np.repeat(graph.y, degree)
        source = graph.y[graph.row]
        known = (source >= 0) & (target >= 0)
        if known.any():
            rows["homophily"] = f"{float((source == target)[known].mean()):.3f}"
    parts = (graph.train_mask, graph.val_mask, graph.test_mask)
    rows["train / val / test"] = " / ".join(f"{int(mask.sum()):,}" for mask in parts)
    return rows | {name: text for name, text in graph.notes.items() if name not in rows}


def export_edges(graph: Graph, path: Path) -> None:
    """Write ``source,target[,weight]`` in the user's ids, one line per directed edge, gzip if the name ends in .gz.

    The file appears when it is complete. Read back with ``dataset=edge_list`` (and ``dataset.ids=str`` for text ids) it
    gives the same edges.

    Raises:
        DataError: the file cannot be written.
    """
    import pandas

    target = np.repeat(np.arange(graph.num_nodes), np.diff(graph.colptr))
    columns = {
        "source": graph.row if graph.node_ids is None else graph.node_ids[graph.row],
        "target": target if graph.node_ids is None else graph.node_ids[target],
    }
    if graph.edge_weight is not None:
        columns["weight"] = graph.edge_weight
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    compression = {"method": "gzip", "mtime": 1} if path.suffix == ".gz" else None
    try:
        frame = pandas.DataFrame(columns)
        frame.to_csv(temporary, header=False, index=False, compression=compression)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; choose another file for export=") from None
    finally:
        temporary.unlink(missing_ok=True)
