"""launch/inspect_snapshots.py run_dir=...: the root of a living job says what is held; else this machine shows what it has."""

from __future__ import annotations

import subprocess
import sys

from gemini_gnn.recovery import home
from gemini_gnn.snapshot.store import arena
from tests.recovery.arenas import capture, step
from tests.recovery.jobs import PATIENCE_S, job

__all__ = ["job"]  # the fixture


def typed(*words):
    command = [sys.executable, "launch/inspect_snapshots.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def test_a_living_job_is_asked(job):
    run = job()
    launch = run.launch(2, "steps")
    run.training(2)
    for shard, slot, number in (("rank-00000", 0, 1), ("rank-00001", 0, 1), ("rank-00001", 1, 2)):
        capture(run.arena, shard, slot, step(number))
    done = typed(f"run_dir={run.run_dir}")
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert (done.returncode, lines) == (
        0,
        [
            ["snapshot", "can be restored  shards"],
            ["1-1-2", "no               nowhere: rank-00000"],
            ["1-1-1", "yes, chosen      every machine has its own"],
        ],
    ), done
    run.finish()
    assert run.end(launch)[0] == 0
    late = typed(f"run_dir={run.run_dir}")
    assert late.returncode == 0 and f"no job of {run.run_dir} runs on" in late.stdout and ": done" in late.stdout
    assert late.stdout.endswith("on this machine:\nno snapshots of this job in host memory here\n")
    run.assert_nothing_left()


def test_a_dead_job_is_looked_up_on_this_machine(job):
    run = job()
    run.run_dir.mkdir()
    arena.make_folder(run.arena)
    capture(run.arena, "rank-00000", 0, step(7))
    done = typed(f"run_dir={run.run_dir}")
    assert done.returncode == 0 and "no job of" in done.stdout and "there is no news of it" in done.stdout
    assert f"job {home.job_id(run.run_dir)}: " in done.stdout and "dead: the same command resumes" in done.stdout
    assert "rank-00000" in done.stdout and "1-1-7" in done.stdout and done.stdout.rstrip().endswith("ok")


def test_a_word_that_is_no_run_directory_is_refused(tmp_path):
    for word in (str(tmp_path), "rundir=x", "run_dir="):
        done = typed(word)
        assert done.returncode == 2 and f"expected run_dir=RUN_DIR; got {word!r}" in done.stderr and not done.stdout
