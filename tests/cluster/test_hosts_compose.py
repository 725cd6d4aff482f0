"""launch/compose.yaml without an engine: each container's command and variables, on a host of the lab for each."""

from __future__ import annotations

import os
import sys

import pytest
import yaml

from gemini_gnn.observe.failures import read_failures
from tests.cluster.test_hosts_train import ROOT, ended, losses, nobody_trains, terminal, wait_until
from tests.launch.test_resume import same_run
from tests.trainers import trained

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
COMPOSE = yaml.safe_load((ROOT / "launch" / "compose.yaml").read_text())
SMALL = ["dataset.nodes=2000", "training.epochs=60", "training.threads=1", "logger=quiet"]
# As an engine makes it: all ends with the first process. argv: hostname, volume, hosts, size of /dev/shm, command. The last
# `exit` keeps the shell from becoming the command: it reaps what the worker agent leaves, as `init: true` does.
CONTAINER = """
set -e
hostname "$1"; mount --bind "$2" /mnt; mount --bind "$3" /etc/hosts
mount -t tmpfs -o "size=$4,mode=1777" tmpfs /dev/shm
shift 4
"$@" || exit $?
exit 0
"""


def begin(lab, host, name, folder, *settings):
    """The container ``name`` on ``host``; what it prints goes to a file of its own."""
    service = COMPOSE["services"][name]
    assert service["init"] is True and service["volumes"] == ["shared:/mnt"]
    command = [sys.executable, *service["command"][1:], *settings]
    boxed = ["unshare", "-m", "-u", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", CONTAINER, "container"]
    boxed += [service["hostname"], str(folder), str(folder / "hosts"), service["shm_size"].removesuffix("b")]
    environ = {"PATH": os.environ["PATH"], "DS_ACCELERATOR": "cpu", **service["environment"]}
    with open(f"{folder / name}-terminal.txt", "w") as output:
        return lab.popen(host, [*boxed, *command], stdout=output, stderr=output, cwd=ROOT, env=environ)


@pytest.fixture
def shared(lab, short_path):
    """The volume. It also has the names that the engine's DNS knows."""
    names = [f"{lab.address(f'h{number}')} {name}\n" for number, name in enumerate(COMPOSE["services"])]
    (short_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
    return short_path


@pytest.mark.long
def test_the_containers_train_and_one_is_killed(lab, shared, tmp_path):
    trained(4, tmp_path / "calm", f"dataset.cache={tmp_path / 'cache'}", *SMALL)
    started = {name: begin(lab, f"h{n}", name, shared, *SMALL) for n, name in enumerate(COMPOSE["services"])}
    wait_until(lambda: len(losses(shared / "run")) >= 20, shared / "worker0")
    lab.power_off("h2")
    codes = {name: ended(started[name], shared / name, 120) for name in started if name != "worker2"}
    assert set(codes.values()) == {0}, terminal(shared / "worker0")[-6000:]
    same_run(shared / "run", tmp_path / "calm")
    (failure,) = read_failures(shared / "run")
    assert failure["machine"] == "worker2" and "standby stands by" in terminal(shared / "standby")
    assert nobody_trains(lab)
