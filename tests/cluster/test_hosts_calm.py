"""No false alarm: a busy machine, a file system that hangs and agents that are stopped for a moment are no failures.

Four hosts that train and a standby share the cores of this machine with as many busy loops as it has. The run directory
lies on a network file system that stops answering for 20 s. Each agent is stopped for two seconds. Nothing of it may
restart anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.failures import read_failures
from gemini_gnn.observe.status import read_status
from tests.cluster.test_hosts_train import ROOT, ended, graph, losses, terminal, train, wait_until

__all__ = ["graph"]  # the fixture

pytestmark = [pytest.mark.lab]
HOSTS = ["h0", "h1", "h2", "h3", "h4"]  # the last one stands by
HANGS_S = 20.0
STOPS_S = 2.0  # longer than `silence_s`: the kernels of the hosts go on acknowledging heartbeats


@pytest.fixture
def network_folder(lab):
    if not shutil.which("sshfs") or not os.path.exists("/dev/fuse"):
        pytest.skip("the network file system needs sshfs and /dev/fuse: apt-get install sshfs")
    yield lab.nfs_up()
    lab.nfs_down()


def stop_for(lab, hosts, words, seconds):
    """Stop the processes with ``words`` in their command line, and let them go on.

    One command on each host does both: on a machine that is so busy a second one may take seconds to begin.
    """
    match = f"[{words[0]}]{words[1:]}"  # does not match the command line of this shell
    script = f"pkill -STOP -f '{match}' && sleep {seconds} && pkill -CONT -f '{match}'"
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda host: lab.run(host, ["sh", "-c", script], seconds + 60), hosts))
    assert [one.returncode for one in done] == [0] * len(hosts), f"{words}: {[one.stdout for one in done]}"


@pytest.mark.parametrize(
    "minutes",
    [
        pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(400)]),
        pytest.param(30, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_nothing_fails_and_nothing_is_restarted(lab, network_folder, graph, tmp_path, minutes):
    run_dir = network_folder / f"calm-{minutes}"
    seen = lab.folder / "nas-disk" / f"calm-{minutes}"  # the same, where the server keeps it
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(HOSTS))]
    settings = [*graph, "training.epochs=100000", "evaluation.every=50", "partition.folder=" + str(tmp_path / "parts")]
    settings.append("recovery.standby_machines=1")
    try:
        process = train(lab, "h0", launcher, *settings, run_dir=run_dir, output=seen)
        wait_until(lambda: len(losses(seen)) > 5 or process.poll() is not None, seen)
        begin, hangs, turn = time.monotonic(), 0, 0
        while time.monotonic() - begin < minutes * 60:
            assert process.poll() is None, terminal(seen)[-6000:]
            stop_for(lab, [HOSTS[turn % len(HOSTS)]], "gemini_gnn.recovery.worker.agent", STOPS_S)
            if turn % 8 == 2:  # all of them at once: the whole job sees the same server
                stop_for(lab, HOSTS, "sshfs", HANGS_S)
                hangs += 1
            time.sleep(10.0)  # not waiting for an event: the alarm that must not come has time to come
            turn += 1
        status, done = read_status(seen), len(losses(seen))
        assert (status["term"], status["generation"], status["state"]) == (1, 1, "running")
        assert [one["ready"] for one in status["machines"]] == [True] * len(HOSTS)
        assert read_failures(seen) == [] and "restarting" not in terminal(seen) and hangs
        wait_until(lambda: len(losses(seen)) > done or process.poll() is not None, seen)
    finally:
        for one in busy:
            one.kill()
            one.wait(10)
    stopped = lab.run("h0", [sys.executable, "launch/stop.py", f"run_dir={run_dir}", "keep=false"], 120, cwd=ROOT)
    assert stopped.returncode == 0, stopped.stdout
    assert ended(process, seen, 60) != 0, "143: it was asked to stop"
