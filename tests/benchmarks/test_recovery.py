"""What benchmarks/recovery.py makes of the events and records of a job; its rows name what there is."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import recovery

from gemini_gnn.observe.status import write_status
from tests.lab import missing


def event(kind, t, **fields):
    return {"kind": kind, "t": t, **fields}


EVENTS = [
    event("start", 1.0),
    event("restored", 1.5),
    event("step", 2.0, step=1),
    event("step", 3.0, step=2),
    event("start", 5.0),
    event("restored", 5.25),
    event("step", 6.0, step=2),
    event("step", 7.0, step=3),
    event("step", 8.0, step=4),
]


@pytest.mark.parametrize(("known", "first_new", "again"), [(1, 7.0, 1), (2, 7.0, 1), (3, 8.0, 2)])
def test_a_new_step_is_one_that_was_not_done_before_also_if_its_event_was_lost(known, first_new, again):
    assert recovery.resumed(EVENTS, known) == ([5.0, 5.25, 6.0, first_new], again)


def test_parts_of_a_failure_during_a_recovery_are_summed():
    first, second = (
        {"parts": {"detect_s": 0.5, "first_step_s": 0.0}},
        {"parts": {"detect_s": 0.25, "first_step_s": 1.0}},
    )
    assert recovery.parts_of([first, second]) == {"detect": 0.75, "first step": 1.0}


@pytest.mark.parametrize(
    ("counted_s", "peer_s", "words"),
    [
        (0.25, 7.5, "goal <= 0.30 s, 30.0x (goal 15x)"),
        (0.25, None, "goal <= 0.30 s"),
        (0.5, 7.5, "goal <= 0.30 s MISSED, 15.0x (goal 15x), most of it: restore 0.40 s"),
        (0.25, 2.5, "goal <= 0.30 s, 10.0x (goal 15x MISSED), most of it: restore 0.40 s"),
    ],
)
def test_a_missed_goal_is_said_with_the_part_that_takes_most(counted_s, peer_s, words):
    row = dataclasses.replace(recovery.ROWS["trainer"], goal_s=0.30)
    assert recovery.verdict(row, counted_s, {"fork": 0.1, "restore": 0.4}, peer_s) == words


def sized(**changes):
    return dataclasses.replace(recovery.Sized(10, "1gbit", 0.5, 0.0, 1.0, 1.0, 0.5, 2.0, 1, {}), **changes)


def test_wasted_is_a_snapshot_on_its_way_half_an_interval_and_the_recovery():
    assert sized().wasted_s == 1.0 + 0.5 + 2.0
    assert sized().goodput(mtbf_s=35.0) == pytest.approx(0.9)
    assert sized(pause_s=1.0).goodput(mtbf_s=35.0) == pytest.approx(0.45)
    assert sized().goodput(mtbf_s=35.0, lost=0.5) == pytest.approx(0.45)
    assert sized().goodput(mtbf_s=1.0) == 0


def test_two_ways_to_go_on_are_compared():
    row = recovery.compared(sized(), sized(recovery_s=30.0, retrieve_s=5.0, interval_s=100.0, step_s=0.4), 7, 1000.0)
    assert row["times"] == {"retrieve": 10.0, "recovery": 15.0, "wasted": 81.0 / 3.5}
    assert row["lost"] == pytest.approx(0.25) and row["ours"]["held_bytes"] == 7
    assert row["ours"]["goodput"] == pytest.approx(0.75 * (1 - 3.5 / 1000))


@pytest.mark.parametrize("first", range(4))
def test_a_pause_is_found_wherever_the_steps_begin(first):
    times = [0.0]
    for step in range(1, 13):
        times.append(times[-1] + 0.5 + (2.0 if step % 4 == 0 else 0.0))
    step_s, pause_s = recovery.pauses(times[first : first + 9], every=4)
    assert step_s == 0.5 and pause_s == pytest.approx(2.0)


def test_a_state_that_does_not_fit_is_said_with_what_it_needs():
    assert recovery.fits(10_000_000, 1 << 30) == ""
    said = "1000 MB per rank on 4 hosts need 48 GB of memory, 20 GB are free"
    assert recovery.fits(1_000_000_000, 20_000_000_000) == said


def test_a_job_is_healthy_when_copies_and_standbys_are_there_again(tmp_path):
    def health(standbys=1, **changes):
        spare = {"machine": "h4", "ranks": [], "here": True, "ready": True}
        status = {"term": 2, "generation": 3, "recovers_from": None, "recoverable": [2, 3, 9], "machines": [spare]}
        write_status(tmp_path, changes.pop("state", "running"), **(status | changes))
        return recovery.is_healthy(tmp_path, standbys)

    assert not recovery.is_healthy(tmp_path, 0)  # no status yet
    assert health()
    assert not health(standbys=2)
    assert not health(state="recovering")
    assert not health(recovers_from="h2 is silent")
    assert not health(recoverable=[2, 2, 9])
    assert not health(recoverable=None)


def test_every_peer_is_a_row_of_the_same_place():
    for name, row in recovery.ROWS.items():
        assert not row.peer or row.peer in recovery.ROWS
        assert row.peer.startswith("lab-") == name.startswith("lab-") or not row.peer


def test_processes_of_a_job_are_found_by_what_their_command_line_names(tmp_path):
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, f"run_dir={tmp_path}/job-01"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = recovery.processes(tmp_path / "job-01")
        assert found.keys() == {process.pid} and recovery.processes(tmp_path / "job-02") == {}
        assert recovery.on("", found, None) == {process.pid: process.pid}
        recovery.kill([process.pid])
        assert process.wait(20) == -9
        recovery.kill([process.pid])  # gone: nothing happens
    assert os.getpid() not in recovery.processes(tmp_path / "job-01")


def test_the_picture_has_a_bar_for_each_row(tmp_path):
    quick = recovery.Measured(0.3, 0.3, 0, {"detect": 0.1, "first step": 0.2})
    slow = recovery.Measured(9.0, 9.0, 10, {"launcher, imports, join": 8.0, "first step": 1.0})
    recovery.draw({"trainer": [quick, quick], "checkpoint": [slow]}, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[1] > 1000
    assert (tmp_path / "a.png").stat().st_size < 60_000
    recovery.draw_each({"trainer": [quick, quick], "checkpoint": [slow]}, tmp_path / "each")
    assert {path.name for path in (tmp_path / "each").iterdir()} == {"trainer.png", "checkpoint.png"}


@pytest.mark.long
@pytest.mark.lab
@pytest.mark.processes
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_quick_run_has_all_in_its_json(tmp_path):
    rows = ["lab-trainer", "lab-machine", "lab-checkpoint-lost"]
    files = ["--output", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    command = [sys.executable, "benchmarks/recovery.py", "--all", "--quick", "--only", ",".join(rows), *files]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert [len(document["rows"][name]) for name in rows] == [1, 1, 1]
    (row,) = document["by_bytes"]["rows"]
    assert row["times"]["recovery"] > 1 and row["times"]["wasted"] > 1 and 0 < row["ours"]["goodput"] < 2
    assert document["idle_cpu"].keys() >= {"agent", "replicator"}
    assert document["counted_s"]["lab-machine"] > recovery.SILENCE_S - 0.2  # less a heartbeat
