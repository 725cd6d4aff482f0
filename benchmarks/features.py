"""Bag-of-words features sparse and dense: time per epoch, bytes between ranks, memory.

    python benchmarks/features.py                       # minutes; GEMINI_GNN_DATA names the folder with Computers
    python benchmarks/features.py --nodes 4000 --width 2000 --rounds 1 --only words

Graphs. `words`: 20,000 nodes in 15 communities, 7,000 features, 1 % of them 1, the rest 0, as Coauthor CS. `computers`: 767
features, 35 % filled, so `auto` takes dense. GraphSAGE (mean) 2 x 256, fanouts 10, 10, two ranks with gloo, and `sparse`
on one rank beside PyG. Every contender first trains one epoch, which partitions the graph and compiles; then they take turns.

Memory is the peak resident size of a rank (the larger one, `peak_rss_bytes` of result.json) beyond that of the same ranks
on the same edges with one feature per node. What both hold (Python, torch, the graph) is thereby left out.

PyG. One process, SAGEConv's function with the first product sparse: the batch's rows of a scipy CSR matrix as a torch CSR
tensor, ``torch.sparse.mm`` with the transposed weight, then the mean. Batches from NodeLoader over PyGSampler.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from common import in_turns, machine, median, write

from gemini_gnn.compose import compose
from gemini_gnn.config import Config
from gemini_gnn.errors import DataError

HIDDEN, FANOUTS, BATCH = 256, [10, 10], 512
TIMEOUT_S = 3600
# what -> least ratio of dense to sparse on `words`
GOALS = {"epoch_s": 8.0, "remote_bytes": 30.0, "memory_bytes": 10.0}
SHOWN = {"epoch_s": "s/epoch", "remote_bytes": "remote bytes/epoch", "memory_bytes": "bytes of memory"}


def write_words(folder: Path, nodes: int, width: int, filled: float, classes: int = 15) -> None:
    """A graph as a folder of .npy: neighbors and words mostly of one's own community."""
    rng = np.random.default_rng(0)
    y = rng.integers(classes, size=nodes)
    members = [np.flatnonzero(y == c) for c in range(classes)]
    source = np.repeat(np.arange(nodes), 5)
    near = np.array([rng.choice(members[c]) for c in y[source]])
    target = np.where(rng.random(len(source)) < 0.8, near, rng.integers(nodes, size=len(source)))
    words = round(width * filled)
    x = np.zeros((nodes, width), dtype=np.float32)
    for v in range(nodes):
        own = y[v] * width // classes + rng.integers(width // classes, size=words // 4)
        x[v, own] = 1
        x[v, rng.choice(width, words - len(np.unique(own)), replace=False)] = 1
    edges = np.stack([np.concatenate([source, target]), np.concatenate([target, source])])
    for name, array in (("edge_index", edges), ("x", x), ("y", y)):
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", array)


def narrow(config: Config, folder: Path) -> None:
    """The graph of ``config`` with one feature per node, as a folder of .npy."""
    from gemini_gnn.graph.datasets import load_dataset

    graph = load_dataset(config.dataset)
    folder.mkdir()
    target = np.repeat(np.arange(len(graph.y)), np.diff(graph.colptr))
    x = np.ones((len(graph.y), 1), dtype=np.float32)
    for name, array in (("edge_index", np.stack([np.asarray(graph.row, dtype=np.int64), target])), ("x", x)):
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "y.npy", graph.y)


def settings(dataset: list[str], layout: str, ranks: int, epochs: int, run_dir: Path, cache: Path) -> list[str]:
    return [
        *dataset,
        f"dataset.cache={cache}",
        f"features.layout={layout}",
        "features.shared=false",  # bytes on the wire, as between machines
        f"sampling.fanouts={FANOUTS}".replace(" ", ""),
        f"sampling.batch_size={BATCH // ranks}",
        "model.layers=2",
        f"model.hidden={HIDDEN}",
        f"training.epochs={epochs}",
        f"training.threads={max(1, 2 // ranks)}",
        "evaluation.every=0",
        "snapshot=none",
        "logger=quiet",
        f"run_dir={run_dir}",
    ]


def train(dataset: list[str], layout: str, ranks: int, epochs: int, folder: Path, turn: int) -> dict:
    """result.json of a run of its own processes; bytes are per epoch. ``turn`` is what ``in_turns`` passes."""
    from gemini_gnn.training.local import train_local

    run_dir = folder / f"run-{layout}-{ranks}-{time.monotonic_ns()}"
    words = settings(dataset, layout, ranks, epochs, run_dir, folder / "cache")
    codes = train_local(compose(words), ranks, timeout_s=TIMEOUT_S)
    if codes != [0] * ranks:
        raise SystemExit(f"{' '.join(words)}\nexit codes {codes}\n" + Path(f"{run_dir}-rank0.log").read_text()[-3000:])
    result = json.loads((run_dir / "result.json").read_text())
    return result | {"remote_bytes": result["remote_bytes"] / epochs}


def pyg_epoch(config: Config):
    """``f(turn) -> seconds`` of an epoch of the loop a PyG user writes, with a sparse first product."""
    import torch
    import torch.nn.functional as F
    from scipy.sparse import csr_matrix
    from torch_geometric.data import Data
    from torch_geometric.loader import NodeLoader
    from torch_geometric.nn import MeanAggregation, SAGEConv

    from gemini_gnn.graph.datasets import load_dataset
    from gemini_gnn.sampling.pyg import PyGSampler

    graph = load_dataset(config.dataset)
    x = csr_matrix(graph.x if isinstance(graph.x, np.ndarray) else graph.x.dense())
    target = np.repeat(np.arange(len(graph.y)), np.diff(graph.colptr))
    edges = torch.from_numpy(np.stack([np.asarray(graph.row, dtype=np.int64), target]))
    data = Data(edge_index=edges, y=torch.from_numpy(np.asarray(graph.y)), num_nodes=len(graph.y))
    seeds = torch.from_numpy(np.asarray(graph.train_mask))
    loader = NodeLoader(data, PyGSampler(data, FANOUTS, seed=0), input_nodes=seeds, batch_size=BATCH, shuffle=True)
    first, mean = torch.nn.Linear(x.shape[1], 2 * HIDDEN), MeanAggregation()
    second = SAGEConv(HIDDEN, graph.num_classes)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-3)

    def epoch(turn: int) -> float:
        began = time.perf_counter()
        for batch in loader:
            rows = x[batch.n_id.numpy()]
            parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
            both = torch.sparse.mm(torch.sparse_csr_tensor(*parts, size=rows.shape), first.weight.T) + first.bias
            neighbor, own = both.split(HIDDEN, dim=1)
            source, to = batch.edge_index
            h = F.dropout(F.relu(mean(neighbor[source], to, dim_size=len(own)) + own))
            logits = second(h, batch.edge_index)[: batch.batch_size]
            optimizer.zero_grad()
            F.cross_entropy(logits, batch.y[: batch.batch_size]).backward()
            optimizer.step()
        return time.perf_counter() - began

    return epoch


def section(name: str, dataset: list[str], folder: Path, arguments: argparse.Namespace) -> dict:
    config = compose(settings(dataset, "dense", 1, 1, folder / "unused", folder / "cache"))
    narrow(config, folder / "narrow")
    one_feature = ["dataset=folder", f"dataset.path={folder / 'narrow'}", "dataset.split='random:0.6,0.2,0.2'"]
    runs = {
        layout: functools.partial(train, dataset, layout, 2, arguments.epochs, folder)
        for layout in ("dense", "sparse", "auto")
    }
    runs["one feature"] = functools.partial(train, one_feature, "dense", 2, arguments.epochs, folder)
    runs["sparse, 1 rank"] = functools.partial(train, dataset, "sparse", 1, arguments.epochs, folder)
    for run in runs.values():
        run.func(*run.args[:3], 1, folder, 0)  # partitions, compiles
    pyg = pyg_epoch(config)
    pyg(0)
    taken = in_turns({**runs, "PyG": pyg}, arguments.rounds)
    base = median(r["peak_rss_bytes"] for _, r in taken["one feature"])
    results = {
        run: {
            "epoch_s": median(r["epoch_s"] for _, r in taken[run]),
            "remote_bytes": median(r["remote_bytes"] for _, r in taken[run]),
            "memory_bytes": median(r["peak_rss_bytes"] for _, r in taken[run]) - base,
            "test_accuracy": [r["test_accuracy"] for _, r in taken[run]],
        }
        for run in runs
    }
    results["PyG"] = {"epoch_s": median(seconds for _, seconds in taken["PyG"])}
    print(f"{name}:")
    for run, found in results.items():
        print(f"  {run:14s} " + ", ".join(f"{found[key]:,.3g} {SHOWN[key]}" for key in SHOWN if key in found))
    ratios = {key: results["dense"][key] / max(results["sparse"][key], 1e-9) for key in GOALS}
    for key, ratio in ratios.items():
        goal = f" (goal {GOALS[key]:.0f}x{'' if ratio >= GOALS[key] else ', missed'})" if name == "words" else ""
        print(f"  dense / sparse, {SHOWN[key]}: {ratio:.1f}x{goal}")
    auto = results["dense"]["epoch_s"] / results["auto"]["epoch_s"]
    peer = results["PyG"]["epoch_s"] / results["sparse, 1 rank"]["epoch_s"]
    print(f"  dense / auto, s/epoch: {auto:.2f}x{' (goal: auto is never slower)' if name == 'computers' else ''}")
    print(f"  PyG / sparse, 1 rank, s/epoch: {peer:.1f}x")
    return {"contenders": results, "ratios": {**ratios, "dense / auto": auto, "PyG / sparse, 1 rank": peer}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["words", "computers"], nargs="*", default=["words", "computers"])
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=7_000)
    parser.add_argument("--filled", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="results/features.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # PyG says what is missing, torch that CSR is in beta
    head = machine()
    print(f"{head['cpu']}, {head['cores']} cores, load {head['load_1min']:.1f}, {head['versions']}")
    results: dict = {"machine": head, "goals": GOALS, "graphs": {}, "skipped": {}}
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="features-benchmark-") as temporary:
            folder = Path(temporary)
            dataset = ["dataset=computers"]
            if name == "words":
                write_words(folder / "words", arguments.nodes, arguments.width, arguments.filled)
                dataset = ["dataset=folder", f"dataset.path={folder / 'words'}", "dataset.split='random:0.6,0.2,0.2'"]
            try:
                results["graphs"][name] = section(name, dataset, folder, arguments)
            except DataError as error:
                results["skipped"][name] = str(error)
                print(f"{name}: skipped: {error}")
    write(arguments.output, results)


if __name__ == "__main__":
    main()
