"""Time, peak memory, cut and balances of METIS and hash, beside the pymetis call a user would write.

    python benchmarks/partitioning.py [--quick] [--parts 4] [--out results/partitioning.json]

Graphs: ego-twitter and Computers where $GEMINI_GNN_DATA has them, and a synthetic power-law graph of 10 M edges whose
edges are random: it has no good cut, which is METIS' worst case in time and memory (`--quick`: 1 M edges). Where a
graph has no split, a random tenth of the nodes are seeds. `pymetis` is pymetis.part_graph on scipy's A + A^T as it comes:
no evening of seeds; `metis` and `hash` are partition_nodes.

Every row is a process of its own. Its peak memory is the kernel's high-water mark (VmHWM), reset when the graph is loaded,
minus what was resident then: what partitioning needs on top of the graph. METIS, which otherwise runs in a forked child
(its memory shared in part with the parent's), runs in the row's own process for this.
Writing the folder is timed and measured apart. Times include neither imports nor loading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from common import machine, write

LIMIT_S = 1800


def data_sets(quick: bool) -> dict[str, list[str]]:
    """Name -> overrides of the command line."""
    nodes = 50_000 if quick else 500_000
    found = {f"powerlaw-{nodes * 20 // 10**6}M": ["dataset=powerlaw", f"dataset.nodes={nodes}", "dataset.degree=20"]}
    root = Path(os.environ.get("GEMINI_GNN_DATA") or "/nonexistent")
    if (root / "edge_lists" / "ego-twitter.txt.gz").exists():
        found["ego-twitter"] = ["dataset=ego_twitter"]
    if (root / "amazon" / "Computers").is_dir():
        found["computers"] = ["dataset=computers"]
    return found


def measured(overrides: list[str], contender: str, parts: int) -> dict:
    """One row, in this process."""
    import numpy as np

    from gemini_gnn.compose import compose
    from gemini_gnn.graph.datasets import load_dataset
    from gemini_gnn.graph.partition import metis, quality
    from gemini_gnn.graph.partition.assign import partition_nodes
    from gemini_gnn.graph.partition.write import write_partitioned

    metis.in_child = lambda call: call()
    config = compose(overrides)
    graph = load_dataset(config.dataset, require_labels=False)
    if not graph.train_mask.any():
        graph = replace(graph, train_mask=np.random.default_rng(0).random(graph.num_nodes) < 0.1)
    metis.part_graph(metis.symmetrise(np.array([0, 1, 2]), np.array([1, 0], np.int32)), 2)  # imports
    resident = start_watching()
    began = time.perf_counter()
    if contender == "pymetis":
        assignment = plain_pymetis(graph, parts)
    else:
        method, _, edges = contender.partition("+")
        assignment = partition_nodes(graph, method, parts, balance_edges=bool(edges))
    row = {"partition_s": time.perf_counter() - began, "partition_peak_bytes": peak() - resident}
    with tempfile.TemporaryDirectory() as folder:
        resident = start_watching()
        began = time.perf_counter()
        pg = write_partitioned(graph, assignment, Path(folder) / "p", method="", settings={}, fingerprint="")
        row |= {"write_s": time.perf_counter() - began, "write_peak_bytes": peak() - resident}
        predicted = quality.sampled_epoch_bytes(
            pg.bounds, pg.colptr, pg.row, pg.train_mask, [10, 10], 512, 4 * pg.x.shape[1]
        )
        row |= asdict(pg.meta.quality) | {"sampled_epoch_bytes": predicted}
    return row | {"num_nodes": graph.num_nodes, "num_edges": graph.num_edges}


def plain_pymetis(graph, parts: int):
    import numpy as np
    import pymetis
    from scipy.sparse import csc_array

    n = graph.num_nodes
    a = csc_array((np.ones(graph.num_edges, dtype=np.int8), graph.row, graph.colptr), shape=(n, n))
    a = (a + a.T).tocsr()
    a.setdiag(0)
    a.eliminate_zeros()
    adjacency = pymetis.CSRAdjacency(a.indptr.astype(np.int64), a.indices.astype(np.int64))
    return np.array(pymetis.part_graph(parts, adjacency)[1], dtype=np.int32)


def start_watching() -> int:
    """Reset the high-water mark; resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--out", default="results/partitioning.json")
    parser.add_argument("--row", nargs=2, metavar=("CONTENDER", "OVERRIDES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measured(json.loads(options.row[1]), options.row[0], options.parts)))
        return
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load_1min']:.1f}; {options.parts} parts")
    results: dict = {"machine": where, "parts": options.parts, "rows": {}, "ratios": {}}
    head = (
        f"{'graph':<14}{'method':<12}{'cut s':>8}{'MiB':>7}{'write s':>9}{'MiB':>6}{'edge cut':>10}{'nodes':>8}"
        f"{'edges':>8}{'seeds':>8}{'replic.':>9}{'MiB/epoch':>11}"
    )
    for name, overrides in data_sets(options.quick).items():
        rows = {}
        for contender in ("hash", "pymetis", "metis", "metis+edges"):
            command = [
                sys.executable,
                __file__,
                "--parts",
                str(options.parts),
                "--row",
                contender,
                json.dumps(overrides),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True)
            rows[contender] = row = json.loads(done.stdout.splitlines()[-1])
            if contender == "hash":
                print(f"\n{name}: {row['num_nodes']:,} nodes, {row['num_edges']:,} edges\n{head}")
            print(
                f"{name:<14}{contender:<12}{row['partition_s']:>8.2f}{row['partition_peak_bytes'] / 2**20:>7.0f}"
                f"{row['write_s']:>9.2f}{row['write_peak_bytes'] / 2**20:>6.0f}{row['edge_cut']:>10.3f}"
                f"{row['node_balance']:>8.3f}{row['edge_balance']:>8.3f}{row['seed_balance']:>8.3f}"
                f"{row['replication']:>9.2f}{row['sampled_epoch_bytes'] / 2**20:>11.1f}",
                flush=True,
            )
        results["rows"][name] = rows
        results["ratios"][name] = ratios = {
            "cut_hash_over_metis": rows["hash"]["edge_cut"] / rows["metis"]["edge_cut"],
            "bytes_hash_over_metis": rows["hash"]["sampled_epoch_bytes"] / rows["metis"]["sampled_epoch_bytes"],
            "time_metis_over_pymetis": rows["metis"]["partition_s"] / rows["pymetis"]["partition_s"],
            "memory_metis_over_pymetis": rows["metis"]["partition_peak_bytes"]
            / rows["pymetis"]["partition_peak_bytes"],
            "hash_edges_max_over_min": max(rows["hash"]["edges"]) / min(rows["hash"]["edges"]),
        }
        print("  ".join(f"{what} {value:.2f}" for what, value in ratios.items()))
    print(
        "\nMiB behind cut s and write s: peak memory on top of the graph. nodes, edges, seeds: largest part / mean. "
        "MiB/epoch: predicted, fanouts 10, 10 and 512 seeds per rank."
    )
    write(options.out, results)


if __name__ == "__main__":
    main()
