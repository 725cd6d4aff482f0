"""Bad input of the batch scripts, without SLURM: they say so before they start anything. With it: tests/cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
TASK = {**JOB, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


def batch(tmp_path, variables):
    """What `ibex_cpu.sbatch` does with these variables, where srun only says how it was called."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "srun $*"; exit 3\n')
    srun.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environ |= {
        "PATH": f"{tmp_path}:{environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "RUN_DIR": str(tmp_path / "run"),
    }
    return subprocess.run(
        ["bash", "launch/ibex_cpu.sbatch", "dataset=cora"],
        cwd=ROOT, env=environ | variables, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "expected to run under SLURM; type: sbatch launch/ibex_cpu.sbatch dataset=cora"),
        ({**JOB, "SLURM_SUBMIT_DIR": "/"}, "expected to be submitted from the root of the repository; got /. cd there"),
        ({"SLURM_JOB_ID": "7"}, "SLURM_JOB_NUM_NODES is not set: expected sbatch with --nodes and --ntasks-per-node"),
        (
            {**JOB, "SPARES": "2"},
            "SPARES: expected fewer than the 2 nodes of the job; got 2. Ask for more: sbatch --nodes=N",
        ),
        ({**JOB, "SPARES": "x"}, "SPARES: expected a number of nodes; got 'x'"),
        ({**JOB, "STAGE": "/no/such"}, "STAGE: expected a folder with a partitioned graph; there is no /no/such"),
        ({**JOB, "SWEEP": "/no/such"}, "SWEEP: expected a file with settings; there is no /no/such"),
        (
            {**JOB, "SWEEP": "{sweep}"},
            "SWEEP: expected a job array, a task per line of {sweep}; type sbatch --array=1-2",
        ),
        (
            {**TASK, "SWEEP": "{sweep}"},
            "{sweep}: expected settings in line 3, for this task of the array; got none. Type",
        ),
        (
            {**TASK, "SLURM_ARRAY_TASK_ID": "0", "SWEEP": "{sweep}"},
            "{sweep}: expected settings in line 0, for this task",
        ),
    ],
)
def test_settings_of_a_batch_job_are_checked(tmp_path, variables, said):
    sweep = tmp_path / "sweep"
    sweep.write_text("seed=1\nseed=2\n")
    done = batch(tmp_path, {name: value.format(sweep=sweep) for name, value in variables.items()})
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"error: {said.format(sweep=sweep)}") and "srun" not in done.stdout


@pytest.mark.parametrize("memory", ["", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"])
def test_snapshots_need_memory_that_was_asked_for(tmp_path, memory):
    done = batch(tmp_path, JOB | ({memory: "1000"} if memory else {}))
    assert done.returncode == 3 and "srun --no-kill --kill-on-bad-exit=0" in done.stdout
    assert ("remark: no --mem was asked for" in done.stdout) == (not memory)
