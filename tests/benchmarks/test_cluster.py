"""The hand-written aggregations of benchmarks/cluster.py sum what the process group sums."""

import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def sums_on_ranks(rank, world, length):
    import cluster
    import torch
    import torch.distributed as dist

    cluster.PIECE = 64  # bytes: several pieces per message
    expected = torch.arange(length, dtype=torch.float32) * (rank + 1)
    dist.all_reduce(expected)
    for contender in (cluster.ring, cluster.parameter_server):
        x = torch.arange(length, dtype=torch.float32) * (rank + 1)
        contender(x)
        assert torch.equal(x, expected), contender.__name__
    x = torch.full((length,), float(rank))
    cluster.send(x)
    assert rank != 1 or torch.equal(x, torch.zeros(length))
    sent = torch.arange(length, dtype=torch.float32) + 1000 * rank
    assert torch.equal(cluster.pairs(sent), cluster.all_to_all(sent))


@pytest.mark.parametrize("length", [2, 100, 1001])  # 2: fewer numbers than ranks, so one chunk is empty
def test_sums(length):
    run_ranks(sums_on_ranks, 3, length)


def test_limits():
    import cluster

    assert cluster.limit_s("ring", 125_000_000, 4, 1e9) == pytest.approx(1.5)
    assert cluster.limit_s("all_to_all", 125_000_000, 4, 1e9) == pytest.approx(0.75)
    assert cluster.limit_s("send", 125_000_000, 4, 1e9) == pytest.approx(1.0)


def test_table_and_plot(tmp_path):
    import cluster

    rows = [
        {"contender": name, "hosts": 2, "rate": "1gbit", "size_bytes": size, "seconds": 0.5, "limit_s": 0.25}
        for name in cluster.CONTENDERS
        for size in (1 << 20, 4 << 20)
    ]
    text = cluster.table(rows, [{"what": "local disk", "write": 1e9, "read": 2e9}])
    assert "50 %" in text and "1000 MB/s" in text
    cluster.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
