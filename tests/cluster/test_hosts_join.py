"""Machines that join a living job: a repaired one gets its own place back, a new one waits as a standby. The losses stay."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.status import read_status
from tests.cluster.test_hosts_train import ROOT, graph, losses, nobody_trains, terminal, train, wait_until
from tests.lab.lab import kill_group
from tests.trainers import trained

__all__ = ["graph"]  # the fixture

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
EPOCHS = "training.epochs=200"


@pytest.fixture(scope="module")
def calm(graph, tmp_path_factory):
    """The losses of two ranks on localhost that nobody disturbs."""
    return trained(2, tmp_path_factory.mktemp("calm") / "run", *graph, EPOCHS)[0]


def start(lab, graph, run_dir, epochs=EPOCHS):
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h0", "h1"]))]
    process = train(lab, "h0", launcher, *graph, epochs, run_dir=run_dir)
    goes_on(run_dir, process)
    return process


def joins(lab, host, run_dir, name, environ=None):
    """A person types it on ``host``; what it prints goes into a file."""
    with open(f"{name}-terminal.txt", "w") as output:
        command = [sys.executable, "launch/train.py", "--join", f"run_dir={run_dir}"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", **(environ or {})}
        return lab.popen(host, command, stdout=output, stderr=output, cwd=ROOT, env=environment)


def goes_on(run_dir, process, steps=10):
    before = len(losses(run_dir))
    wait_until(lambda: len(losses(run_dir)) >= before + steps or process.poll() is not None, run_dir)
    assert len(losses(run_dir)) >= before + steps, terminal(run_dir)[-6000:]


def done(lab, run_dir, process):
    wait_until(lambda: read_status(run_dir).get("state") in ("done", "stopped"), run_dir)
    kill_group(process)  # its ssh to the lost machine would take longer
    process.wait(20)
    wait_until(lambda: nobody_trains(lab), run_dir)


def test_a_machine_that_lost_its_power_gets_its_place_back(lab, graph, calm, tmp_path):
    """No standby: the job waits, refuses another installation, and goes on as soon as the machine is back."""
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir)
    lab.power_off("h1")
    wait_until(lambda: read_status(run_dir).get("state") == "waiting", run_dir)
    lab.power_on("h1")
    for part in ("gemini_gnn", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "gemini_gnn" / "hashing.py", "a") as file:
        file.write("# another version\n")
    other = joins(lab, "h1", run_dir, tmp_path / "other", {"PYTHONPATH": str(tmp_path)})
    assert other.wait(60) == 2 and "runs other code" in terminal(tmp_path / "other"), terminal(tmp_path / "other")
    back = joins(lab, "h1", run_dir, tmp_path / "h1")
    done(lab, run_dir, process)
    assert back.wait(30) == 0, terminal(tmp_path / "h1")
    assert "h1 has joined the job: rank 1" in terminal(tmp_path / "h1")
    assert losses(run_dir) == calm
    assert [one["kind"] for one in json.loads((run_dir / "result.json").read_text())["failures"]] == ["silent"]


@pytest.mark.long
def test_a_new_machine_waits_takes_a_place_and_leaves_it(lab, graph, calm, tmp_path):
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir, "training.epochs=100000")
    new = joins(lab, "h2", run_dir, tmp_path / "h2")
    wait_until(lambda: "h2 has joined the job: a standby" in terminal(tmp_path / "h2"), run_dir)
    again = joins(lab, "h2", run_dir, tmp_path / "again")
    assert again.wait(30) == 2 and "already running on h2" in terminal(tmp_path / "again")
    wait_until(lambda: read_status(run_dir)["machines"][2]["ready"], run_dir)
    lab.power_off("h1")
    wait_until(lambda: "h2 takes the place of h1 (rank 1)" in terminal(run_dir), run_dir)
    goes_on(run_dir, process)
    lab.power_on("h1")
    back = joins(lab, "h1", run_dir, tmp_path / "h1")
    wait_until(lambda: "h1 has joined the job: a standby" in terminal(tmp_path / "h1"), run_dir)
    wait_until(lambda: read_status(run_dir)["machines"][1]["ready"], run_dir)
    lab.run("h2", ["pkill", "-INT", "-f", "^[^ ]*python[^ ]* launch/train.py --join"])
    assert new.wait(30) == 130 and "h2 leaves the job, which goes on" in terminal(tmp_path / "h2")
    wait_until(lambda: "h1 takes the place of h2 (rank 1)" in terminal(run_dir), run_dir)
    goes_on(run_dir, process)
    wait_until(lambda: len(losses(run_dir)) >= len(calm), run_dir)
    stop = [sys.executable, "launch/stop.py", f"run_dir={run_dir}", "keep=false"]
    stopped = lab.run("h3", stop, cwd=ROOT)
    assert stopped.returncode == 0, stopped.stdout
    done(lab, run_dir, process)
    assert back.wait(30) == 143, terminal(tmp_path / "h1")
    assert losses(run_dir)[: len(calm)] == calm
