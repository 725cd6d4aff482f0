"""On a real GPU: ``python -m pytest tests/training/test_cuda.py -v -s``. Skipped where there is none; needs nothing else.

Shows that training on CUDA with NCCL at world size 1 gives the CPU's losses, that two runs and a killed and resumed run agree bit
for bit, that the driver takes the arena's pages, and prints what a snapshot costs. With two GPUs also two ranks over NCCL.
What can be said without a GPU is in test_cuda_on_cpu.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.snapshot import attach
from gemini_gnn.snapshot.context import Context
from gemini_gnn.snapshot.store import arena

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: run this file on a machine that has one")

ROOT = Path(__file__).resolve().parents[2]
DEVICE, BACKEND = "cuda", "nccl"
SMALL = ["dataset.nodes=3000", "training.epochs=4", "logger=quiet", "snapshot=none"]


def command(run_dir: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """What a user types; with several ranks through the real launcher."""
    start = [sys.executable] if ranks == 1 else [*DEEPSPEED, "--num_accelerators", str(ranks)]
    cache = f"dataset.cache={run_dir.parent / 'cache'}"
    return [*start, "launch/train.py", f"run_dir={run_dir}", cache, *overrides]


def environ(device: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    return inherited | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def losses_of(run_dir: Path) -> list[float]:
    rows = read_losses(run_dir / "losses.csv")
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1)), "each step once"
    return [row[2] for row in rows]


def trained(run_dir: Path, *overrides: str, device: str = DEVICE, ranks: int = 1) -> tuple[list[float], dict]:
    """Losses by step, and result.json."""
    done = subprocess.run(
        command(run_dir, *overrides, ranks=ranks),
        cwd=ROOT,
        env=environ(device),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["backend"] == (BACKEND if device == DEVICE else "gloo")
    assert device == "cpu" or result["peak_gpu_bytes"] > 0
    return losses_of(run_dir), result


@pytest.mark.parametrize("model", ["sage", "gcn", "gat"])
def test_losses_are_those_of_the_cpu(tmp_path, model):
    """The whole graph, all neighbors, SGD, no dropout: what is left is the order of sums in float32."""
    exact = ["experiment=exactness", "dataset.nodes=3000", "snapshot=none", "logger=quiet", f"model={model}"]
    exact += ["model.dropout=0", "training.epochs=20"]
    there, result = trained(tmp_path / "gpu", *exact)
    here, expected = trained(tmp_path / "cpu", *exact, device="cpu")
    np.testing.assert_allclose(there, here, rtol=1e-4)
    assert abs(result["test_accuracy"] - expected["test_accuracy"]) < 0.01


@pytest.mark.parametrize(
    "other",
    ["model=sage", "training.precision=bf16", "model=gat", "model.aggregator=max", "features.layout=sparse"],
)
def test_two_runs_agree_bit_for_bit_with_and_without_prefetching(tmp_path, other):
    first, _ = trained(tmp_path / "first", *SMALL, other)
    again, _ = trained(tmp_path / "again", *SMALL, other, "sampling.prefetch=0")
    assert first == again


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_killed_and_typed_again_it_goes_on_bit_for_bit(tmp_path, zero):
    """SIGKILL to trainer, warm parent, worker agent and slot process at once; then the same command."""
    settings = ["dataset.nodes=3000", "training.epochs=12", "sampling.batch_size=64", "logger=quiet"]
    settings.append(f"deepspeed={zero}")
    expected, result = trained(tmp_path / "whole", *settings, "snapshot=none")
    run_dir = tmp_path / "killed"
    killed = [*settings, "snapshot=memory"]
    job = subprocess.Popen(command(run_dir, *killed), cwd=ROOT, env=environ(DEVICE), start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (run_dir / "losses.csv").exists() or len(read_losses(run_dir / "losses.csv")) < len(expected) // 3:
            assert job.poll() is None and time.monotonic() < deadline, "the run did not come to a third of its steps"
            time.sleep(0.05)
        [agent] = [e["pid"] for e in events(run_dir, "agent-*") if e["kind"] == "started"]
        os.kill(agent, signal.SIGKILL)  # the kernel kills its warm parent and trainers with it
        job.kill()
    finally:
        job.kill()
        job.wait()
    done = len(read_losses(run_dir / "losses.csv"))
    assert done < len(expected), "it was killed in the middle"
    losses, resumed = trained(run_dir, *killed)
    assert losses == expected
    assert [e["step"] for e in events(run_dir, "rank-0") if e["kind"] == "restored"][-1] >= done - 2
    assert (resumed["test_accuracy"], resumed["best_epoch"]) == (result["test_accuracy"], result["best_epoch"])


def events(run_dir: Path, who: str) -> list[dict]:
    [path] = (run_dir / "events").glob(f"{who}.jsonl")
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture
def folder():
    path = arena.folder_of(f"test-{os.getpid()}-{os.urandom(4).hex()}")
    yield path
    arena.remove(path)


class Model(torch.nn.Module):
    """Parameters of several sizes, one of them a scalar, buffers that forward changes, and dropout on the GPU's generator."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.one, self.norm = torch.nn.Linear(64, width), torch.nn.BatchNorm1d(width)
        self.drop, self.two = torch.nn.Dropout(0.3), torch.nn.Linear(width, 8)

    def forward(self, x):
        return self.two(self.drop(self.norm(self.one(x)))) * self.scale


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def loop(seed: int, optimizer: str, width: int = 1000):
    torch.manual_seed(seed)
    module = Model(width).to(DEVICE)
    return module, OPTIMIZERS[optimizer](module.parameters())


def steps(module, optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = module(torch.randn(32, 64, device=DEVICE)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def everything(module, optimizer) -> list[torch.Tensor]:
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [t.detach().cpu().clone() for t in (*module.state_dict().values(), *moments)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_pytorch_goes_on_bit_for_bit(folder, optimizer):
    module, opt = loop(0, optimizer)
    snapshots = attach((module, opt), context=Context("job", folder, 0, 1, 0, 1, 1, 1))
    for _ in range(5):
        snapshots.wait()  # so that no step is skipped
        steps(module, opt, 1)
    snapshots.close()
    expected = everything(module, opt)
    after = steps(module, opt, 3)

    fresh, other = loop(1, optimizer)
    again = attach((fresh, other), context=Context("job", folder, 0, 1, 0, 1, 1, 2))
    assert again.restored is not None and again.restored.step == 5
    again.close()
    assert all(torch.equal(a, b) for a, b in zip(everything(fresh, other), expected, strict=True))
    assert steps(fresh, other, 3) == after, "also the generator of the GPU goes on where it was"


def test_the_driver_takes_the_pages_of_the_arena_and_gives_them_back(folder):
    """A driver that refuses fails this test; training would only be slower. Prints how fast 300 MB are copied."""
    module, opt = loop(0, "adam", width=350_000)
    snapshots = attach((module, opt), context=Context("job", folder, 0, 1, 0, 1, 1, 1))
    taken = []
    for _ in range(12):
        snapshots.wait()
        steps(module, opt, 1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        snapshots.before_step()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    nbytes, fence_ms = snapshots.stats.bytes // snapshots.stats.captures, float(np.median(taken[-6:]))
    cuda = snapshots._copier.cuda
    assert cuda is not None and not cuda._refused and len(cuda._registered) >= 3, "every slot is page-locked"
    print(f"\n{nbytes / 1e6:.0f} MB copied in {fence_ms:.2f} ms: {nbytes / fence_ms / 1e6:.1f} GB/s")
    snapshots.close()
    assert cuda._registered == [], "nothing stays page-locked when the arena is unmapped"


def test_what_snapshots_cost_on_this_gpu(tmp_path):
    """The figures themselves are read, not judged: benchmarks/snapshot.py finds the GPU by itself."""
    out = tmp_path / "snapshot.json"
    line = [sys.executable, "benchmarks/snapshot.py", "--quick", "--out", str(out)]
    done = subprocess.run(
        line, cwd=ROOT, env=environ(DEVICE), text=True, stdout=subprocess.PIPE, timeout=900, check=False
    )
    print("\n" + done.stdout)
    assert done.returncode == 0
    assert json.loads(out.read_text())["device"] != "cpu"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: NCCL refuses two ranks on it")
@pytest.mark.parametrize("topology", ["replicated", "partitioned"])
def test_two_ranks_over_nccl_give_the_losses_of_one(tmp_path, topology):
    same = ["experiment=exactness", *SMALL, "sampling.fanouts=[5,3]", f"sampling.topology={topology}"]
    same += ["features.shared=false"]  # as ranks of two machines
    alone, _ = trained(tmp_path / "one", *same, "sampling.batch_size=128")
    both, result = trained(tmp_path / "two", *same, "sampling.batch_size=64", ranks=2)
    np.testing.assert_allclose(both, alone, rtol=1e-4)
    assert 0 < result["communication_fraction"] < 1 and result["remote_bytes"] > 0
