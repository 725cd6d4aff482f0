"""The cost of a snapshot, and the time it saves.

    python benchmarks/snapshot.py                     # all parts, full sizes
    python benchmarks/snapshot.py --quick             # small sizes, a minute
    python benchmarks/snapshot.py --part stall

stall       One rank, Adam, 10 MB, 100 MB and 1 GB of state; between two steps the training thread computes for `--hide` times
            the memcpy time (at least 20 ms), as a forward and backward pass would. Its loss per snapshot, beside
              memcpy            the same bytes copied by the training thread: what a blocking snapshot costs
              async_save        torch.distributed.checkpoint.async_save to a folder in RAM: until the call returns
              save_checkpoint   DeepSpeed's, to disk
              lm-resiliency     its in-memory manager's save_tensors, with the random generators as `extra`, until the
                                call returns, where it is installed (pip install lm-resiliency). Its buffers are memory
                                of the process and die with it; flushes to disk are off, replication needs more ranks
            And the bandwidth of the background copy while nothing else runs, beside memcpy.
restore     a fresh engine back to its state: attach() from RAM (checksums included) beside load_checkpoint from a warm file.
loss        two ranks, one thread each, GraphSAGE 3 x 256 on a skewed graph: the same step with and without a snapshot at its
            beginning, in pairs of alternating order; the median of the paired ratios.

Everything is measured in turns within one run; ratios are of medians of that run.

On the GPU where there is one (`DS_ACCELERATOR=cpu` keeps it on the CPU): memcpy then copies to page-locked memory and waits,
lm-resiliency has page-locked buffers too; a stall is what the host loses and what the fence holds the GPU; part loss takes two
ranks where there are two GPUs, else one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import in_turns, machine, median, write

from gemini_gnn.snapshot import attach, deepspeed_checkpoints
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.store import arena

FEATURES, HIDDEN, CLASSES, LAYERS = 128, 256, 47, 3
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
ON_GPU = DEVICE == "cuda"


def drained() -> None:
    """Wait for what the GPU has to do for this thread."""
    if ON_GPU:
        torch.cuda.current_stream().synchronize()


class Flat(torch.nn.Module):
    """Parameters such that parameters + two moments are ``nbytes``."""

    def __init__(self, nbytes: int):
        super().__init__()
        count = nbytes // 12 // 4
        self.parts = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(count)) for _ in range(4)])


def one_rank() -> None:
    """A process group of one, in this process."""
    if not dist.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1)


def engine_of(nbytes: int):
    """A DeepSpeed engine with that much state, after one step."""
    from gemini_gnn.config import Config
    from gemini_gnn.training.engine import build_engine

    one_rank()
    config = Config()
    config.deepspeed.zero = 1
    engine = build_engine(Flat(nbytes).to(torch.device(DEVICE, 0)), config, total_steps=1000)
    return engine


def step(engine) -> None:
    for p in engine.module.parameters():
        p.grad = None
    loss = sum((p * p).sum() for p in engine.module.parameters())
    engine.backward(loss)
    engine.step()
    drained()


def fresh_folder(name: str) -> Path:
    return arena.folder_of(f"benchmark-{os.getpid()}-{name}")


def context_of(folder: Path, generation: int, rank: int = 0, world: int = 1) -> Context:
    return Context("benchmark", folder, rank, world, rank, world, term=1, generation=generation)


def compute(seconds: float, a: torch.Tensor) -> None:
    """The training thread busy in torch, as in a forward and backward pass."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)
        drained()


def fence_s(snapshots) -> float:
    """Pass the fence. Returns the seconds it held the GPU longer than the host; ``snapshots.stats`` has the host's."""
    if not ON_GPU:
        snapshots.before_step()
        return 0.0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    host = snapshots.stats.fence_s
    begin.record()
    snapshots.before_step()
    end.record()
    end.synchronize()
    return max(0.0, begin.elapsed_time(end) / 1e3 - (snapshots.stats.fence_s - host))


def resiliency_manager(folder: Path):
    """lm-resiliency's manager, set up to keep snapshots in memory only; None where it is not installed."""
    if importlib.util.find_spec("lm_resiliency") is None:
        return None
    from lm_resiliency.checkpointing import InMemoryCheckpointManager, InMemoryCkptConfig

    return InMemoryCheckpointManager(
        InMemoryCkptConfig(disk_flush_interval=0, disk_folder=str(folder), run_id="benchmark", pin_memory=ON_GPU)
    )


def stall_section(arguments) -> dict:
    torch.set_num_threads(1)
    a, results = torch.randn(256, 256, device=DEVICE), {}
    for size in arguments.sizes:
        folder, scratch = fresh_folder("stall"), Path(tempfile.mkdtemp(prefix="snapshot-benchmark-"))
        ram = Path(tempfile.mkdtemp(prefix="snapshot-benchmark-", dir="/dev/shm"))
        engine = engine_of(size)
        step(engine)
        optimizer = engine.optimizer.optimizer
        tensors = [p.detach() for g in optimizer.param_groups for p in g["params"]]
        tensors += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        nbytes = sum(t.nbytes for t in tensors)
        copies = [torch.zeros_like(t, device="cpu", pin_memory=ON_GPU) for t in tensors]

        def memcpy(_turn, tensors=tensors, copies=copies):
            for source, copy in zip(tensors, copies, strict=True):
                copy.copy_(source, non_blocking=True)
            drained()

        memcpy(0)
        memcpy_s = median(s for s, _ in in_turns({"m": memcpy}, 5)["m"])
        pause = max(0.02, arguments.hide * memcpy_s)
        engine.global_steps = engine.micro_steps = (
            0  # attach() asks for an engine that has not stepped; nothing is restored
        )
        snapshots = attach(engine, context=context_of(folder, 1), hook=False)
        count = [0]

        def snapshot(_turn, snapshots=snapshots, pause=pause, count=count):
            snapshots.wait()
            before, copied = snapshots.stats.stall_s, snapshots.stats.copy_s
            count[0] += 1
            assert snapshots.ready()
            snapshots.after_step(count[0], capture=True)
            compute(pause, a)
            held = fence_s(snapshots)
            lost = snapshots.stats.stall_s - before + held
            snapshots.wait()
            return lost, snapshots.stats.copy_s - copied

        def alone(turn, snapshot=snapshot, snapshots=snapshots, count=count):
            snapshots.wait()
            before, sealed = snapshots.stats.copy_s, snapshots.stats.seal_s
            count[0] += 1
            snapshots.after_step(count[0], capture=True)
            snapshots.wait()
            return snapshots.stats.copy_s - before, snapshots.stats.seal_s - sealed

        def async_save(_turn, engine=engine, tensors=tensors, ram=ram):
            import torch.distributed.checkpoint as dcp

            begin = time.perf_counter()
            future = dcp.async_save({str(i): t for i, t in enumerate(tensors)}, checkpoint_id=ram / "dcp")
            lost = time.perf_counter() - begin
            future.result()
            shutil.rmtree(ram / "dcp")
            return lost

        def save_checkpoint(_turn, engine=engine, scratch=scratch):
            begin = time.perf_counter()
            engine.save_checkpoint(str(scratch), tag="x", save_latest=False)
            return time.perf_counter() - begin

        manager = resiliency_manager(scratch)

        def resiliency(turn, manager=manager, tensors=tensors, pause=pause):
            from lm_resiliency.checkpointing.rng import capture_rng_state

            manager.maybe_wait()
            begin = time.perf_counter()
            manager.save_tensors(tensors, turn + 3, extra={"rng": capture_rng_state()})
            lost = time.perf_counter() - begin
            compute(pause, a)
            begin = time.perf_counter()
            manager.maybe_wait()  # nothing may change before: its fence
            return lost + time.perf_counter() - begin

        contenders = {"memcpy": memcpy, "snapshot": snapshot, "alone": alone}
        contenders |= {"async_save": async_save, "save_checkpoint": save_checkpoint}
        if manager is not None:
            contenders["lm_resiliency"] = resiliency
            resiliency(-2)  # it has two buffers, and the first pass through each is page faults
        for call in contenders.values():
            call(-1)
        taken = in_turns(contenders, arguments.rounds)
        memcpy_s = median(s for s, _ in taken["memcpy"])
        stall_s = median(lost for _, (lost, _) in taken["snapshot"])
        copy_s = median(c for _, (c, _) in taken["alone"])
        result = {
            "bytes": nbytes,
            "pause_s": pause,
            "memcpy_s": memcpy_s,
            "stall_s": stall_s,
            "async_save_s": median(lost for _, lost in taken["async_save"]),
            "save_checkpoint_s": median(lost for _, lost in taken["save_checkpoint"]),
            "copy_alone_s": copy_s,
            "seal_alone_s": median(s for _, (_, s) in taken["alone"]),
            "copy_hidden_s": median(c for _, (_, c) in taken["snapshot"]),
        }
        result["ratios"] = {
            "stall / memcpy": stall_s / memcpy_s,
            "async_save / stall": result["async_save_s"] / stall_s,
            "save_checkpoint / stall": result["save_checkpoint_s"] / stall_s,
            "bandwidth / memcpy": memcpy_s / copy_s,
        }
        peer = "lm-resiliency not installed (pip install lm-resiliency)"
        if manager is not None:
            result["lm_resiliency_s"] = median(lost for _, lost in taken["lm_resiliency"])
            result["ratios"]["lm_resiliency / stall"] = result["lm_resiliency_s"] / stall_s
            peer = f"lm-resiliency {result['lm_resiliency_s'] * 1e3:.1f} ms"
            manager.close()
        snapshots.close()
        engine.destroy()
        arena.remove(folder)
        shutil.rmtree(scratch)
        shutil.rmtree(ram)
        results[str(size)] = result
        print(
            f"stall {nbytes / 1e6:7.0f} MB: {stall_s * 1e3:8.3f} ms ({100 * stall_s / memcpy_s:.1f} % of memcpy "
            f"{memcpy_s * 1e3:.1f} ms); async_save {result['async_save_s'] * 1e3:.1f} ms, save_checkpoint "
            f"{result['save_checkpoint_s'] * 1e3:.1f} ms, {peer}; copy alone {nbytes / copy_s / 1e9:.1f} GB/s "
            f"({memcpy_s / copy_s:.2f} of memcpy), checksum and commit {result['seal_alone_s'] * 1e3:.1f} ms"
        )
    return results


def restore_section(arguments) -> dict:
    torch.set_num_threads(1)
    size, folder = arguments.restore, fresh_folder("restore")
    scratch = Path(tempfile.mkdtemp(prefix="snapshot-benchmark-"))
    engine = engine_of(size)
    snapshots = attach(engine, context=context_of(folder, 1))
    step(engine)
    snapshots.wait()
    engine.save_checkpoint(str(scratch), tag="x", save_latest=False)
    snapshots.close()
    engine.destroy()
    generation = [1]

    def memory(_turn):
        engine = engine_of(size)
        generation[0] += 1
        begin = time.perf_counter()
        snapshots = attach(engine, context=context_of(folder, generation[0]))
        took = time.perf_counter() - begin
        assert snapshots.restored is not None and snapshots.restored.step == 1
        snapshots.close()
        engine.destroy()
        return took

    def checkpoint(_turn):
        engine = engine_of(size)
        begin = time.perf_counter()
        engine.load_checkpoint(str(scratch), tag="x")
        took = time.perf_counter() - begin
        engine.destroy()
        return took

    def safe(_turn):
        engine = engine_of(size)
        begin = time.perf_counter()
        with deepspeed_checkpoints.reading_safely(engine):
            engine.load_checkpoint(str(scratch), tag="x")
        took = time.perf_counter() - begin
        engine.destroy()
        return took

    try:
        taken = in_turns({"memory": memory, "load_checkpoint": checkpoint, "weights_only": safe}, arguments.rounds)
    finally:
        arena.remove(folder)
        shutil.rmtree(scratch)
    seconds = {name: median(s for _, s in runs) for name, runs in taken.items()}
    ratio = seconds["load_checkpoint"] / seconds["memory"]
    print(
        f"restore {size / 1e6:.0f} MB: from RAM {seconds['memory']:.3f} s, load_checkpoint from a warm file "
        f"{seconds['load_checkpoint']:.3f} s (weights_only {seconds['weights_only']:.3f} s): {ratio:.1f}x"
    )
    return {"bytes": size, "seconds": seconds, "ratios": {"load_checkpoint / memory": ratio}}


def loss_rank(rank: int, world: int, folder: str, job: str, arguments) -> None:
    import numpy as np
    from sampling import FANOUTS, skewed_graph

    from gemini_gnn.config import Config, ModelConfig
    from gemini_gnn.models.build import build_model
    from gemini_gnn.models.tensors import to_tensors
    from gemini_gnn.sampling.in_edges import ReplicatedInEdges
    from gemini_gnn.sampling.sampler import NeighborSampler
    from gemini_gnn.training.engine import build_engine

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    store = dist.FileStore(os.path.join(folder, "store"), world)
    device = torch.device(DEVICE, rank if ON_GPU else 0)
    if ON_GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=rank, world_size=world)
    control = dist.new_group(backend="gloo")
    colptr, row = skewed_graph(arguments.nodes, arguments.edges)
    nodes = len(colptr) - 1
    x, y = torch.randn(nodes, FEATURES, device=device), torch.randint(CLASSES, (nodes,), device=device)
    sampler = NeighborSampler(ReplicatedInEdges(colptr, row, np.arange(nodes)), FANOUTS, seed=0)
    rng = np.random.default_rng(rank)
    settings = ModelConfig(name="sage", hidden=HIDDEN, layers=LAYERS, dropout=0.0)
    config = Config()
    config.deepspeed.zero = arguments.zero
    engine = build_engine(build_model(settings, FEATURES, CLASSES, seed=0).to(device), config, total_steps=10**6)
    snapshots = attach(engine, context=context_of(Path(job), 1, rank, world), hook=False)

    def train(i: int, capture: bool, number: int) -> float:
        """From one step's end to the next one's, with or without a snapshot between them."""
        snapshots.wait()
        dist.barrier(group=control)
        begin = time.perf_counter()
        assert snapshots.ready()
        snapshots.after_step(number, capture)
        batch = sampler.sample(seeds[i], 0, i)
        inputs = x[torch.from_numpy(np.asarray(batch.input_nodes)).to(device)]
        loss = torch.nn.functional.cross_entropy(
            engine(inputs, [to_tensors(block, device) for block in batch.blocks]),
            y[torch.from_numpy(batch.seeds).to(device)],
        )
        engine.backward(loss)
        snapshots.before_step()
        engine.step()
        drained()
        return time.perf_counter() - begin

    seeds = [rng.choice(nodes, arguments.seeds, replace=False) for _ in range(arguments.steps)]
    train(0, True, 1)
    number, pairs = 1, []
    for i in range(arguments.steps):
        taken = {}
        for capture in (True, False) if i % 2 else (False, True):
            number += 1
            taken[capture] = train(i, capture, number)
        pairs.append((taken[True], taken[False]))
    if rank == 0:
        with_s, without_s = median(p[0] for p in pairs), median(p[1] for p in pairs)
        stats = snapshots.stats
        result = {
            "world_size": world,
            "zero": arguments.zero,
            "nodes": nodes,
            "edges": len(row),
            "steps": len(pairs),
            "bytes_per_snapshot": stats.bytes // stats.captures,
            "step_with_s": with_s,
            "step_without_s": without_s,
            "stall_per_snapshot_s": stats.stall_s / stats.captures,
            "ratios": {"loss of throughput": median(p[0] / p[1] for p in pairs) - 1},
        }
        write(Path(folder) / "loss.json", result)
    snapshots.close()
    dist.barrier(group=control)
    dist.destroy_process_group()


def loss_section(arguments) -> dict:
    import json

    import torch.multiprocessing as mp

    job, folder = fresh_folder("loss"), tempfile.mkdtemp(prefix="snapshot-benchmark-")
    arena.make_folder(job)
    try:
        world = min(2, torch.cuda.device_count()) if ON_GPU else 2
        mp.start_processes(_loss_entry, (world, folder, str(job), arguments), nprocs=world, start_method="spawn")
        result = json.loads((Path(folder) / "loss.json").read_text())
    finally:
        arena.remove(job)
        shutil.rmtree(folder)
    print(
        f"loss at every=1, {world} ranks on {DEVICE}, ZeRO-{arguments.zero}, {result['bytes_per_snapshot'] / 1e6:.1f} MB per "
        f"snapshot: step {result['step_without_s'] * 1e3:.0f} ms, {100 * result['ratios']['loss of throughput']:+.2f} % with "
        "snapshots"
    )
    return result


def _loss_entry(rank: int, world: int, folder: str, job: str, arguments) -> None:
    loss_rank(rank, world, folder, job, arguments)


PARTS = {"stall": stall_section, "restore": restore_section, "loss": loss_section}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--hide", type=float, default=4.0, help="computing between two steps, in memcpy times")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps of part loss")
    parser.add_argument("--zero", type=int, default=1, help="stage of part loss")
    parser.add_argument("--out", default="results/snapshot.json")
    arguments = parser.parse_args()
    arguments.sizes, arguments.restore = [10**7, 10**8, 10**9], 10**9
    arguments.nodes, arguments.edges, arguments.seeds = 1_000_000, 20_000_000, 1024
    if arguments.quick:
        arguments.sizes, arguments.restore, arguments.rounds = [10**7, 10**8], 10**8, 5
        arguments.nodes, arguments.edges, arguments.steps = 100_000, 2_000_000, 10
    device = torch.cuda.get_device_name(0) if ON_GPU else "cpu"
    results = {"machine": machine(), "device": device, "arguments": vars(arguments)}
    for name, section in PARTS.items():
        if arguments.part in (name, "all"):
            results[name] = section(arguments)
    results["load_1min_at_end"] = os.getloadavg()[0]
    write(arguments.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
