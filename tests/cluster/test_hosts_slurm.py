"""Batch jobs under a real SLURM on the lab's hosts: submitted, interrupted, requeued, with the losses of ranks on localhost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gemini_gnn.observe.run_directory import read_config
from gemini_gnn.observe.status import read_status
from tests.cluster.test_hosts_train import ROOT, graph, losses, nobody_trains, wait_until
from tests.lab.slurm import absent, slurm_up
from tests.launch.test_resume import same_run
from tests.trainers import trained

__all__ = ["graph"]  # the fixture

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400), pytest.mark.skipif(bool(absent()), reason=absent())]
EPOCHS = ["training.epochs=60", "training.threads=1", "evaluation.every=5"]


class Batch:
    """A batch job on nodes of the lab; what it prints is in ``log``."""

    def __init__(self, lab, conf, folder, options, settings, variables=None):
        self.lab, self.run_dir, self.log = lab, folder / "run", folder / "log"
        self.environ = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            **conf,
            "RUN_DIR": str(self.run_dir),
            **(variables or {}),
        }
        command = ["sbatch", "--parsable", f"--output={self.log}", *options, "launch/ibex_cpu.sbatch", *settings]
        self.job = self.typed(*command).strip()

    def typed(self, *command):
        done = self.lab.run("h0", command, 60, env=self.environ, cwd=ROOT)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def shows(self, field):
        """A field of `scontrol show job`."""
        said = self.typed("scontrol", "show", "job", self.job)
        return dict(part.split("=", 1) for part in said.split() if "=" in part)[field]

    def until(self, condition, timeout_s=120.0):
        wait_until(condition, self.run_dir, timeout_s)

    def trains(self, steps):
        self.until(lambda: (self.run_dir / "losses.csv").exists() and len(losses(self.run_dir)) >= steps)

    def ends(self, state="COMPLETED"):
        self.until(lambda: self.shows("JobState") not in ("PENDING", "RUNNING", "COMPLETING"), 240)
        assert self.shows("JobState") == state, self.log.read_text()[-6000:]


@pytest.fixture(scope="module")
def calm(graph, tmp_path_factory):
    made = tmp_path_factory.mktemp("calm") / "run"
    trained(4, made, *graph, *EPOCHS)
    return made


SMALL = ["--ntasks-per-node=2", "--cpus-per-task=1", "--mem=0", "--time=10"]


def test_a_batch_job_is_requeued_before_its_time_limit(lab, graph, calm, tmp_path):
    conf = slurm_up(lab, tmp_path, ["h0", "h1"])
    batch = Batch(lab, conf, tmp_path, ["--nodes=2", *SMALL], [*graph, *EPOCHS])
    batch.trains(20)
    assert len(losses(batch.run_dir)) < 60
    batch.typed("scancel", "--batch", "--signal=USR1", batch.job)  # as --signal=B:USR1@300 does before the limit
    batch.ends()
    assert batch.shows("Restarts") == "1", batch.log.read_text()[-6000:]
    same_run(batch.run_dir, calm)
    assert nobody_trains(lab)
    for host in ("h0", "h1"):
        assert lab.run(host, ["ls", "/dev/shm"]).stdout == ""


@pytest.mark.long
def test_a_sweep_on_staged_data_is_requeued_task_by_task(lab, tmp_path):
    """Two tasks of an array, a node each. Their graph lies where only their node sees it: /run is each host's own."""
    conf = slurm_up(lab, tmp_path, ["h0", "h1"])
    small = ["dataset.nodes=2000", f"dataset.cache={tmp_path / 'cache'}", *EPOCHS]
    sweep = {1: "seed=3 optimizer.lr=0.01", 2: "seed=4"}
    for task, line in sweep.items():
        trained(2, tmp_path / f"calm-{task}", *small, *line.split())
    (staged,) = (tmp_path / "cache" / "partitions").glob("*/")
    (tmp_path / "sweep").write_text("\n".join(sweep.values()) + "\n")
    variables = {"STAGE": str(staged), "LOCAL": "/run", "SWEEP": str(tmp_path / "sweep")}
    batch = Batch(lab, conf, tmp_path, ["--array=1-2", "--nodes=1", *SMALL], small, variables)
    for task in sweep:
        run_dir = tmp_path / f"run-{task}"
        wait_until(lambda: len(losses(run_dir)) >= 20, tmp_path / f"log-{task}")  # noqa: B023
        batch.typed("scancel", "--batch", "--signal=USR1", f"{batch.job}_{task}")
    for task in sweep:
        batch.job = f"{batch.job.partition('_')[0]}_{task}"
        batch.ends()
        assert batch.shows("Restarts") == "1", batch.log.read_text()[-6000:]
        same_run(tmp_path / f"run-{task}", tmp_path / f"calm-{task}")
        assert read_config(tmp_path / f"run-{task}").partition.folder.startswith("/run/gemini_gnn-")
    assert batch.log.read_text().count(f"copying {staged} to /run/gemini_gnn-") == 4
    for host in ("h0", "h1"):
        assert lab.run(host, ["sh", "-c", "ls -d /run/gemini_gnn-*/"]).returncode != 0
    assert nobody_trains(lab)


@pytest.mark.long
def test_a_job_that_is_cancelled_is_not_requeued(lab, graph, tmp_path):
    conf = slurm_up(lab, tmp_path, ["h0", "h1"])
    batch = Batch(lab, conf, tmp_path, ["--nodes=2", *SMALL], [*graph, "training.epochs=100000"])
    batch.trains(20)
    batch.typed("scancel", batch.job)
    batch.ends("CANCELLED")
    assert batch.shows("Restarts") == "0"
    batch.until(lambda: nobody_trains(lab))


@pytest.mark.long
@pytest.mark.parametrize("way", ["limit", "preemption"])
def test_a_batch_job_goes_on_where_slurm_ended_it(lab, graph, calm, tmp_path, way):
    conf = slurm_up(lab, tmp_path, ["h0", "h1"])
    options = ["--nodes=2", *SMALL]
    if way == "limit":
        options += ["--time=3", "--signal=B:USR1@60"]
    # A trainer that stands still waits for the signal. Nobody takes it for hanging.
    slow = ["faults.allow=true", "faults.at=[stop-rank 1 @ step 30]", "recovery.hang_floor_s=1e6"]
    batch = Batch(lab, conf, tmp_path, options, [*graph, *EPOCHS, *slow])
    batch.trains(29)
    if way == "preemption":
        batch.typed("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 5")
    batch.ends()
    assert batch.shows("Restarts") == "1", batch.log.read_text()[-6000:]
    same_run(batch.run_dir, calm)
    assert nobody_trains(lab)


def test_a_node_that_loses_power_costs_a_batch_job_nothing(lab, graph, calm, tmp_path):
    """Nor does the script wait for it, when it removes the staged graph from the nodes."""
    conf = slurm_up(lab, tmp_path, ["h0", "h1", "h2"])
    (staged,) = Path(graph[-1].partition("=")[2]).glob("partitions/*-4-*/")
    variables = {"SPARES": "1", "STAGE": str(staged), "LOCAL": "/run"}
    batch = Batch(lab, conf, tmp_path, ["--nodes=3", *SMALL], [*graph, *EPOCHS], variables)
    batch.trains(20)
    lab.power_off("h1")
    batch.ends()
    assert batch.shows("Restarts") == "0", batch.log.read_text()[-6000:]
    same_run(batch.run_dir, calm)
    assert read_status(batch.run_dir)["state"] == "done"
    for host in ("h0", "h2"):
        assert lab.run(host, ["sh", "-c", "ls -d /run/gemini_gnn-*/"]).returncode != 0
