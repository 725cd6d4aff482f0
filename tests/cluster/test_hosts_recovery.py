"""Jobs over several hosts that go on by themselves: trainers and agents killed for real, the losses those of a calm run."""

from __future__ import annotations

import json
import sys

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from tests.cluster.test_hosts_train import ended, graph, losses, nobody_trains, terminal, train
from tests.trainers import trained

__all__ = ["graph"]  # the fixture
PYTHON = sys.executable

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
EPOCHS = "training.epochs=30"


@pytest.fixture(scope="module")
def calm(graph, tmp_path_factory):
    """Losses of four ranks on localhost that nobody disturbs."""
    return trained(4, tmp_path_factory.mktemp("calm") / "run", *graph, EPOCHS)[0]


def agent_events(run_dir, kind):
    found = []
    for path in sorted((run_dir / "events").glob("agent-*.jsonl")):
        text = path.read_text()
        found += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [event for event in found if event["kind"] == kind]


def pids_on(lab, host, words):
    return [int(line.split()[0]) for line in lab.processes(host) if words in line]


@pytest.mark.parametrize(("hosts", "slots"), [(4, 1), (2, 2)])
def test_a_killed_trainer_and_the_job_goes_on_by_itself(lab, graph, calm, tmp_path, hosts, slots):
    run_dir = tmp_path / "run"
    launcher = [*DEEPSPEED, "--hostfile", str(lab.hostfile([f"h{i}" for i in range(hosts)], slots))]
    process = train(lab, "h0", launcher, *graph, EPOCHS, "faults.at=[kill-rank 3 @ step 5]", run_dir=run_dir)
    assert ended(process, run_dir, 180) == 0, terminal(run_dir)[-6000:]
    assert losses(run_dir) == calm
    assert "restarting all 4 trainers as generation 2" in terminal(run_dir)
    assert nobody_trains(lab)
