"""A real SLURM on hosts of the lab: a controller on h0, a daemon on each host."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tests.lab.lab import Lab

TOOLS = ("slurmctld", "slurmd", "srun", "sbatch", "salloc", "scontrol", "sinfo", "munged")
# cred_expire: a job that is requeued waits until the credentials of its last start are void; 120 s by default.
CONF = """
ClusterName=lab
SlurmctldHost=h0
SlurmUser=root
AuthInfo=socket=/run/munge.socket,cred_expire=5
StateSaveLocation=/run/slurmctld
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/run/slurmctld.log
SlurmdLogFile=/run/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SlurmdTimeout=10
SchedulerParameters=batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} CPUs=2
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 OverSubscribe=NO
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF OverSubscribe=NO
"""
# argv: folder with slurm.conf and the key; /run is each host's own. munged and the daemons go to the background.
START = """
set -e
munged --force --key-file="$0/munge.key" --socket=/run/munge.socket --pid-file=/run/munged.pid \
    --log-file=/run/munged.log --seed-file=/run/munged.seed
mkdir -p /run/slurmctld /run/slurmd
if [ "$(hostname)" = h0 ]; then slurmctld -f "$0/slurm.conf"; fi
slurmd -f "$0/slurm.conf"
"""


def absent() -> str:
    """Why there can be no SLURM here; "" if there can."""
    tools = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"needs {', '.join(tools)}: apt-get install slurmctld slurmd slurm-client munge" if tools else ""


def slurm_up(lab: Lab, folder: Path, hosts: Sequence[str]) -> dict[str, str]:
    """Start SLURM on ``hosts``, h0 among them, and wait until all are idle. Returns the environment of its commands.

    It ends with the hosts: ``power_off`` kills its daemons.
    """
    (folder / "slurm.conf").write_text(CONF.format(nodes=",".join(hosts)))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # the one that wants nothing until it is used
    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    for name in hosts:
        begun = lab.run(name, ["sh", "-c", START, str(folder)], 60)
        assert begun.returncode == 0, begun.stdout
    environ = {"SLURM_CONF": str(folder / "slurm.conf")}
    idle = ["sinfo", "--noheader", "--states=idle", "--partition=all", "--format=%D"]
    deadline = time.monotonic() + 60
    while lab.run("h0", idle, env={**os.environ, **environ}).stdout.strip() != str(len(hosts)):
        assert time.monotonic() < deadline, lab.run("h0", ["sh", "-c", "cat /run/slurmctld.log /run/slurmd.log"]).stdout
        time.sleep(0.1)
    return environ
