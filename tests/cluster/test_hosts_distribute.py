"""Machines without a shared disk for the data: each gets its parts, trains on them, and a standby has what a lost one had."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.cluster.test_hosts_lost import Run, calm_of, small
from tests.cluster.test_hosts_train import ROOT
from tests.lab.slurm import absent, slurm_up

__all__ = ["calm_of", "small"]  # the fixtures

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
HOSTS = ["h0", "h1", "h2", "h3", "h4"]


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
    run = Run(lab, settings, tmp_path / "run", HOSTS, 1)
    run.trains([HOSTS[:4]])
    lab.power_off("h2")
    run.trains([["h0", "h1", "h4", "h3"]])
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
