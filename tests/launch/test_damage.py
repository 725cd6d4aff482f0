"""A byte that flips in memory while training goes on: two machines, each an arena of this one, and real trainers."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from gemini_gnn.cluster.hosts import random_port
from gemini_gnn.recovery import home
from gemini_gnn.snapshot.store import arena, format
from gemini_gnn.snapshot.store.format import SlotState
from tests.launch.test_resume import ROOT, TINY, processes_of, same_run, wait_for
from tests.recovery.arenas import flip
from tests.trainers import trained


def own_address():
    """One that other machines would reach: agents refuse a job of several machines that meets at loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network address")
        return probe.getsockname()[0]


@pytest.fixture
def roots(tmp_path):
    """Of the arenas of two machines, in host memory."""
    paths = [f"/dev/shm/gemini-test-{os.getpid()}-{machine}" for machine in range(2)]
    for path in paths:
        os.mkdir(path, 0o700)
    yield paths
    for pid in processes_of(tmp_path / "run"):
        os.kill(pid, signal.SIGKILL)
    for path in paths:
        arena.remove(home.arena_of(tmp_path / "run", path))
        os.rmdir(path)


def newest(folder, shard):
    """Identity and number of its newest committed slot."""
    found = []
    for file in arena.slots(folder):
        view = file.view()
        file.close()
        if view.shard == shard and view.state is SlotState.COMMITTED:
            found.append((view.identity, view.slot))
    return max(found, default=None)


def test_an_own_slot_that_is_damaged_before_it_is_copied_costs_a_restart_and_no_bit(roots, tmp_path):
    run_dir, address, port = tmp_path / "run", own_address(), str(random_port())
    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", "training.epochs=40", "deepspeed=zero1"]
    trained(2, tmp_path / "undisturbed", *settings)
    slots = []
    for rank, root in enumerate(roots):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "DS_ACCELERATOR": "cpu"}
        place |= {"MASTER_ADDR": address, "MASTER_PORT": port}
        environ = {**os.environ, **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, "launch/train.py", f"run_dir={run_dir}", *settings, "logger=quiet"]
        command += [f"snapshot.arena={root}", "snapshot.replicas=2", "snapshot.replicate_every_s=0.5"]
        slots.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL))
    folder, seen = home.arena_of(run_dir, roots[1]), set()

    def damaged():
        """Flip a byte in each new snapshot, until one of them has no copy yet."""
        found = newest(folder, "rank-00001")
        if found is not None and found not in seen and found[0].step > 20:
            seen.add(found)
            flip(folder, "rank-00001", found[1], at=format.PAGE + 1000)
        path = run_dir / "failures.jsonl"
        return json.loads(path.read_text().splitlines()[0]) if path.exists() and path.read_text() else None

    failure = wait_for(damaged, "failure")
    assert [slot.wait(120) for slot in slots] == [0, 0], (run_dir / "logs" / "rank-0.log").read_text()[-4000:]
    assert failure["kind"] == "damaged copy" and "rank-00001" in failure["cause"], failure
    same_run(run_dir, tmp_path / "undisturbed")
