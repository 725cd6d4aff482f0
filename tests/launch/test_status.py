"""What `launch/status.py` shows of a job as real processes, while it lives and when it is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_gnn.observe.status import read_status
from tests.recovery.jobs import PATIENCE_S, job, wait_for

pytestmark = pytest.mark.processes

__all__ = ["job"]  # the fixture

ROOT = Path(__file__).parents[2]


def killed_once(run):
    """A job whose trainers wait in step 20, of which one is killed: then it goes on to its end."""
    launch = run.launch(3, "beats", rank=1)
    (note,) = run.training(1)
    wait_for(lambda: read_status(run.run_dir).get("step") == 20, "the status")
    os.kill(note["pid"], signal.SIGKILL)
    return launch


def test_the_last_status_has_the_whole_picture(job):
    run = job()
    code, _, err = run.end(killed_once(run))
    assert code == 0, err
    status = read_status(run.run_dir)
    assert (status["state"], status["exit_code"], status["reason"]) == ("done", 0, "done")
    assert (status["term"], status["generation"], status["step"], status["world_size"]) == (1, 2, 39, 3)
    (machine,) = status["machines"]
    assert machine["machine"] == status["machine"] == os.uname().nodename and machine["here"]
    ranks = [(one["rank"], one["alive"], one["step"], one["phase"]) for one in status["ranks"]]
    assert ranks == [(rank, False, 39, "writing") for rank in range(3)]
    (failure,) = status["failures"]
    assert (failure["kind"], failure["rank"], failure["step"], status["failure_count"]) == ("killed", 1, 20, 1)
    assert status["run_dir"] == os.fspath(run.run_dir) and status["since"] <= status["time"]


def status(*arguments, **keywords):
    command = [sys.executable, "launch/status.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False, **keywords
    )


def test_a_living_job_is_shown_and_followed_to_its_end(job):
    run = job()
    launch = run.launch(3, "beats", rank=1)
    (note,) = run.training(1)
    wait_for(lambda: read_status(run.run_dir).get("step") == 20, "the status")
    where = f"run_dir={run.run_dir}"

    shown = status(where)
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    assert f"{run.run_dir.name}: running for" in shown.stdout.replace("\n", "") and "step 20" in shown.stdout
    assert "forward for" in shown.stdout and "ago; its root writes" in " ".join(shown.stdout.split())
    document = json.loads(status("--json", where).stdout)
    assert (document["state"], document["root"], len(document["ranks"])) == ("running", "lives", 3)

    command = [sys.executable, "launch/status.py", "--watch", where]
    with subprocess.Popen([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as watch:
        seen = [json.loads(watch.stdout.readline())]
        os.kill(note["pid"], signal.SIGKILL)
        assert run.end(launch)[0] == 0
        seen += map(json.loads, watch.communicate(timeout=PATIENCE_S)[0].splitlines())
        assert watch.returncode == 0
    assert seen[0]["generation"] == 1 and (seen[-1]["root"], seen[-1]["state"]) == ("ended", "done")
    assert seen[-1]["failure_count"] == 1

    shown = status("--watch", where)  # over: it shows the end and does not wait
    assert shown.returncode == 0 and "done" in shown.stdout and "the job has ended" in " ".join(shown.stdout.split())
    assert "killed" in shown.stdout and "\x1b" not in shown.stdout

    drawn = status(where, f"plot={run.run_dir / 'failures.png'}")
    assert drawn.returncode == 0 and (run.run_dir / "failures.png").stat().st_size > 5_000, drawn.stderr


def test_a_root_that_is_gone_is_named_and_ctrl_c_ends_the_watch(job):
    run = job()
    launch = run.launch(1, "train")
    run.training(1)
    wait_for(lambda: read_status(run.run_dir).get("state") == "running", "the status")
    os.killpg(launch.pid, signal.SIGSTOP)  # no slot process starts another agent
    os.kill(run.pid_of("agent"), signal.SIGKILL)
    command = [sys.executable, "launch/status.py", "--watch", f"run_dir={run.run_dir}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as watch:
        text = ""
        while "its root is gone" not in " ".join(text.split()):
            line = watch.stdout.readline()
            assert line, text
            text += line
        watch.send_signal(signal.SIGINT)
        watch.communicate(timeout=PATIENCE_S)
        assert watch.returncode == 0
    os.killpg(launch.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "arguments",
    [(), ("--watch",), ("run_dir=",), ("run_dir=a", "b=c"), ("run_dir=a", "plot=b.png", "--watch"), ("runs/a",)],
)
def test_a_wrong_command_line_is_told_the_right_one(arguments):
    done = status(*arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("usage: python launch/status.py")


def test_no_job_is_an_error_that_says_what_to_give(tmp_path):
    for folder, words in ((tmp_path, "no job has begun"), (tmp_path / "no", "there is no folder")):
        for more in ([], ["--watch", "--json"], ["plot=a.png"]):
            done = status(f"run_dir={folder}", *more)
            assert done.returncode == 2 and done.stdout == "" and words in done.stderr and "run_dir=" in done.stderr
