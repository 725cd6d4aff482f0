"""What benchmarks/recovery.py makes of the events and records of a job; its rows name what there is."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import recovery


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
