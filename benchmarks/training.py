"""Training steps beside the loop a PyG user writes, and from one rank to several.

    python benchmarks/training.py                    # all parts
    python benchmarks/training.py --part steps       # one process, one thread, one core
    python benchmarks/training.py --part precision   # the same step of ours, float32 beside bf16_products; two minutes
    python benchmarks/training.py --part ranks       # deepspeed, every rank with all its threads on a core of its own

Steps. GraphSAGE (mean) 3 x 256 on 128 features, 47 classes, fanouts 15, 10, 5, 1024 random seeds, Adam, no dropout, on a skewed
graph of 1 M nodes and 20 M edges (see sampling.py). A step is everything: sampling, gathering features, forward, backward,
update. Contenders get the same seeds, take turns, and report the median; each lives in a process of its own, since the
memory that one frees and the holes it leaves are not the other's doing.

    gemini_gnn   NeighborSampler, rows copied as FeatureStore does, blocks, build_model
    PyG          the loop of PyG's examples: a loader's batch, SAGEConv layers over the whole sampled subgraph
    PyG trimmed  the same with trim_to_layer

PyG's batches come from NeighborLoader where pyg-lib or torch-sparse is installed, else from NodeLoader over this project's
PyGSampler, which draws the same subgraphs faster (the output says which). So do the trimmed ones on torch-sparse, whose
batches lack what trim_to_layer needs. Our blocks hold more edges than PyG's subgraph:
every known node draws at each hop, not only the new ones.

Ranks. The real launcher on a community graph partitioned by METIS, the same global batch on 1, 2, 4 ranks as far as there are
cores; seconds per epoch and the share of exposed communication as result.json tells them. In turn with these, two jobs of one
rank run at once on two cores. They have nothing to do with each other, so by as much as each is slower than one alone, cores
share caches, memory and a host. No second rank can be faster than that allows. A table says where the second
rank's time goes: what a step of two ranks takes beyond half a step of one, of CPU time as the events tell it. On its
core all threads of a rank run in turns, so a step is the CPU time of each and what is left, in which the core idles
(or runs another process). That is shared out to the waits in proportion to their wall time; all rows add up to the
difference measured. The first epoch does not count, nor the last steps, which make no batches any more. On a busy machine
the rest is large; the CPU times still hold. `--part ranks --rounds 3` takes about ten minutes on a quiet one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import in_turns, machine, median, write
from sampling import FANOUTS, SEEDS, pyg_neighbor_loader, skewed_graph

from gemini_gnn.cluster.launcher import DEEPSPEED

ROOT = Path(__file__).resolve().parent.parent
FEATURES, HIDDEN, CLASSES, LAYERS = 128, 256, 47, 3


def our_step(colptr, row, x, y, seeds, clock, in_bf16: bool = False):
    """``f(i) -> {edges, inputs, phases_s, loss}``: step i of this project, maybe with ``bf16_products``."""
    from gemini_gnn.config import ModelConfig
    from gemini_gnn.halo.rows import copy_rows, empty_rows
    from gemini_gnn.models.build import build_model
    from gemini_gnn.models.tensors import to_tensors
    from gemini_gnn.sampling.in_edges import ReplicatedInEdges
    from gemini_gnn.sampling.sampler import NeighborSampler

    sampler = NeighborSampler(ReplicatedInEdges(colptr, row, np.arange(len(colptr) - 1)), FANOUTS, seed=0)
    model = build_model(ModelConfig(name="sage", hidden=HIDDEN, layers=LAYERS, dropout=0.0), FEATURES, CLASSES, seed=0)
    if in_bf16:
        model.multiply_in_bf16()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(i: int) -> dict:
        marks = [clock()]
        batch = sampler.sample(seeds[i], 0, i)
        marks.append(clock())
        rows = empty_rows(len(batch.input_nodes), FEATURES, x.dtype, x.device)
        copy_rows(x, batch.input_nodes, rows, np.arange(len(rows)))
        marks.append(clock())
        loss = F.cross_entropy(model(rows, [to_tensors(block) for block in batch.blocks]), y[batch.seeds])
        marks.append(clock())
        optimizer.zero_grad()
        loss.backward()
        marks.append(clock())
        optimizer.step()
        marks.append(clock())
        phases = zip(("sample", "gather", "forward", "backward", "update"), np.diff(marks).tolist(), strict=True)
        return {"edges": batch.num_edges, "inputs": len(rows), "phases_s": dict(phases), "loss": float(loss.detach())}

    return step


def pyg_step(colptr, row, x, y, seeds, clock, trim: bool):
    """``f(i) -> {edges, inputs, phases_s, loss}``: step i of the loop a PyG user writes."""
    from torch_geometric.data import Data
    from torch_geometric.loader import NodeLoader
    from torch_geometric.nn import SAGEConv
    from torch_geometric.utils import trim_to_layer

    from gemini_gnn.sampling.pyg import PyGSampler

    target = np.repeat(np.arange(len(colptr) - 1), np.diff(colptr))
    edge_index = torch.from_numpy(np.stack([row.astype(np.int64), target]))
    data = Data(x=x, y=y, edge_index=edge_index, num_nodes=len(x))
    loader, missing = pyg_neighbor_loader(data)
    if loader is not None and trim and "num_sampled_nodes" not in loader(torch.from_numpy(seeds[0])):
        loader, missing = None, "on torch-sparse its batches lack num_sampled_nodes, which trim_to_layer needs"
    origin = "NeighborLoader"
    if loader is None:
        loader = NodeLoader(data, PyGSampler(data, FANOUTS, seed=0), batch_size=SEEDS)
        origin = f"NodeLoader over PyGSampler (no NeighborLoader: {missing})"

    class SAGE(torch.nn.Module):
        def __init__(self):
            super().__init__()
            widths = [FEATURES] + [HIDDEN] * (LAYERS - 1) + [CLASSES]
            self.convs = torch.nn.ModuleList(SAGEConv(widths[i], widths[i + 1]) for i in range(LAYERS))

        def forward(self, batch):
            h, edges = batch.x, batch.edge_index
            for i, conv in enumerate(self.convs):
                if trim:
                    h, edges, _ = trim_to_layer(i, batch.num_sampled_nodes, batch.num_sampled_edges, h, edges)
                h = conv(h, edges)
                if i < LAYERS - 1:
                    h = h.relu()
            return h[: batch.batch_size]

    model = SAGE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(i: int) -> dict:
        marks = [clock()]
        batch = loader(torch.from_numpy(seeds[i]))
        marks.append(clock())
        loss = F.cross_entropy(model(batch), batch.y[: batch.batch_size])
        marks.append(clock())
        optimizer.zero_grad()
        loss.backward()
        marks.append(clock())
        optimizer.step()
        marks.append(clock())
        phases = zip(("sample and gather", "forward", "backward", "update"), np.diff(marks).tolist(), strict=True)
        return {
            "edges": batch.edge_index.shape[1],
            "inputs": len(batch.x),
            "phases_s": dict(phases),
            "loss": float(loss.detach()),
            "batches_from": origin,
        }

    return step


@contextlib.contextmanager
def in_processes(makers: Mapping[str, Callable[[], Callable[[int], dict]]], timeout_s: float):
    """``{name: f(i)}`` where each f was made in, and runs in, a forked process; ``step_s`` is measured there."""
    context = multiprocessing.get_context("fork")
    processes, calls = [], {}

    def serve(make, pipe):
        step = make()
        while (order := pipe.recv()) is not None:
            i, clock = order
            began = clock()
            result = step(i)
            pipe.send(result | {"step_s": clock() - began})

    def call(pipe, name, clock, i):
        pipe.send((i, clock))
        if not pipe.poll(timeout_s):
            raise SystemExit(f"{name}: no answer within {timeout_s} s")
        return pipe.recv()

    try:
        for name, make in makers.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append((process, ours))
            calls[name] = functools.partial(call, ours, name)
        yield calls
    finally:
        for process, pipe in processes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()


def steps_section(arguments, peers: bool) -> dict:
    """Steps of ours beside those of PyG (``peers``), or float32 beside bf16_products."""
    torch.set_num_threads(1)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    colptr, row = skewed_graph(arguments.nodes, arguments.edges)
    nodes = len(colptr) - 1
    print(f"steps: {nodes:,} nodes, {len(row):,} edges, one thread, {arguments.clock} time")
    # numpy only: a process that has computed with torch must not fork.
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((nodes, FEATURES), dtype=np.float32), rng.integers(CLASSES, size=nodes)
    seeds = [rng.choice(nodes, SEEDS, replace=False) for _ in range(arguments.steps)]

    def maker(function, *extra):
        return lambda: function(colptr, row, torch.from_numpy(x), torch.from_numpy(y), seeds, clock, *extra)

    makers = {"gemini_gnn": maker(our_step)}
    if peers:
        makers |= {"PyG": maker(pyg_step, False), "PyG trimmed": maker(pyg_step, True)}
    else:
        makers |= {"bf16_products": maker(our_step, True)}
    with in_processes(makers, arguments.timeout_s) as steps:
        for step in steps.values():
            step(clock, 0)  # compiles, loads, allocates
        taken = in_turns({name: functools.partial(step, clock) for name, step in steps.items()}, arguments.steps)
    origins = {name: runs[0][1]["batches_from"] for name, runs in taken.items() if peers and name != "gemini_gnn"}
    for name, origin in origins.items():
        print(f"  {name}'s batches come from {origin}")
    results = {}
    for name, runs in taken.items():
        seconds = [r["step_s"] for _, r in runs]
        phases = {p: median(r["phases_s"][p] for _, r in runs) for p in runs[0][1]["phases_s"]}
        results[name] = {
            "step_s": median(seconds),
            "step_s_min_max": [min(seconds), max(seconds)],
            "phases_s": phases,
            "edges": median(r["edges"] for _, r in runs),
            "inputs": median(r["inputs"] for _, r in runs),
            "losses": [r["loss"] for _, r in runs],
        }
        shares = ", ".join(f"{p} {s * 1e3:.0f}" for p, s in phases.items())
        print(
            f"  {name:12s} {median(seconds) * 1e3:8.0f} ms/step ({shares}); "
            f"{results[name]['edges']:,.0f} edges, {results[name]['inputs']:,.0f} input nodes"
        )
    ratios = {
        f"{name} / gemini_gnn": results[name]["step_s"] / results["gemini_gnn"]["step_s"]
        for name in results
        if name != "gemini_gnn"
    }
    for pair, ratio in ratios.items():
        print(f"  {pair}: {ratio:.2f}x the time")
    os.sched_setaffinity(0, allowed)
    return {
        "clock": arguments.clock,
        "nodes": nodes,
        "edges": len(row),
        "batches_from": origins,
        "contenders": results,
        "ratios": ratios,
    }


def ranks_section(arguments) -> dict:
    """Seconds per epoch on 1, 2, 4 ranks, one core each, same global batch, through ``deepspeed launch/train.py``."""
    cores = len(os.sched_getaffinity(0))
    worlds = [world for world in (1, 2, 4) if world <= cores]
    print(f"ranks: {worlds} of one core each; this machine has {cores}" + ("" if cores >= 4 else ": no run with 4"))
    runs: dict[int, list[dict]] = {world: [] for world in worlds}
    at_once: list[float] = []  # seconds per epoch of two jobs that have nothing to do with each other
    with tempfile.TemporaryDirectory(prefix="training-benchmark-") as folder:
        for turn in range(arguments.rounds):
            for world in worlds:
                runs[world].append(launch(world, Path(folder) / f"run-{world}-{turn}", Path(folder), arguments))
            if cores >= 2:
                dirs = [Path(folder) / f"alone-{core}-{turn}" for core in (0, 1)]
                with ThreadPoolExecutor(2) as pool:
                    jobs = [pool.submit(launch, 1, dirs[core], Path(folder), arguments, core) for core in (0, 1)]
                    at_once += [job.result()["epoch_s"] for job in jobs]
    results, ratios, work = {}, {}, {}
    for world, told in runs.items():
        # Two ranks of half the seeds sample more than one rank of all: neighborhoods that overlap are sampled twice. So
        # the ratio cannot reach the number of ranks; what it could reach is in `work_ratios`.
        results[str(world)] = {
            "edges_per_step_and_rank": told[0]["edges_per_step"] / world,
            "epoch_s": median(r["epoch_s"] for r in told),
            "edges_per_s": median(r["edges_per_s"] for r in told),
            "communication_fraction": median(r["communication_fraction"] for r in told),
            "remote_bytes": told[0]["remote_bytes"],
            "phases_s": told[0]["phases_s"],
            "parts_s": sorted((r["parts_s"] for r in told), key=lambda parts: sum(parts.values()))[len(told) // 2],
            "edge_cut": told[0]["edge_cut"],
            "test_accuracy": [r["test_accuracy"] for r in told],
        }
        ratios[f"1 / {world} ranks"] = results["1"]["epoch_s"] / results[str(world)]["epoch_s"]
        r = results[str(world)]
        work[f"1 / {world} ranks"] = results["1"]["edges_per_step_and_rank"] / r["edges_per_step_and_rank"]
        print(
            f"  {world} ranks: {r['epoch_s']:.3f} s/epoch, {ratios[f'1 / {world} ranks']:.2f}x "
            f"(edges per rank: {work[f'1 / {world} ranks']:.2f}x fewer), "
            f"communication {r['communication_fraction']:.1%}, edge cut {r['edge_cut']:.3f}"
        )
    lost, slower = {}, 1.0
    if "2" in results:
        slower = median(at_once) / results["1"]["epoch_s"]
        print(
            f"  two jobs of one rank at once: each takes {slower:.2f}x as long as one alone, so of "
            f"{work['1 / 2 ranks']:.2f}x this machine allows {work['1 / 2 ranks'] / slower:.2f}x"
        )
        one, two = results["1"]["parts_s"], results["2"]["parts_s"]
        lost = second_ranks_time(one, two, 1 / work["1 / 2 ranks"])
        print("  where the second rank's time goes, ms per step: 1 rank, 2 ranks, beyond half of the first")
        for name, seconds in lost.items():
            print(f"    {name:30s} {one.get(name, 0) * 1e3:8.1f} {two.get(name, 0) * 1e3:8.1f} {seconds * 1e3:8.1f}")
        print(f"    {'sum':30s}", *(f"{sum(column.values()) * 1e3:8.1f}" for column in (one, two, lost)))
    return {
        "second_ranks_time_s": lost,
        "two_jobs_at_once": slower,
        "nodes": arguments.ranks_nodes,
        "global_batch": SEEDS,
        "cores": cores,
        "settings": arguments.set,
        "worlds": results,
        "ratios": ratios,
        "work_ratios": work,
        "missing": [] if cores >= 4 else ["4 ranks: fewer than 4 cores"],
    }


def parts_of_step(steps: list[dict]) -> dict[str, float]:
    """Seconds of a step on one core by whose they are, mean over the events ``steps``; they add up to its wall time."""

    def mean(kind: str, name: str) -> float:
        return sum(step[kind].get(name, 0.0) for step in steps) / len(steps)

    wall = sum(mean("phases_s", p) for p in ("input", "forward", "backward", "others", "update", "report", "snapshot"))
    parts = {
        "forward, backward": mean("cpu_s", "forward") + mean("cpu_s", "backward"),
        "sampling": mean("cpu_s", "sample"),
        "gathering": mean("cpu_s", "fetch"),
        "DeepSpeed's step": mean("cpu_s", "update"),
        "report, snapshot, queue": sum(mean("cpu_s", p) for p in ("input", "report", "snapshot")),
    }
    process = mean("cpu_s", "process")
    parts["other threads (gloo, files)"] = process - sum(parts.values())
    waits = {
        "waiting for the slower rank": mean("phases_s", "others") + mean("phases_s", "input_others"),
        "halo exchange": mean("phases_s", "exposed"),
        "gradient reduction": mean("phases_s", "reduce"),
    }
    idle, waited = wall - process, sum(waits.values())
    share = min(1.0, max(idle, 0.0) / waited) if waited else 0.0
    parts |= {name: seconds * share for name, seconds in waits.items()}
    parts["other processes, rest"] = wall - sum(parts.values())
    return parts


def second_ranks_time(one: dict[str, float], two: dict[str, float], edges: float) -> dict[str, float]:
    """Seconds that a step of two ranks takes beyond half a step of one, by part.

    Args:
        edges: of a rank's step on two ranks, as a share of those on one; the half, if no neighborhoods overlapped.
    """
    lost = {"more work: less overlap": 0.0}
    for name in one:
        share = edges if name in ("forward, backward", "sampling", "gathering") else 0.5
        lost["more work: less overlap"] += one[name] * (share - 0.5)
        lost[name] = two[name] - one[name] * share
    return lost


def launch(world: int, run_dir: Path, cache: Path, arguments, core: int = 0) -> dict:
    """result.json of a training run, with the edge cut of its partition and the edges of a step over all ranks.

    Args:
        core: of rank 0; the other ranks have the next ones.
    """
    command = [*DEEPSPEED, "--num_accelerators", str(world), "benchmarks/pinned.py", "launch/train.py"]
    command += [
        "dataset=blocks",
        f"dataset.nodes={arguments.ranks_nodes}",
        "dataset.degree=20",
        f"dataset.feature_dim={FEATURES}",
        f"dataset.cache={cache}",
        "dataset.split='random:0.03,0.001,0.001'",
        f"sampling.fanouts={FANOUTS}".replace(" ", ""),
        f"sampling.batch_size={SEEDS // world}",
        f"model.layers={LAYERS}",
        f"model.hidden={HIDDEN}",
        "model.dropout=0",
        f"training.epochs={arguments.epochs}",
        "training.threads=1",
        "evaluation.every=0",
        "snapshot=none",
        "logger=quiet",
        "resume=never",
        f"run_dir={run_dir}",
        *arguments.set,
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "FIRST_CORE": str(core)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=arguments.timeout_s
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    result = json.loads((run_dir / "result.json").read_text())
    lines = [line for log in (run_dir / "events").glob("rank-*.jsonl") for line in log.read_text().splitlines()]
    steps = [event for event in map(json.loads, lines) if event["kind"] == "step"]
    warm_up = result["steps"] // arguments.epochs
    last = result["steps"] - result["config"]["sampling"]["prefetch"]  # after it no batches are left to make
    metas = [json.loads(meta.read_text()) for meta in cache.glob("**/meta.json")]
    cuts = [meta["quality"]["edge_cut"] for meta in metas if len(meta.get("bounds", [])) == world + 1]
    return result | {
        "edge_cut": cuts[0] if cuts else float("nan"),
        "edges_per_step": sum(step["edges"] for step in steps) / result["steps"],
        "parts_s": parts_of_step([step for step in steps if warm_up < step["step"] <= last]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["steps", "precision", "ranks", "all"], default="all")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of the steps; cpu: on a busy machine")
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, default=20_000_000)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--ranks-nodes", type=int, default=400_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="runs per number of ranks")
    parser.add_argument("--timeout-s", type=float, default=1800, help="of one such run, its partitioning included")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SETTING=VALUE", help="of launch/train.py (ranks)"
    )
    parser.add_argument("--output", default="results/training.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # PyG says on import which extensions are missing
    head = machine()
    print(f"{head['cpu']}, {head['cores']} cores, load {head['load_1min']:.1f}, {head['versions']}")
    results = {"machine": head, "fanouts": FANOUTS, "seeds": SEEDS}
    if arguments.part in ("steps", "all"):
        results["steps"] = steps_section(arguments, peers=True)
    if arguments.part in ("precision", "all"):
        results["precision"] = steps_section(arguments, peers=False)
    if arguments.part in ("ranks", "all"):
        results["ranks"] = ranks_section(arguments)
    write(arguments.output, results)


if __name__ == "__main__":
    main()
