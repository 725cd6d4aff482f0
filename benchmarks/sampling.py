"""Edges sampled per second, beside a NetworkX sampler and PyG's NeighborLoader, on one core with one thread each.

    python benchmarks/sampling.py

Graphs: a skewed one of 1 M nodes and 20 M edges with at least 5 in-edges per node (both ends drawn by a Pareto propensity,
so that fanouts bind and hubs are met often), and ego-twitter where $GEMINI_GNN_DATA has it. Batches of 1024 random seeds,
fanouts 15, 10, 5. All contenders get the same seeds, take turns, and report the median over the batches.

Contenders. `blocks` is NeighborSampler, which training uses: a stack of bipartite blocks with their transposes and all
degrees, every known node drawn anew at each hop. `PyGSampler` draws each node once and returns one subgraph, exactly what
NeighborLoader's sampler does; `NodeLoader + PyGSampler` and `NeighborLoader` add what PyG's loaders do around it. The
NetworkX sampler is the one anybody writes first: a set of known nodes, `random.sample` over `graph.predecessors`.
"""

from __future__ import annotations

import argparse
import os
import random
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import in_turns, machine, median, write

from gemini_gnn.graph.graph import from_edges
from gemini_gnn.sampling.in_edges import ReplicatedInEdges
from gemini_gnn.sampling.sampler import NeighborSampler, transposed

FANOUTS, SEEDS = [15, 10, 5], 1024


def skewed_graph(nodes: int, edges: int, seed: int = 0):
    """``(colptr, row)``: at least 5 in-edges per node, the others and all sources by a Pareto(1.8) propensity."""
    rng = np.random.default_rng(seed)
    propensity = rng.pareto(1.8, nodes) + 0.1
    propensity /= propensity.sum()
    degree = 5 + np.floor(propensity * (edges - 5 * nodes) + rng.random(nodes)).astype(np.int64)
    source = np.searchsorted(np.cumsum(propensity), rng.random(int(degree.sum()))).clip(max=nodes - 1)
    target = np.repeat(np.arange(nodes), degree)
    colptr, row, _ = from_edges(source, target, nodes)
    return colptr, row


def ego_twitter(root: str | None):
    """``(colptr, row)`` of the undirected graph, or None where the file is missing."""
    import pandas

    path = Path(root or "") / "edge_lists" / "ego-twitter.txt.gz"
    if not root or not path.exists():
        return None
    pairs = pandas.read_csv(path, skiprows=1, header=None).to_numpy() - 1
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    colptr, row, _ = from_edges(pairs[:, 0], pairs[:, 1], int(pairs.max()) + 1)
    return colptr, row


def networkx_graph(colptr, row):
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(colptr) - 1))
    target = np.repeat(np.arange(len(colptr) - 1), np.diff(colptr))
    for begin in range(0, len(row), 1 << 20):  # in pieces: a list of all pairs would take more room than the graph
        piece = slice(begin, begin + (1 << 20))
        graph.add_edges_from(zip(row[piece].tolist(), target[piece].tolist(), strict=True))
    return graph


def networkx_sample(graph, seeds, fanouts, generator: random.Random):
    """The k-hop subgraph as ``(nodes, edge_index)``; each node draws once, at the hop after it was found."""
    local = {v: i for i, v in enumerate(seeds)}
    edges = []
    frontier = list(seeds)
    for fanout in fanouts:
        found = []
        for v in frontier:
            neighbors = list(graph.predecessors(v))
            if len(neighbors) > fanout:
                neighbors = generator.sample(neighbors, fanout)
            for u in neighbors:
                if u not in local:
                    local[u] = len(local)
                    found.append(u)
                edges.append((local[u], local[v]))
        frontier = found
    return np.array(list(local)), np.array(edges).T


def pyg_neighbor_loader(data):
    """A NeighborLoader that can sample, or the reason why there is none."""
    from torch_geometric.loader import NeighborLoader

    try:
        loader = NeighborLoader(data, num_neighbors=FANOUTS, batch_size=SEEDS)
        loader(torch.arange(1))
        return loader, None
    except ImportError as error:
        return None, str(error)


def measure(name: str, colptr, row, batches: int, with_networkx: bool, clock) -> dict:
    from torch_geometric.data import Data
    from torch_geometric.loader import NodeLoader
    from torch_geometric.sampler import NodeSamplerInput

    from gemini_gnn.sampling.pyg import PyGSampler

    nodes = len(colptr) - 1
    degree = np.diff(colptr)
    print(f"\n{name}: {nodes:,} nodes, {len(row):,} edges, in-degree {degree.min()}..{degree.max():,}")
    rng = np.random.default_rng(1)
    seeds = [rng.choice(nodes, SEEDS, replace=False) for _ in range(batches)]

    in_edges = ReplicatedInEdges(colptr, row, np.arange(nodes))
    began = time.perf_counter()
    sampler = NeighborSampler(in_edges, FANOUTS, seed=0)
    made_s = time.perf_counter() - began
    began = time.perf_counter()
    sampler.sample(seeds[0], 0, 0)
    first_s = time.perf_counter() - began
    print(f"  sampler made in {made_s:.2f} s (kernels compiled or loaded), first batch {first_s * 1e3:.0f} ms")

    target = np.repeat(np.arange(nodes), degree)
    data = Data(edge_index=torch.from_numpy(np.stack([row.astype(np.int64), target])), num_nodes=nodes)
    ours = PyGSampler(data, FANOUTS, seed=0)
    node_loader = NodeLoader(data, ours, batch_size=SEEDS)
    peer, missing = pyg_neighbor_loader(data)
    if missing:
        print(f"  no NeighborLoader: {missing}")

    def by_pyg_sampler(i: int) -> int:
        return len(ours.sample_from_nodes(NodeSamplerInput(None, torch.from_numpy(seeds[i]))).row)

    kept: list = [None]

    def by_blocks(i: int) -> int:
        kept[0] = sampler.sample(seeds[i], 0, i)  # the previous batch is freed while the next exists, as in training
        return kept[0].num_edges

    contenders = {
        "blocks": by_blocks,
        "PyGSampler": by_pyg_sampler,
        "NodeLoader + PyGSampler": lambda i: node_loader(torch.from_numpy(seeds[i])).edge_index.shape[1],
    }
    if peer is not None:
        contenders["NeighborLoader"] = lambda i: peer(torch.from_numpy(seeds[i])).edge_index.shape[1]
    for call in contenders.values():
        call(0)
    taken = in_turns(contenders, batches, clock)
    if with_networkx:
        graph, generator = networkx_graph(colptr, row), random.Random(0)
        few = {
            "blocks beside NetworkX": by_blocks,
            "NetworkX": lambda i: networkx_sample(graph, seeds[i].tolist(), FANOUTS, generator)[1].shape[1],
        }
        taken |= in_turns(few, min(batches, 5), clock)
        del graph

    contenders_result = {}
    for contender, runs in taken.items():
        rate = median(edges / seconds for seconds, edges in runs)
        contenders_result[contender] = {
            "edges_per_s": rate,
            "batch_s": median(seconds for seconds, _ in runs),
            "edges_per_batch": median(edges for _, edges in runs),
            "batches": len(runs),
        }
        r = contenders_result[contender]
        print(
            f"  {contender:24s} {rate / 1e6:8.3f} M edges/s {r['batch_s'] * 1e3:9.2f} ms/batch "
            f"{r['edges_per_batch']:10,.0f} edges/batch"
        )
    rates = {contender: r["edges_per_s"] for contender, r in contenders_result.items()}
    ratios = {}
    if "NetworkX" in rates:
        ratios["blocks / NetworkX"] = rates["blocks beside NetworkX"] / rates["NetworkX"]
    if "NeighborLoader" in rates:
        for contender in ("blocks", "PyGSampler", "NodeLoader + PyGSampler"):
            ratios[f"{contender} / NeighborLoader"] = rates[contender] / rates["NeighborLoader"]
    for pair, ratio in ratios.items():
        print(f"  {pair}: {ratio:.1f}x edges/s")

    shares = {"transposes": [], "degrees": []}
    for i in range(min(batches, 10)):
        batch = sampler.sample(seeds[i], 0, i)
        began = clock()
        for block in batch.blocks:
            transposed(block.indptr, block.indices, block.num_src)
        middle = clock()
        in_edges.degrees(batch.input_nodes)
        shares["transposes"].append(middle - began)
        shares["degrees"].append(clock() - middle)
    shares_of_batch = {k: median(v) / contenders_result["blocks"]["batch_s"] for k, v in shares.items()}
    print("  of a batch of blocks: " + ", ".join(f"{k} {v:.0%}" for k, v in shares_of_batch.items()))
    return {
        "nodes": nodes,
        "edges": len(row),
        "min_in_degree": int(degree.min()),
        "max_in_degree": int(degree.max()),
        "sampler_made_s": made_s,
        "first_batch_s": first_s,
        "contenders": contenders_result,
        "ratios": ratios,
        "share_of_batch": shares_of_batch,
        "no_neighbor_loader": missing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, default=20_000_000)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument(
        "--networkx-skewed", action="store_true", help="NetworkX on the skewed graph too: about 8 GB and two minutes"
    )
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine with other users")
    parser.add_argument("--output", default="results/sampling.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # PyG says on import which extensions are missing
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    head = machine()
    print(f"{head['cpu']}, {head['cores']} cores (one used), load {head['load_1min']:.1f}, {head['versions']}")
    results = {"machine": head, "clock": arguments.clock, "fanouts": FANOUTS, "seeds": SEEDS, "graphs": {}}
    graph = skewed_graph(arguments.nodes, arguments.edges)
    results["graphs"]["skewed"] = measure("skewed", *graph, arguments.batches, arguments.networkx_skewed, clock)
    graph = ego_twitter(os.environ.get("GEMINI_GNN_DATA"))
    if graph is None:
        print("\nego-twitter: not found; set GEMINI_GNN_DATA to a folder with edge_lists/ego-twitter.txt.gz")
    else:
        results["graphs"]["ego-twitter"] = measure("ego-twitter", *graph, arguments.batches, True, clock)
    write(arguments.output, results)


if __name__ == "__main__":
    main()
