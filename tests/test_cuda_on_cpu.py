"""What can be said of the CUDA and NCCL paths without a GPU: decisions, and the order of calls. Nothing here runs on one.

For a run on a GPU see test_cuda.py.
"""

import os
import threading
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
from gemini_gnn.graph.partitioned import PartitionedGraph
from gemini_gnn.halo.exchange import HaloExchange
from gemini_gnn.halo.prefetch import prefetch
from gemini_gnn.models.build import build_model
from gemini_gnn.models.tensors import moved, to_tensors
from gemini_gnn.training import groups
from gemini_gnn.training.data import BatchSource
from tests.model_blocks import random_block
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


def test_what_the_user_told_nccl_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Ring", "GLOO_SOCKET_IFNAME": "eth1"})
    groups._prepare_cuda(torch.device("cuda", 0))
    assert os.environ["NCCL_ALGO"] == "Ring"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth1"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


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
    from gemini_gnn.recovery import warm

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
                    rank, world, "gloo", torch.device("cpu"), torch.distributed.new_group(), None, None, None
                ),
            )
            for _ in range(2)
        )
        keys = plain.step_keys(0) + plain.step_keys(1) + plain.step_keys(2)
        expected = [plain.make(key) for key in keys]
        torch.distributed.all_to_all_single = noted
        make, finish = staged.stages("nccl")
        with prefetch(make, keys, 2, finish=finish) as batches:
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
