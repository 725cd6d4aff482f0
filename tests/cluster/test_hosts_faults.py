"""Faults of agents, machines and links on two hosts, and visitors from everywhere: the losses are those of a calm run."""

from __future__ import annotations

import re
import sys

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from tests.cluster.test_hosts_recovery import EPOCHS, agent_events, calm, calm_run
from tests.cluster.test_hosts_train import ROOT, ended, graph, losses, nobody_trains, terminal, train, wait_until
from tests.lab.lab import kill_group

__all__ = ["calm", "calm_run", "graph"]  # the fixtures

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
QUICK = ["recovery.heartbeat_s=0.1", "recovery.silence_s=2"]
HANGS = ["recovery.hang_factor=5", "recovery.hang_floor_s=2", "faults.allow=true"]


def start(lab, graph, run_dir, *settings):
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h0", "h1"], 2))]
    return train(lab, "h0", launcher, *graph, *QUICK, *settings, run_dir=run_dir)


KILLS = ["kill-agent h1 @ step 5", "kill-warm h1 @ step 12", "kill-root @ step 18"]
HANGING = ["hang-collective 3 @ step 20"]
CUT = ["cut-link h1 for 8 s @ step 5"]


@pytest.mark.parametrize(
    ("faults", "settings", "events", "said"),
    [
        (KILLS, [], {"started": 1, "claimed": 2, "warm_died": 1}, ["starting another", "takes its place"]),
        (HANGING, HANGS, {"hang": 1}, ["as generation 2"]),
        pytest.param(
            CUT,
            ["faults.allow=true", "recovery.heartbeat_s=0.5"],
            {"worker_lost": 1},
            ["as generation 2"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["kills", "hangs", "cut"],
)
def test_the_job_goes_on_by_itself(lab, graph, calm, tmp_path, faults, settings, events, said):
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir, EPOCHS, f"faults.at=[{', '.join(faults)}]", *settings)
    assert ended(process, run_dir, 180) == 0, terminal(run_dir)[-6000:]
    assert losses(run_dir) == calm
    for kind, times in events.items():
        assert len(agent_events(run_dir, kind)) == times, agent_events(run_dir, kind)
    assert len(list((run_dir / "faults").glob("*step*"))) == len(faults)
    assert all(words in terminal(run_dir) for words in said), terminal(run_dir)[-6000:]
    assert lab.has_ipv6("h0") == lab.has_ipv6("h1"), "a device that was down has its addresses again"
    assert nobody_trains(lab)
    for host in ("h0", "h1"):
        assert lab.run(host, ["ls", "/dev/shm"]).stdout == "", "snapshots and locks are gone"


def typed(lab, host, script, run_dir, *words):
    return lab.run(host, [sys.executable, f"launch/{script}.py", f"run_dir={run_dir}", *words], 60, cwd=ROOT)


def test_visitors_of_the_job_and_from_outside(lab, graph, tmp_path):
    """h3 has no part in the job, and sees its run directory."""
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir, "training.epochs=100000")
    wait_until(lambda: losses(run_dir), run_dir)
    for visitor, words, expected, kind in (
        ("h1", ["kill-rank", "3"], "SIGKILL to rank 3, pid ", "trainer_forked"),
        ("h3", ["kill-agent", "h1"], "SIGKILL to the worker agent, pid ", "worker_joined"),
        ("h1", ["kill-warm", "rank:1"], "SIGKILL to the warm parent, pid ", "warm_died"),
        ("h3", ["kill-root"], "SIGKILL to the root agent, pid ", "claimed"),
    ):
        before, steps = len(agent_events(run_dir, kind)), len(losses(run_dir))
        done = typed(lab, visitor, "inject", run_dir, *words)
        where = "h1" if words[1:] in (["3"], ["h1"]) else "h0"
        assert done.returncode == 0 and done.stdout.startswith(expected) and done.stdout.endswith(f" on {where}\n"), (
            done
        )
        wait_until(lambda b=before, k=kind: len(agent_events(run_dir, k)) > b, run_dir)
        wait_until(lambda s=steps: len(losses(run_dir)) > s, run_dir)
    whole = r"yes, chosen +every machine has its own\n(.+\n)*newest snapshot with all 2 copies of every shard: \d"
    wait_until(lambda: re.search(whole, typed(lab, visitor, "inspect_snapshots", run_dir).stdout), run_dir)
    refused = typed(lab, visitor, "inject", run_dir, "cut-link", "h1", "--for", "1s")
    assert refused.returncode == 2 and "faults.allow=true" in refused.stdout
    stopped = typed(lab, visitor, "stop", run_dir, "keep=false")
    assert stopped.returncode == 0 and "has ended: stopped" in stopped.stdout and "run this" not in stopped.stdout, (
        stopped
    )
    assert ended(process, run_dir, 60) == 143, terminal(run_dir)[-6000:]
    wait_until(lambda: nobody_trains(lab), run_dir)
    for host in ("h0", "h1"):
        assert lab.run(host, ["ls", "/dev/shm"]).stdout == ""
    late = typed(lab, visitor, "stop", run_dir, "keep=false")
    assert late.returncode == 0 and "run this command on each" in late.stdout


def more_steps(run_dir):
    before = len(losses(run_dir))
    wait_until(lambda: len(losses(run_dir)) > before, run_dir)


def test_faults_of_machines_by_a_visitor(lab, graph, tmp_path):
    """When the agent that did it is killed, the link comes back, and the memory that it has filled is free again."""
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir, "training.epochs=100000", "faults.allow=true")
    wait_until(lambda: losses(run_dir), run_dir)

    def shm_left():
        return int(lab.run("h1", ["stat", "-f", "-c", "%a", "/dev/shm"]).stdout)

    lab.run("h1", ["mount", "-o", "remount,size=256m", "/dev/shm"])
    for words, code, said in (
        (["corrupt-replica", "3"], 0, r"a byte of snapshot .* flipped in /dev/shm/.*/rank-00003\.\d on h0"),
        (["fill-shm", "h1", "--for", "300s"], 0, "the file system of /dev/shm/.* on h1 is full for 300 s"),
        (["hang-filesystem", "--for", "2s"], 2, "hang-filesystem: .*got a file system of type .*; hang-filesystem: .*"),
        (
            ["split", "h0", "from", "others", "--for", "4s"],
            0,
            r"h\d sends nothing to .* 4 s; h\d sends nothing to .* 4 s",
        ),
    ):
        done = typed(lab, "h0", "inject", run_dir, *words)
        assert (done.returncode, bool(re.fullmatch(f"(gemini_gnn: |error: )?{said}\n", done.stdout))) == (code, True), (
            done
        )
    wait_until(lambda: agent_events(run_dir, "worker_lost"), run_dir)
    wait_until(lambda: shm_left() == 0, run_dir)
    more_steps(run_dir)
    cut = typed(lab, "h1", "inject", run_dir, "cut-link", "h1", "--for", "4s")
    assert (cut.returncode, cut.stdout) == (0, "eth0 of h1 is down for 4 s\n")
    wait_until(
        lambda: (
            "eth0" in lab.run("h1", ["ip", "link", "show", "dev", "eth0"]).stdout
            and " state DOWN " in lab.run("h1", ["ip", "link", "show", "dev", "eth0"]).stdout
        ),
        run_dir,
    )
    lab.run("h1", ["pkill", "-KILL", "-f", "gemini_gnn.recovery.worker.agent"])
    wait_until(lambda: " state UP " in lab.run("h1", ["ip", "link", "show", "dev", "eth0"]).stdout, run_dir)
    more_steps(run_dir)
    assert shm_left() > 0, "what filled it ended with the agent that had filled it"
    done = typed(lab, "h3", "inject", run_dir, "power-off", "rank:3")
    assert (done.returncode, done.stdout) == (0, "h1 loses its power\n")
    wait_until(lambda: not lab.is_on("h1"), run_dir)
    typed(lab, "h0", "stop", run_dir, "keep=false")
    kill_group(process)  # the launcher waits 15 s for the ssh of a dead host
    process.wait(20)
