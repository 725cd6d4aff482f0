"""Machines that lose their memory: power is cut for real, another machine takes the place, the losses stay the same."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import time

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.status import read_status
from gemini_gnn.snapshot.store.identity import Identity, from_json
from tests.cluster.test_hosts_recovery import agent_events
from tests.cluster.test_hosts_train import ROOT, ended, graph, losses, nobody_trains, terminal, train, wait_until
from tests.lab.lab import kill_group
from tests.launch.test_resume import same_run
from tests.trainers import trained

__all__ = ["graph"]  # the fixture

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
QUICK = ["recovery.heartbeat_s=0.1", "recovery.wait_s=1"]  # a lost machine ends the job
EPOCHS = "training.epochs=150"


@pytest.fixture(scope="module")
def calm_of(graph, tmp_path_factory):
    """By number of ranks and settings, the run directory of ranks on localhost that nobody disturbs."""
    made = {}

    def calm(ranks, *settings, timeout_s=120):
        key = (ranks, *settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("calm") / "run"
            trained(ranks, made[key], *graph, *settings, timeout_s=timeout_s)
        return made[key]

    return calm


def start(lab, graph, run_dir, hosts, *settings):
    """From the machine of rank 0."""
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(hosts))]
    return train(lab, hosts[0], launcher, *graph, *QUICK, *settings, run_dir=run_dir)


def start_each(lab, graph, run_dir, hosts, *settings):
    """A slot process per host, as srun does it: DeepSpeed's launcher imports for half of the time that a start takes."""
    command = [sys.executable, "-u", "launch/train.py", f"run_dir={run_dir}", "training.threads=1", *graph, *QUICK]
    slots = [f"RANK={rank} {shlex.join(lab.command(host, [*command, *settings]))} &" for rank, host in enumerate(hosts)]
    script = "\n".join([*slots, "for slot in $(jobs -p); do wait $slot || failed=1; done; exit ${failed:-0}"])
    place = {"MASTER_ADDR": lab.address(hosts[0]), "MASTER_PORT": "29500", "WORLD_SIZE": str(len(hosts))}
    environment = {**os.environ, **place, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with open(f"{run_dir}-terminal.txt", "w") as output:
        options = {"stdout": output, "stderr": output, "cwd": ROOT, "env": environment, "start_new_session": True}
        return subprocess.Popen(["bash", "-c", script], **options)


def recoverable(run_dir) -> Identity | None:
    found = read_status(run_dir).get("recoverable")
    return from_json(found) if found else None


def planned(run_dir) -> list[Identity]:
    found = [event["identity"] for event in agent_events(run_dir, "planned")]
    return [from_json(one) for one in found if one]


def trains(run_dir, process, term, step):
    """Wait until the job of ``term`` has done ``step``, and its status says what is recoverable."""

    def condition():
        status = read_status(run_dir)
        there = status.get("term", 0) >= term and status.get("recoverable") and status["recoverable"][2] >= step
        return there or process.poll() is not None

    wait_until(condition, run_dir)
    assert process.poll() is None, terminal(run_dir)[-6000:]


def cut(lab, run_dir, process, host):
    """Power off ``host``; the job ends without it. Returns the newest snapshot that was known to be recoverable before."""
    before = recoverable(run_dir)
    lab.power_off(host)
    wait_until(
        lambda: not any("recovery.worker" in line for name in lab.hosts for line in lab.processes(name)), run_dir
    )
    kill_group(process)  # its ssh to the lost machine would take ten seconds more
    wait_until(lambda: nobody_trains(lab), run_dir)
    assert before is not None
    return before


@pytest.mark.parametrize(
    ("hosts", "settings"),
    [(2, ["deepspeed.zero=1"]), (3, ["deepspeed.zero=3"])],
    ids=["2 hosts", "3 hosts in a ring"],
)
@pytest.mark.long
def test_another_host_in_the_place_of_a_lost_one_loses_no_step(lab, graph, calm_of, tmp_path, hosts, settings):
    run_dir = tmp_path / "run"
    names = [f"h{i}" for i in range(hosts)]
    process = start(lab, graph, run_dir, names, EPOCHS, *settings)
    trains(run_dir, process, 1, 20)
    before = cut(lab, run_dir, process, "h1")
    names[1] = "h3"
    process = start(lab, graph, run_dir, names, EPOCHS, *settings, "resume=must", "faults.at=[kill-rank 0 @ step 140]")
    assert ended(process, run_dir, 120) == 0, terminal(run_dir)[-6000:]
    same_run(run_dir, calm_of(hosts, EPOCHS, *settings))
    assert planned(run_dir)[0] >= before
    assert agent_events(run_dir, "fetch"), "the new machine had nothing"
    keep = "these machines keep each other's shards: h0 h3" if hosts == 2 else "in the ring h0 > h3 > h2 > h0"
    assert f"replicas=2: {keep}" in terminal(run_dir)
    assert nobody_trains(lab)
    for host in names:
        assert lab.run(host, ["ls", "/dev/shm"]).stdout == ""


@pytest.mark.parametrize(
    ("count", "hosts"), [(5, 2), pytest.param(100, 3, marks=[pytest.mark.long, pytest.mark.timeout(7200)])]
)
def test_power_offs_at_random_instants(lab, graph, calm_of, tmp_path, request, count, hosts):
    """Each is followed by a start with another host in the lost one's place, the others in any order."""
    seed = request.config.getoption("seed") or 1
    chance, run_dir = random.Random(seed), tmp_path / "run"
    epochs = f"training.epochs={60 * count}"
    settings = [epochs, "evaluation.every=100", "deepspeed.zero=1"]
    names, spare, step = [f"h{i}" for i in range(hosts)], f"h{hosts}", 0
    last = Identity(0, 0, 0)
    for number in range(count):
        term = max((int(path.stem) for path in (run_dir / "terms").glob("*.json")), default=0)
        process = start_each(lab, graph, run_dir, names, *settings, *(["resume=must"] if number else []))
        trains(run_dir, process, term + 1, step + 1)  # a succession claims terms, too: the status may be an old one
        time.sleep(chance.uniform(0.0, 1.0))  # the instant is what is tried: no event marks it
        lost = chance.randrange(hosts)
        before = cut(lab, run_dir, process, names[lost])
        if number:
            assert planned(run_dir)[-1] >= last, f"seed {seed}: it went back behind {last}"
        last, step = before, before.step
        lab.power_on(names[lost])
        names[lost], spare = spare, names[lost]
        chance.shuffle(names)
    process = start_each(lab, graph, run_dir, names, *settings, "resume=must")
    assert ended(process, run_dir, 120 + 12 * count) == 0, f"seed {seed}\n{terminal(run_dir)[-6000:]}"
    assert planned(run_dir)[-1] >= last
    same_run(run_dir, calm_of(hosts, *settings, timeout_s=120 + 12 * count))


def flip(lab, host, pattern):
    """Change a byte in the middle of each file in the host's memory."""
    script = (
        "import glob\n"
        f"for path in glob.glob('/dev/shm/gemini-gnn-*/*/{pattern}'):\n"
        "    with open(path, 'r+b') as file:\n"
        "        file.seek(4096 + 100)\n"
        "        byte = file.read(1)[0]\n"
        "        file.seek(4096 + 100)\n"
        "        file.write(bytes([byte ^ 1]))\n"
        "    print(path)"
    )
    return lab.run(host, ["python3", "-c", script]).stdout.split()


@pytest.mark.long
def test_a_byte_that_flipped_is_noticed_and_another_copy_is_used(lab, graph, calm_of, tmp_path):
    run_dir = tmp_path / "run"
    settings = [EPOCHS, "deepspeed.zero=1", "snapshot.replicas=3"]
    process = start(lab, graph, run_dir, ["h0", "h1", "h2"], *settings)
    trains(run_dir, process, 1, 20)
    cut(lab, run_dir, process, "h1")
    assert flip(lab, "h0", "rank-00001.*"), "the replica on h0"
    assert flip(lab, "h2", "rank-00002.*"), "the own shard of h2"
    process = start(lab, graph, run_dir, ["h0", "h3", "h2"], *settings, "resume=must")
    assert ended(process, run_dir, 120) == 0, terminal(run_dir)[-6000:]
    said = terminal(run_dir)
    assert "the copy of rank-00001 from h0 is damaged" in said, said[-6000:]
    assert re.search(r"rank-00002\.\d: the tensors of \S+ do not fit their checksum", said), said[-6000:]
    same_run(run_dir, calm_of(3, EPOCHS, "deepspeed.zero=1"))


@pytest.mark.long
def test_nothing_is_left_and_that_is_an_error(lab, graph, tmp_path):
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir, ["h0", "h1"], EPOCHS, "snapshot.persist_every=never", "snapshot.replicas=1")
    wait_until(lambda: len(losses(run_dir)) > 20 or process.poll() is not None, run_dir)
    cut_losses = losses(run_dir)
    lab.power_off("h1")
    assert ended(process, run_dir, 60) != 0
    lab.power_on("h1")
    process = start(lab, graph, run_dir, ["h0", "h1"], EPOCHS, "snapshot.replicas=1")
    assert ended(process, run_dir, 60) == 2
    said = terminal(run_dir)
    assert "no snapshot in host memory can be restored" in said and "rank-00001" in said, said[-6000:]
    assert len(losses(run_dir)) >= len(cut_losses) > 20 and not list(run_dir.glob("losses.*.csv"))


@pytest.mark.long
def test_more_replicas_than_machines_and_no_machine_that_trains(lab, graph, tmp_path):
    """Each host ends with the error: none waits for the other."""
    run_dir = tmp_path / "run"
    process = start(lab, graph, run_dir, ["h0", "h1"], "snapshot.replicas=3", "training.epochs=3")
    assert ended(process, run_dir, 60) == 2
    assert terminal(run_dir).count("replicas: expected at most one copy for each of the 2 machines") == 2
    run_dir = tmp_path / "other"
    process = start(lab, graph, run_dir, ["h0", "h1"], "recovery.standby_machines=2")
    assert ended(process, run_dir, 60) == 2
    said = terminal(run_dir).count("standby_machines: expected fewer than the 2 machines")
    assert said == 2, terminal(run_dir)
    assert nobody_trains(lab)
