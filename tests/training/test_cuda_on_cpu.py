"""What can be said of the CUDA and NCCL paths without a GPU: decisions, and the order of calls. Nothing here runs on one.

For a run on a GPU see test_cuda.py.
"""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemini_gnn.api import partition
from gemini_gnn.compose import compose
from gemini_gnn.config import ModelConfig
from gemini_gnn.errors import ClusterError
from gemini_gnn.graph.datasets import load_dataset
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.halo.exchange import HaloExchange
from gemini_gnn.models.build import build_model
from gemini_gnn.models.tensors import moved, to_tensors
from gemini_gnn.observe.errors import is_consequence
from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.capture import copier
from gemini_gnn.snapshot.capture.cuda import CudaCopies
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.state.collect import _moments
from gemini_gnn.snapshot.store import arena
from gemini_gnn.training import groups
from gemini_gnn.training.data import BatchSource
from gemini_gnn.training.prefetch import prefetch
from tests.models.blocks import random_block
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("wanted", "gpus", "backend"),
    [
        ("auto", ["a"], "nccl"),
        ("auto", ["a", "b", "c", "d"], "nccl"),
        ("auto", ["a", "a"], "gloo"),  # one GPU, two ranks
        ("auto", ["a", ""], "gloo"),  # a machine without one
        ("auto", [""], "gloo"),
        ("gloo", ["a", "b"], "gloo"),
        ("nccl", ["a", "b"], "nccl"),
    ],
)
def test_all_ranks_decide_on_one_backend(wanted, gpus, backend):
    assert groups.choose_backend(wanted, gpus) == backend


def test_nccl_without_a_gpu_for_each_rank_is_refused_with_the_ranks_named():
    with pytest.raises(ClusterError, match=r"for each of 4 ranks; ranks \[1, 3\] have none of their own"):
        groups.choose_backend("nccl", ["a", "", "b", "b"])


def fake_gpus(monkeypatch, uuids):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=uuids[i]))


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(monkeypatch):
    fake_gpus(monkeypatch, ["a", "b"])
    assert [groups.own_gpu(rank) for rank in range(2)] == [(0, "a"), (1, "b")]
    fake_gpus(monkeypatch, ["b"])  # srun --gpus-per-task=1
    assert groups.own_gpu(1) == (0, "b")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert groups.own_gpu(1) == (0, "")


def test_gpus_that_cuda_cannot_use_are_an_error_and_not_the_cpu(monkeypatch):
    def refuse(number):
        raise RuntimeError("No CUDA GPUs are available")

    fake_gpus(monkeypatch, ["a"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    with pytest.raises(ClusterError, match="CUDA cannot use them: No CUDA GPUs are available; see nvidia-smi"):
        groups.own_gpu(0)


def test_what_the_user_told_nccl_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Ring", "GLOO_SOCKET_IFNAME": "eth1"})
    groups._prepare_cuda(torch.device("cuda", 0))
    assert os.environ["NCCL_ALGO"] == "Ring"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth1"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


ASKS_NOTHING = """
import os, torch
exists, asked = os.path.exists, []
os.path.exists = lambda path: path == "/dev/nvidiactl" or exists(path)  # as on a machine with a GPU
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 0)
from gemini_gnn.recovery.worker import warm
assert warm.preload(["gemini_gnn.training.preload"]) is None
assert not asked, asked
assert "DS_ACCELERATOR" not in os.environ, "trainers are to find the GPU"
from deepspeed.accelerator import get_accelerator
torch.cuda.is_available = torch.cuda.device_count = lambda: 1
assert get_accelerator().device_name() == "cuda"  # what a user's script would ask in a trainer
"""


def test_a_warm_parent_imports_all_of_it_without_asking_for_gpus():
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ASKS_NOTHING], env=environment, check=True, timeout=120)


def test_deepspeed_puts_its_tensors_where_the_model_is(monkeypatch):
    from deepspeed.accelerator import get_accelerator, real_accelerator

    from gemini_gnn.training import engine

    monkeypatch.setattr(real_accelerator, "ds_accelerator", None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    engine._use_accelerator(torch.device("cuda", 0))
    assert (get_accelerator().device_name(), os.environ["LOCAL_RANK"]) == ("cuda", "0")
    engine._use_accelerator(torch.device("cpu"))
    assert get_accelerator().device_name() == "cpu"


def test_a_warm_parent_that_counted_gpus_may_fork_and_one_that_initialised_cuda_may_not(monkeypatch):
    from gemini_gnn.recovery.worker import warm

    monkeypatch.setattr(warm, "threads", lambda: 1)
    monkeypatch.setattr(warm, "nvidia_files", lambda: {5: "/dev/nvidiactl", 6: "/dev/nvidia0"})  # what NVML opens
    assert warm.unfit() is None
    monkeypatch.setattr(warm, "nvidia_files", lambda: {5: "/dev/nvidiactl", 6: "/dev/nvidia-uvm"})
    assert "initialised CUDA" in (warm.unfit() or "")


class FakeWork:
    """A collective on NCCL as seen from the host: done after some looks, or never."""

    def __init__(self, looks):
        self.looks, self.waits = looks, []

    def is_completed(self):
        self.looks -= 1
        return self.looks < 0

    def wait(self, *limit):
        self.waits.append(limit)


def test_the_wait_for_nccl_polls_and_has_a_time_limit():
    exchange = HaloExchange(None, np.array([0, 4]), 0, chunk_bytes=64, timeout_s=0.05, device="cuda")
    soon, never = FakeWork(3), FakeWork(10**9)
    exchange._wait(soon)
    assert soon.waits == [()]  # without a limit: with one NCCL would look every 10 ms only
    with pytest.raises(RuntimeError, match="timed out"):
        exchange._wait(never)
    assert never.waits == []


# Tensors on torch's "meta" device have shapes and no bytes. They go the way of every device that is not the CPU, cannot be
# combined with CPU tensors by most operations, and cannot be read back.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(name="sage"),
        ModelConfig(name="sage", aggregator="max", layer_norm=True),
        ModelConfig(name="gcn"),
        ModelConfig(name="gat", heads=2),
    ],
    ids=["mean", "max", "gcn", "gat"],
)
def test_models_stay_on_their_device_and_read_nothing_back(config, dtype):
    from gemini_gnn.training.loop import summed_loss  # imports DeepSpeed, which the ranks of other tests need not

    config = replace(config, hidden=8, layers=2, dropout=0.5)
    meta = torch.device("meta")
    model = build_model(config, 5, 3, seed=0).to(meta, dtype)
    blocks = [random_block(30, 12, 50, seed=1, weighted=True), random_block(12, 4, 20, seed=2, weighted=True)]
    there = [moved(to_tensors(block), meta) for block in blocks]
    x, y = torch.empty(30, 5, device=meta, dtype=dtype), torch.zeros(4, dtype=torch.int64, device=meta)
    loss = summed_loss(model(x, there), y)
    loss.backward()
    h = model.layer(0, there[0], x)
    assert {t.device for t in (loss, h, *(p.grad for p in model.parameters()))} == {meta}
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(x, [to_tensors(block) for block in blocks])


def batches_in_two_stages(rank, world, folder):
    """The batches made by one thread, and those of which the training thread makes the collective part, as with NCCL."""
    threads, exchange = set(), torch.distributed.all_to_all_single

    def noted(*args, **kwargs):
        threads.add(threading.current_thread().name)
        return exchange(*args, **kwargs)

    for topology in ("replicated", "partitioned"):
        config = compose([f"sampling.topology={topology}", "sampling.batch_size=16"])
        plain, staged = (
            BatchSource(
                PartitionedGraph.open(folder),
                config,
                groups.Groups(
                    rank=rank,
                    world_size=world,
                    backend="gloo",
                    device=torch.device("cpu"),
                    machine=range(rank, rank + 1),
                    halo=torch.distributed.new_group(),
                    evaluation=None,
                    control=None,
                    store=None,
                ),
            )
            for _ in range(2)
        )
        keys = plain.step_keys(0) + plain.step_keys(1) + plain.step_keys(2)
        expected = [plain.make(key) for key in keys]
        torch.distributed.all_to_all_single = noted
        prepare, complete = staged.stages("nccl")
        with prefetch(prepare, keys, 2, complete=complete) as batches:
            for batch, other in zip(batches, expected, strict=True):
                torch.distributed.all_reduce(torch.ones(1))  # the gradients, on another group from the same thread
                assert torch.equal(batch.x, other.x) and torch.equal(batch.y, other.y) and batch.edges == other.edges
                for ours, theirs in zip(batch.blocks, other.blocks, strict=True):
                    assert torch.equal(ours.indptr, theirs.indptr) and torch.equal(ours.indices, theirs.indices)
        torch.distributed.all_to_all_single = exchange
    return threads


def test_order_of_nccl_over_gloo_only_the_training_thread_communicates(tmp_path):
    config = compose(["dataset.nodes=300", f"dataset.cache={tmp_path}"])
    folder = partition(load_dataset(config.dataset), tmp_path / "parts", parts=2).folder
    assert run_ranks(batches_in_two_stages, 2, folder) == [{"MainThread"}] * 2


class FakeEvent:
    """A CUDA event that the GPU comes to when ``now`` says so; its time is when it was recorded."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def query(self):
        return self.at < FakeEvent.now

    def elapsed_time(self, end):
        assert end.query()
        return (end.at - self.at) * 1e3


def test_collectives_on_a_stream_are_counted_when_they_are_over(monkeypatch):
    from gemini_gnn.training import engine

    def all_reduce():  # three seconds on the compute stream
        FakeEvent.now += 3.0
        return "sum"

    backend = SimpleNamespace(all_reduce=all_reduce)
    monkeypatch.setattr(engine.deepspeed.comm.comm, "cdb", backend)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = engine.CollectiveClock(torch.device("cuda", 0))
    assert backend.all_reduce() == "sum"
    assert clock.seconds == 0.0
    FakeEvent.now += 1.0
    assert clock.seconds == clock.seconds == 3.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_second_training_in_a_process_takes_the_place_of_the_first_ones_clock(monkeypatch, device):
    from gemini_gnn.training import engine

    backend = SimpleNamespace(all_reduce=lambda: "sum")
    original = backend.all_reduce
    monkeypatch.setattr(engine.deepspeed.comm.comm, "cdb", backend)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    first, second = (engine.CollectiveClock(torch.device(device, 0)) for _ in range(2))
    assert backend.all_reduce() == "sum" and backend.all_reduce.untimed is original
    assert first._seconds == 0.0 and not first._under_way, "or its events would pile up: nobody asks it any more"
    assert len(second._under_way) == 1 if device == "cuda" else second.seconds > 0.0
    engine._stop_clock()
    assert backend.all_reduce is original, "DeepSpeed goes on without us"


class FakeDriver:
    """Streams, events and page-locking as torch.cuda has them, over tensors on the CPU; it notes what it was told, in order.

    The compute stream is the training thread itself. What is put on the side stream is done as late as the events allow: when
    the compute stream must wait for it, or, where nobody else makes it happen, when a thread has waited for it a while.
    """

    def __init__(self, monkeypatch, refuse=False):
        self.told, self.refuse, self.queue = [], refuse, []
        self.turn, self.here = threading.Lock(), threading.local()
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: self.note("set_device", device))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream(self, "side"))
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self.here, "stream", stream))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: SimpleNamespace(upto=0, **self.event()))
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "check_error", lambda error: self.check(error))
        monkeypatch.setattr(copier, "on_gpu", lambda tensor: tensor is not None)
        monkeypatch.setattr(CudaCopies, "copy", staticmethod(self.copy))
        zeros = torch.zeros
        monkeypatch.setattr(
            torch, "zeros", lambda *a, **k: self.launch() if k.get("device") == "cuda" else zeros(*a, **k)
        )

    def note(self, *words):
        self.told.append((threading.current_thread().name, *words))

    def launch(self):
        self.note("launch")
        raise RuntimeError("CUDA error: the one of the call before")

    def check(self, error):
        assert error == 0

    def current_stream(self):
        return getattr(self.here, "stream", None) or FakeStream(self, "compute")

    def event(self):
        mark = {}

        def record(stream):
            self.note("record", stream.name)
            mark["upto"] = list(self.queue) if stream.name == "side" else []

        def run():
            with self.turn:
                for work in mark.get("upto", ()):
                    work()
            mark["upto"] = []

        def synchronize():
            deadline = time.monotonic() + 0.1
            while mark["upto"] and time.monotonic() < deadline:
                time.sleep(0.001)
            run()
            self.note("synchronized")

        return {"record": record, "run": run, "synchronize": synchronize}

    def copy(self, target, source):
        stream = self.current_stream()
        self.note("copy", stream.name)
        if stream.name == "side":
            self.queue.append(lambda: target.copy_(source.detach()))
        else:
            target.copy_(source.detach())

    def cudaHostRegister(self, address, nbytes, flags):
        assert address % 4096 == 0 == nbytes % 4096 and flags == 0
        self.note("register", address)
        return 1 if self.refuse else 0

    def cudaHostUnregister(self, address):
        self.note("unregister", address)
        return 0


class FakeStream:
    def __init__(self, driver, name):
        self.driver, self.name = driver, name

    def wait_event(self, event):
        self.driver.note(self.name, "waits")
        if self.name == "compute":
            event.run()
            self.driver.queue.clear()

    def synchronize(self):
        self.driver.note("stream", "synchronized")


def captured(monkeypatch, refuse):
    """Steps with snapshots over a fake driver, and a fresh model restored to the last snapshot; what the driver was told."""
    folder = arena.folder_of(f"test-{os.getpid()}-{os.urandom(4).hex()}")
    driver = FakeDriver(monkeypatch, refuse)

    def parts(seed):
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        return module, torch.optim.Adam(module.parameters(), lr=0.1)

    def everything(module, optimizer):
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return [t.detach().clone() for t in (*module.state_dict().values(), *moments)]

    try:
        module, optimizer = parts(0)
        snapshots = attach((module, optimizer), context=Context("job", folder, 0, 1, 0, 1, 1, 1), hook=False)
        for step in (1, 2, 3, 4):
            optimizer.zero_grad()
            module(torch.randn(8, 3)).square().sum().backward()  # changes the buffers of BatchNorm
            snapshots.before_step()
            optimizer.step()
            snapshots.wait()  # for the snapshot of the step before; its copies were done at the fence
            if step == 3:
                expected = everything(module, optimizer)
            if step < 4:
                assert snapshots.ready()
                snapshots.after_step(step, capture=True)
        snapshots.close()
        monkeypatch.undo()
        fresh, other = parts(1)
        again = attach((fresh, other), context=Context("job", folder, 0, 1, 0, 1, 1, 2))
        assert again.restored is not None and again.restored.step == 3
        restored = everything(fresh, other)
        again.close()
    finally:
        arena.remove(folder)
    assert all(torch.equal(a, b) for a, b in zip(restored, expected, strict=True))
    return driver.told


def test_copies_as_late_as_the_events_allow_are_of_the_right_step(monkeypatch):
    told = captured(monkeypatch, refuse=False)
    words = [w for _, *w in told]
    assert {name for name, what, *_ in told if what == "register"} == {"snapshot"}, "never the training thread"
    assert ["set_device", 1] in words, "a new thread starts on device 0"
    registered = [address for what, *address in words if what == "register"]
    assert sorted(registered) == sorted(address for what, *address in words if what == "unregister")
    assert words.index(["stream", "synchronized"]) < words.index(["unregister", *registered[0]])
    last = [w for w in words if w[0] in ("record", "copy", "side", "synchronized")][-40:]
    late = last.index(["side", "waits"], last.index(["copy", "compute"]))
    assert last[late - 1] == ["record", "compute"], "buffers, then the event, then the side stream waits for it"
    assert last[late + 1 :][-2:] == [["record", "side"], ["synchronized"]]
    assert {tuple(w) for w in last[late + 1 : -2]} == {("copy", "side")}


def test_a_driver_that_refuses_the_arena_costs_speed_only(monkeypatch, caplog):
    told = captured(monkeypatch, refuse=True)
    words = [what for _, what, *_ in told]
    assert words.count("register") == 1, "asked once"
    assert words[words.index("register") + 1] == "launch", "in the same thread: the runtime forgets the error with it"
    assert not any(what == "unregister" for _, what, *_ in told)
    assert "does not page-lock the arena" in caplog.text


def test_moments_are_made_where_the_optimizer_keeps_them():
    scalar = torch.nn.Parameter(torch.empty((), device="meta"))  # its moments look like its step count
    optimizer = torch.optim.Adam([scalar])
    for entry in _moments(optimizer, [("scale", scalar)]):
        entry.put(torch.tensor(1.0))
    assert {k: v.device.type for k, v in optimizer.state[scalar].items()} == {
        "step": "cpu",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


@pytest.mark.parametrize(
    "said",
    [
        "NCCL error ...: remote process exited or there was a network error, NCCL version 2.27.3",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "NCCL communicator was aborted on rank 1.",
        "Work WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=120000) timed out in blocking wait.",
    ],
)
def test_what_nccl_says_of_a_dead_peer_is_not_shown_as_the_cause(said):
    assert is_consequence(torch.distributed.DistBackendError(said))
