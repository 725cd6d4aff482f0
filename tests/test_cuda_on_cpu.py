"""What can be said of the CUDA and NCCL paths without a GPU: decisions, and the order of calls. Nothing here runs on one.

For a run on a GPU see test_cuda.py.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemini_gnn.errors import ClusterError
from gemini_gnn.halo.exchange import HaloExchange
from gemini_gnn.training import groups


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
