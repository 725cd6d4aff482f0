"""Machines that are lost while a job trains: it goes on by itself, and ends as if nothing had happened, bit for bit.

Power is cut, cables are pulled, the network is split, for real. Steps are counted in losses.csv.
"""

from __future__ import annotations

import json

import pytest

from gemini_gnn.cluster.hosts import KEEPALIVE
from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.observe.status import read_status
from gemini_gnn.snapshot.store.identity import from_json
from tests.cluster.test_hosts_recovery import PHASES, agent_events
from tests.cluster.test_hosts_train import terminal, train, wait_until
from tests.lab.lab import kill_group
from tests.launch.test_resume import same_run
from tests.trainers import trained

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
SMALL = ["dataset.nodes=1500", "dataset.feature_dim=16", "model.hidden=32", "sampling.batch_size=16"]
SMALL += ["sampling.fanouts=[5,5]", "evaluation.every=6", "deepspeed.zero=1"]


class Run:
    """A job on hosts of the lab: the last ``standbys`` of them train nothing; its terminal is on ``terminal``."""

    def __init__(self, lab, settings, run_dir, hosts, standbys, terminal="h5"):
        self.lab, self.run_dir, self.host, self.hosts = lab, run_dir, terminal, hosts
        self.settings = [*settings, f"recovery.standby_machines={standbys}"]
        self.start()

    def start(self, *settings):
        launcher = [*DEEPSPEED, "--hostfile", str(self.lab.hostfile(self.hosts))]
        self.begun = False
        environ = {"PDSH_SSH_ARGS_APPEND": KEEPALIVE}
        self.process = train(
            self.lab, self.host, launcher, *self.settings, *settings, run_dir=self.run_dir, environ=environ
        )

    @property
    def status(self):
        return read_status(self.run_dir)

    @property
    def steps(self):
        path = self.run_dir / "losses.csv"
        return [row[0] for row in read_losses(path)] if path.exists() else []

    @property
    def seats(self):
        """Names of the machines that train, by seat."""
        by_rank = {min(one["ranks"]): one["machine"] for one in self.status.get("machines", []) if one["ranks"]}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def lives(self):
        """An agent does; before the first one the launcher. (At the end that waits for its ssh to lost machines.)"""
        agents = any("recovery.worker" in line for name in self.lab.hosts for line in self.lab.processes(name))
        self.begun |= agents
        return agents or (not self.begun and self.process.poll() is None)

    def until(self, condition, timeout_s=120.0):
        wait_until(lambda: condition() or not self.lives(), self.run_dir, timeout_s)
        assert self.lives(), f"the job has ended:\n{terminal(self.run_dir)[-6000:]}"

    def goes_on(self, steps=3):
        """So many steps more, none of them twice."""
        done = len(self.steps)
        self.until(lambda: len(self.steps) >= done + steps)
        steps = self.steps  # once: it grows
        assert steps == list(range(1, len(steps) + 1))

    def trains(self, seats, after=""):
        """Wait until ``seats`` train, and every shard has its copies."""

        def condition():
            found = self.status
            fresh = found.get("recoverable") and found["recoverable"][0] == found.get("term")
            return found.get("state") == "running" and self.seats in seats and fresh

        self.until(condition)
        self.goes_on()

    def stands_by(self, *names):
        def condition():
            machines = {one["machine"]: one for one in self.status.get("machines", [])}
            return all(machines[n]["ready"] and machines[n]["here"] and not machines[n]["ranks"] for n in names)

        self.until(condition)

    def ends(self, timeout_s=120.0):
        wait_until(lambda: not self.lives(), self.run_dir, timeout_s)
        kill_group(self.process)  # its ssh to a lost machine would take ten seconds more
        self.process.wait(20)

    def is_as(self, calm):
        same_run(self.run_dir, calm)
        assert self.status["state"] == "done"
        return json.loads((self.run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return [*SMALL, f"dataset.cache={tmp_path_factory.mktemp('small')}"]


@pytest.fixture(scope="module")
def calm_of(small, tmp_path_factory):
    """By number of ranks and epochs, the run directory of ranks on localhost that nobody disturbs."""
    made = {}

    def calm(ranks, epochs):
        if (ranks, epochs) not in made:
            made[ranks, epochs] = tmp_path_factory.mktemp("calm") / "run"
            trained(ranks, made[ranks, epochs], *small, epochs)
        return made[ranks, epochs]

    return calm


def test_the_root_of_the_job_and_another_machine_lose_power_at_once(lab, small, calm_of, tmp_path):
    """First only the root agent dies, and in the end that of the successor: their machines keep their seats.

    Three copies survive two losses, in memory.
    """
    epochs = "training.epochs=110"
    calm = calm_of(3, epochs)
    run = Run(lab, [*small, epochs, "snapshot.replicas=3"], tmp_path / "run", ["h0", "h1", "h2", "h3", "h4"], 2)
    run.trains([["h0", "h1", "h2"]])
    lab.run("h0", ["pkill", "-KILL", "gnn-agent"])
    run.until(lambda: run.status.get("term", 0) > 1)
    run.trains([["h0", "h1", "h2"]])
    before = from_json(run.status["recoverable"])
    for name in ("h0", "h1"):
        lab.power_off(name)
    after = [["h3", "h4", "h2"], ["h4", "h3", "h2"]]
    run.trains(after)
    term = run.status["term"]
    lab.run("h2", ["pkill", "-KILL", "gnn-agent"])  # its heir answers at the port that the others know
    run.until(lambda: run.status.get("term", 0) > term)
    run.trains(after)
    run.ends()
    result = run.is_as(calm)
    assert [one["kind"] for one in result["failures"]] == ["root agent"] * 3, result["failures"]
    planned = [from_json(event["identity"]) for event in agent_events(run.run_dir, "planned") if event["identity"]]
    assert planned[-2] >= before, "two losses of three copies lose no recoverable snapshot"
    said = terminal(run.run_dir)
    assert (
        "takes the place of h0 (rank 0)" in said
        and "the root agent on h0 is gone (silent for" in said
        and "h2 has the root agent now" in said
    ), said[-6000:]
    shows = {line[:3] for line in said.splitlines() if " epoch " in line or ": epoch" in line}
    assert len(shows) > 1, "what rank 0 prints goes on on another host's screen"


def steps_beyond_checkpoint(status):
    return status["step"] - from_json(status["checkpoint"]).step if status.get("checkpoint") else 0


def test_cut_off_split_and_beyond_all_copies(lab, small, calm_of, tmp_path):
    """Each seat's successor is cut off in turn; at last no copy is left in memory, and the newest checkpoint is taken."""
    epochs = "training.epochs=240"
    calm = calm_of(2, epochs)
    settings = [*small, epochs, "snapshot.persist_every=50 steps"]
    run = Run(lab, settings, tmp_path / "run", ["h0", "h1", "h2", "h3"], 2)
    run.trains([["h0", "h1"]])

    lab.link("h1", False)
    run.trains([["h0", "h2"]])
    lab.link("h1", True)
    run.stands_by("h1", "h3")

    lab.split(["h2", "h3"])  # each half has one seat, a standby, and a copy of every shard
    halves = [["h0", "h1"], ["h3", "h2"], ["h0", "h3"]]
    run.until(lambda: run.status.get("term", 0) >= 3)
    run.trains(halves)
    trains = run.seats
    others = {"h0", "h1", "h2", "h3"} - set(trains)
    assert others in ({"h0", "h1"}, {"h2", "h3"})
    term = run.status["term"]
    run.goes_on(20)
    assert run.status["term"] == term and run.seats == trains, "the other half cannot take over"
    lab.heal()
    run.stands_by(*others)

    run.until(lambda: 5 < steps_beyond_checkpoint(run.status) < 40)  # the next one is 50 steps away
    for name in trains:
        lab.power_off(name)
    run.until(lambda: set(run.seats) == others)
    run.ends()
    result = run.is_as(calm)
    assert "are done again, " in terminal(run.run_dir), terminal(run.run_dir)[-6000:]
    assert result["failures"][-1]["steps_lost"] > 0 and result["lost_work_s"] > 0, result
    assert {one["kind"] for one in result["failures"]} <= {"silent", "root agent"}


@pytest.mark.long
def test_without_a_standby_the_job_ends_with_all_that_it_knew(lab, small, calm_of, tmp_path):
    """Also with the shards of the lost machine. The same command goes on from there, though every memory is gone by then."""
    epochs = "training.epochs=240"
    calm = calm_of(2, epochs)
    settings = [*small, epochs, "recovery.wait_s=2", "snapshot.persist_every=2h"]
    run = Run(lab, settings, tmp_path / "run", ["h0", "h1"], 0)
    run.trains([["h0", "h1"]])
    before = from_json(run.status["recoverable"])
    lab.power_off("h1")
    run.ends()
    said = terminal(run.run_dir)
    assert "h1 (rank 1) did not come back within 2 s (recovery.wait_s)" in said, said[-6000:]
    assert from_json(run.status["checkpoint"]) >= before
    lab.power_off("h0")
    for name in ("h0", "h1"):
        lab.power_on(name)
    run.start("resume=must")
    run.ends()
    run.is_as(calm)
    assert agent_events(run.run_dir, "load"), "no memory held anything"


@pytest.mark.long
@pytest.mark.parametrize("rank", [1, 0], ids=["seat", "root"])
@pytest.mark.parametrize("phase", [*PHASES, "start-up"])
def test_a_machine_loses_power_in_every_phase(lab, small, calm_of, tmp_path, phase, rank):
    """Its trainer stands still in the phase when the plug is pulled. "start-up": of a recovery, after a kill."""
    epochs = "training.epochs=40"
    faults = [f"stop-rank {rank} @ step {5 if phase == 'start-up' else 20} in {phase}"]
    if phase == "start-up":
        faults.insert(0, "kill-rank 1 @ step 20")
    settings = [*small, epochs, "faults.allow=true", f"faults.at=[{', '.join(faults)}]"]
    run = Run(lab, settings, tmp_path / "run", ["h0", "h1", "h2"], 1)
    run.until(lambda: list((run.run_dir / "faults").glob("stop-rank*")))
    lab.power_off(f"h{rank}")
    run.ends()
    result = run.is_as(calm_of(2, epochs))
    assert result["failures"][-1]["kind"] in ("silent", "root agent"), result["failures"]
