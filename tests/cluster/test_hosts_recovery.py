"""Jobs over several hosts that go on by themselves: trainers and agents killed for real, the losses those of a calm run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from tests.cluster.test_hosts_calm import HOSTS
from tests.cluster.test_hosts_train import ended, graph, losses, nobody_trains, terminal, train
from tests.lab.lab import kill_group
from tests.launch.test_resume import same_run
from tests.trainers import trained

__all__ = ["graph"]  # the fixture
PYTHON = sys.executable

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
EPOCHS = "training.epochs=30"


@pytest.fixture(scope="module")
def calm_run(graph, tmp_path_factory):
    """The run directory of four ranks on localhost that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    trained(4, run_dir, *graph, EPOCHS)
    return run_dir


@pytest.fixture(scope="module")
def calm(calm_run):
    """Its losses."""
    return losses(calm_run)


def agent_events(run_dir, kind):
    found = []
    for path in sorted((run_dir / "events").glob("agent-*.jsonl")):
        text = path.read_text()
        found += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return sorted((event for event in found if event["kind"] == kind), key=lambda event: event["t"])


def test_a_killed_trainer_and_the_job_goes_on_by_itself(lab, graph, calm, tmp_path):
    run_dir = tmp_path / "run"
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h0", "h1"], 2))]
    process = train(lab, "h0", launcher, *graph, EPOCHS, "faults.at=[kill-rank 3 @ step 5]", run_dir=run_dir)
    assert ended(process, run_dir, 180) == 0, terminal(run_dir)[-6000:]
    assert losses(run_dir) == calm
    assert "restarting all 4 trainers as generation 2" in terminal(run_dir)
    assert nobody_trains(lab)


PHASES = ["sampling", "exchange", "forward", "backward", "agreement", "reduction"]
PHASES += ["step", "capture", "evaluation", "writing"]


@pytest.mark.long
def test_kills_in_every_phase_on_four_hosts(lab, graph, calm_run, tmp_path):
    """Also in a recovery: the last one strikes the first start after step 27 was done."""
    run_dir = tmp_path / "run"
    faults = [f"kill-rank {number % 4} @ step {3 * number + 1} in {phase}" for number, phase in enumerate(PHASES)]
    faults += ["kill-rank 2 @ step 27 in start-up"]
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(HOSTS))]
    process = train(lab, "h0", launcher, *graph, EPOCHS, f"faults.at=[{', '.join(faults)}]", run_dir=run_dir)
    assert ended(process, run_dir, 180) == 0, terminal(run_dir)[-6000:]
    same_run(run_dir, calm_run)
    struck = {path.name for path in (run_dir / "faults").iterdir()}
    assert struck >= {f"{fault.replace(' @ ', '-').replace(' ', '-')}.1" for fault in faults[:-1]}, struck
    result = json.loads((run_dir / "result.json").read_text())
    assert len(result["failures"]) >= len(PHASES) and all(one["kind"] == "killed" for one in result["failures"])
    for one in result["failures"]:
        assert sum(one["parts"].values()) == pytest.approx(one["recovery_s"], abs=1e-6)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_random_failures_of_one_job(lab, graph, tmp_path, request, count=100, epochs=6000):
    """Ranks, agents, the root's too, and warm parents are killed and ranks stopped, whenever chance has it."""
    seed = request.config.getoption("seed") or 1
    settings = [*graph, f"training.epochs={epochs}", "evaluation.every=50"]
    trained(4, tmp_path / "calm", *settings, timeout_s=1200)
    run_dir = tmp_path / "run"
    kinds = "kill-rank,kill-agent,kill-root,kill-warm,stop-rank"
    faults = [f"faults.seed={seed}", "faults.mtbf_s=1.5", f"faults.count={count}", f"faults.kinds=[{kinds}]"]
    hangs = ["faults.allow=true", "recovery.hang_factor=5", "recovery.hang_floor_s=3", "recovery.same_step_failures=50"]
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h0", "h1"], 2))]
    process = train(lab, "h0", launcher, *settings, *faults, *hangs, run_dir=run_dir)
    assert ended(process, run_dir, 1500) == 0, f"seed {seed}\n{terminal(run_dir)[-6000:]}"
    same_run(run_dir, tmp_path / "calm")
    struck = sorted(path.name for path in (run_dir / "faults").iterdir() if path.name != "begun")
    assert len(struck) >= count * 3 // 4, f"seed {seed}: {struck}"
    assert nobody_trains(lab)
    for host in ("h0", "h1"):
        assert lab.run(host, ["ls", "/dev/shm"]).stdout == ""


@pytest.mark.long
def test_a_port_that_is_taken(lab, graph, tmp_path):
    """The machine of rank 0 says so at once, and how to choose another."""
    run_dir = tmp_path / "run"
    listens = "import socket, time; s = socket.create_server(('', 29777)); print('here', flush=True); time.sleep(600)"
    taker = lab.popen("h0", [PYTHON, "-c", listens], stdout=subprocess.PIPE, text=True)
    try:
        assert taker.stdout.readline() == "here\n"
        launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile(["h0", "h1"])), "--master_port", "29777"]
        process = train(lab, "h0", launcher, *graph, run_dir=run_dir)
        assert ended(process, run_dir, 60) != 0
        said = terminal(run_dir)
        assert "port 29777 of" in said and "is taken on h0" in said and "--master_port N" in said, said[-6000:]
        assert nobody_trains(lab)
    finally:
        kill_group(taker)
        taker.wait(20)
