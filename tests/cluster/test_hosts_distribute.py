"""Machines without a shared disk: each gets its parts of the data, and a run directory of its own.

A lost machine's place is taken by a standby, and every machine has the results. Of a job that is cut in two only the half
with a majority of the machines goes on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from gemini_gnn.cluster.hosts import KEEPALIVE
from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.observe.status import read_status
from tests.cluster.test_hosts_lost import Run, calm_of, small
from tests.cluster.test_hosts_train import ROOT, train
from tests.lab.slurm import absent, slurm_up
from tests.launch.test_resume import same_run

__all__ = ["calm_of", "small"]  # the fixtures

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
HOSTS = ["h0", "h1", "h2", "h3", "h4"]


class OwnDisks(Run):
    """A job whose machines share no run directory; it is looked at on the disk of ``watched``."""

    def __init__(self, lab, settings, folder, output, hosts, standbys):
        self.folder, self.watched = folder, hosts[-1]
        made = on(lab, "h5", "launch/hosts.py", "private", lab.hostfile(hosts), f"run_dir={folder}")
        assert made.returncode == 0 and made.stdout.count(": made") == len(hosts), made.stdout
        super().__init__(lab, settings, output, hosts, standbys)

    def start(self, *settings):
        launcher = [*DEEPSPEED, "--hostfile", str(self.lab.hostfile(self.hosts))]
        environ, self.begun = {"PDSH_SSH_ARGS_APPEND": KEEPALIVE}, False
        settings = [*self.settings, *settings]
        self.process = train(
            self.lab, self.host, launcher, *settings, run_dir=self.folder, environ=environ, output=self.run_dir
        )

    def seen(self, host=None) -> Path:
        return self.lab.disk(host or self.watched, self.folder)

    @property
    def status(self):
        return read_status(self.seen())

    @property
    def steps(self):
        """As rank 0 has them."""
        seats = self.seats
        path = self.seen(seats[0]) / "losses.csv" if seats else None
        return [row[0] for row in read_losses(path)] if path is not None and path.exists() else []

    def is_as(self, calm):
        """On every machine that trained in the end."""
        for host in self.seats:
            same_run(self.seen(host), calm)
            assert read_status(self.seen(host))["state"] == "done"


def on(lab, host, *command):
    words = [sys.executable, *map(str, command)]
    return lab.run(host, words, 120, cwd=ROOT, env=dict(os.environ))


def test_private_disks_lose_a_machine_and_go_on(lab, small, calm_of, tmp_path):
    """The graph is made on h5. /run is a disk of each host's own."""
    folder = f"/run/{tmp_path.name}/graph"
    where = ["--distribute", str(lab.hostfile(HOSTS)), "--to", folder, "recovery.standby_machines=1"]
    command = [sys.executable, "launch/partition.py", *small, "partition.parts=4", *where]

    def distributed():
        done = lab.run("h5", command, 120, cwd=ROOT, env=dict(os.environ))
        return done.returncode, done.stdout

    lab.link("h3", False)
    code, said = distributed()
    assert code == 1 and "h3: not done: cannot be reached" in said and "1 of 5 machines lack it: h3" in said, said
    assert said.count(" has got ") == 4, said
    lab.link("h3", True)
    code, said = distributed()
    assert code == 0 and said.count(" has it already") == 4 and "h3 has got " in said, said

    def held(host):
        return json.loads(lab.run(host, ["cat", f"{folder}/held.json"]).stdout)

    assert [held(host)["parts"] for host in HOSTS[:4]] == [[0, 1], [1, 2], [2, 3], [0, 3]]
    assert held("h2")["machine"] == "h2"
    assert lab.run("h4", ["ls", folder]).stdout.count("held.json") == 0, "a standby has everything"
    checked = lab.run(
        "h1", [sys.executable, "launch/partition.py", "--check", folder], 60, cwd=ROOT, env=dict(os.environ)
    )
    assert checked.returncode == 0 and "features checked: those of parts 1, 2" in checked.stdout, checked.stdout

    calm = calm_of(4, "training.epochs=110")
    settings = [*small, "training.epochs=110", "dataset=partitioned", f"partition.folder={folder}"]
    run = OwnDisks(lab, settings, f"/run/{tmp_path.name}/run", tmp_path / "run", HOSTS, 1)
    run.trains([HOSTS[:4]])
    lab.power_off("h0")  # the root's, and rank 0's
    run.trains([["h4", "h1", "h2", "h3"]])
    assert run.status["term"] > 1
    run.ends()
    run.is_as(calm)


def test_of_a_job_cut_in_two_only_the_half_with_a_majority_goes_on(lab, small, calm_of, tmp_path):
    """Each half has a machine that trained, and a standby for the other's place."""
    calm = calm_of(2, "training.epochs=220")
    folder = f"/run/{tmp_path.name}/run"
    run = OwnDisks(lab, [*small, "training.epochs=220"], folder, tmp_path / "run", HOSTS, 3)
    run.trains([["h0", "h1"]])
    run.stands_by("h2", "h3", "h4")
    lab.split(["h0", "h2"])
    run.trains([["h3", "h1"], ["h4", "h1"]])
    alone = (lab.disk("h0", folder) / "losses.csv").read_text()
    assert read_status(lab.disk("h0", folder))["term"] < run.status["term"]
    run.goes_on(20)
    assert (lab.disk("h0", folder) / "losses.csv").read_text() == alone, "the other half has trained, too"
    assert (lab.disk("h2", folder) / "terms").is_dir() and not (lab.disk("h2", folder) / "losses.csv").exists()
    lab.heal()
    run.stands_by("h0", "h2")
    run.ends()
    run.is_as(calm)


@pytest.mark.long
def test_a_machine_with_a_new_disk_joins_and_each_machine_knows_the_job(lab, small, calm_of, tmp_path):
    calm = calm_of(3, "training.epochs=220")
    folder, hosts = f"/run/{tmp_path.name}/run", ["h0", "h1", "h2"]
    run = OwnDisks(lab, [*small, "training.epochs=220"], folder, tmp_path / "run", hosts, 0)
    run.trains([hosts])
    lab.power_off("h1")
    run.until(lambda: run.status.get("state") == "waiting")
    lab.power_on("h1")
    made = on(lab, "h5", "launch/hosts.py", "private", lab.hostfile(hosts), f"run_dir={folder}")
    assert "h1: made" in made.stdout and made.stdout.count("has it already") == 2, made.stdout
    command = [sys.executable, "launch/train.py", "--join", f"run_dir={folder}"]
    with open(tmp_path / "joined.txt", "w") as output:
        joined = lab.popen("h1", command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, stdout=output)
    run.trains([hosts])
    for host in hosts:
        said = on(lab, host, "launch/status.py", f"run_dir={folder}")
        assert said.returncode == 0 and "running" in said.stdout, said.stdout
    stopped = on(lab, "h1", "launch/stop.py", f"run_dir={folder}")
    assert stopped.returncode == 0 and "has ended" in stopped.stdout, stopped.stdout
    run.ends()
    joined.wait(30)
    assert {read_status(run.seen(host))["state"] for host in hosts} == {"stopped"}
    run.start("resume=must")
    run.ends()
    run.is_as(calm)


@pytest.mark.long
def test_srun_reaches_the_machines_of_an_allocation(lab, small, tmp_path):
    if reason := absent():
        pytest.skip(reason)
    environ = {**os.environ, **slurm_up(lab, tmp_path, ["h0", "h1"])}
    folder = f"/run/{tmp_path.name}/graph"
    command = [
        "salloc",
        "-N",
        "2",
        sys.executable,
        "launch/partition.py",
        *small,
        "--distribute",
        "srun",
        "--to",
        folder,
    ]
    done = lab.run("h0", command, 120, cwd=ROOT, env=environ)
    assert done.returncode == 0 and done.stdout.count(" has got ") == 2, done.stdout
    for host in ("h0", "h1"):
        assert "meta.json" in lab.run(host, ["ls", folder]).stdout
