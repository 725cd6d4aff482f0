"""Faults of agents, machines and links on two hosts, and visitors from everywhere: the losses are those of a calm run."""

from __future__ import annotations

import re
import sys

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from tests.cluster.test_hosts_recovery import EPOCHS, agent_events, calm, calm_run
from tests.cluster.test_hosts_train import ROOT, ended, graph, losses, nobody_trains, terminal, train, wait_until

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
        (KILLS, [], {"started": 1, "claimed": 1, "warm_died": 1}, ["starting another", "takes its place"]),
        (HANGING, HANGS, {"hang": 1}, ["as generation 2"]),
        (CUT, ["faults.allow=true", "recovery.heartbeat_s=0.5"], {"worker_lost": 1}, ["as generation 2"]),
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


def test_a_link_that_is_cut_by_a_visitor_comes_back_after_the_agent_is_killed(lab, graph, tmp_path):
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir, "training.epochs=100000", "faults.allow=true")
    wait_until(lambda: losses(run_dir), run_dir)
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
    steps = len(losses(run_dir))
    wait_until(lambda: len(losses(run_dir)) > steps, run_dir)
    assert typed(lab, "h0", "stop", run_dir, "keep=false").returncode == 0
    assert ended(process, run_dir, 60) == 143, terminal(run_dir)[-6000:]
