"""How ranks come together, and how they do not."""

import datetime

import pytest
import torch.distributed as dist

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import DistributedConfig
from gemini_gnn.errors import ClusterError
from gemini_gnn.training import groups


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20))


def place(rank, world=2, port=0):
    return Place(rank, world, rank, world, f"h{rank}", "127.0.0.1", port, "deepspeed")


def test_ranks_of_two_jobs_do_not_mix(store, monkeypatch):
    groups._take_seat(store, place(1))
    groups._take_seat(store, place(0))
    groups._wait_for_all(store, place(0), 5)
    monkeypatch.setattr(groups.os, "getpid", lambda: 1)
    with pytest.raises(ClusterError, match=r"rank 1 of the job at 127.0.0.1:0 is already h1, pid \d+.*--master_port"):
        groups._take_seat(store, place(1))
    groups._take_seat(dist.PrefixStore("1", store), place(1))  # another generation


def test_ranks_that_do_not_come_are_named(store):
    groups._take_seat(store, place(0, 4))
    groups._take_seat(store, place(2, 4))
    with pytest.raises(ClusterError, match=r"ranks \[1, 3\] of 4 did not come within 1 s"):
        groups._wait_for_all(store, place(0, 4), 1.0)


def test_a_port_that_is_taken(store, monkeypatch):
    monkeypatch.setattr(groups.os, "environ", dict(groups.os.environ))  # join() writes there
    with pytest.raises(ClusterError, match=f"port {store.port} on 127.0.0.1 is taken.*--master_port"):
        groups.join(place(0, port=store.port), DistributedConfig(backend="gloo", interface="lo", start_timeout_s=5))


def test_an_interface_that_is_not_there():
    with pytest.raises(ClusterError, match=r"distributed\.interface=eth77: this machine has .*lo \("):
        groups._interface(place(0), DistributedConfig(interface="eth77"))
