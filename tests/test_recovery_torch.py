"""Trainers with torch, and scripts under ``python -m gemini_gnn.run``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_gnn.recovery import home, trainer
from gemini_gnn.run import preload_of
from tests.test_recovery import PATIENCE_S, job

__all__ = ["job"]  # the fixture

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from gemini_gnn.snapshot import context

assert __name__ == "__main__" and sys.argv[1:] == ["--local_rank=" + os.environ["LOCAL_RANK"], "--lr", "0.1"], sys.argv
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo")  # the address comes from the environment
total = torch.ones(3) * (dist.get_rank() + 1)
dist.all_reduce(total)
dist.barrier()
dist.destroy_process_group()
print(f"rank {os.environ['RANK']} of term {context.current().term} sums {total.tolist()}")
"""


def run_script(script: Path, world: int, *options: str) -> list[subprocess.CompletedProcess[str]]:
    """The slot processes of one launch, with the argument DeepSpeed's launcher puts in front."""
    slots = []
    for rank in range(world):
        places = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_SIZE": world}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
        command = [sys.executable, "-m", "gemini_gnn.run", f"--local_rank={rank}", *options, os.fspath(script)]
        environment = {**os.environ, **{key: str(value) for key, value in places.items()}}
        slots.append(
            subprocess.Popen(
                [*command, "--lr", "0.1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    ended = [(slot, *slot.communicate(timeout=PATIENCE_S)) for slot in slots]
    return [subprocess.CompletedProcess(slot.args, slot.returncode, out, err) for slot, out, err in ended]


def test_forked_ranks_meet_over_the_agents_socket(job):
    run = job()
    code, _, err = run.end(run.launch(2, "torch_ranks", preload=["torch", "torch.distributed"]))
    assert code == 0, err
    notes = run.notes("sum")
    assert [note["total"] for note in notes] == [1.0, 1.0]
    assert len({note["draw"] for note in notes}) == 1  # torch's seed in a new process is a constant
    run.assert_nothing_left()


def test_a_rank_killed_in_a_collective_is_restarted_with_the_others(job):
    run = job()
    launch = run.launch(3, "torch_ranks", preload=["torch", "torch.distributed"], kills=2)
    code, _, err = run.end(launch)
    assert code == 0, err
    assert len(run.notes("sum", generation=3)) == 3
    assert err.count("restarting all 3 trainers") == 2 and "first error" not in err
    run.assert_nothing_left()


def test_a_script_runs_as_it_would_by_itself(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for term in (1, 2):
        first, second = run_script(script, 2, "--run-dir", os.fspath(tmp_path / "run"))
        assert (first.returncode, second.returncode) == (0, 0), first.stderr
        assert first.stdout == f"rank 0 of term {term} sums [3.0, 3.0, 3.0]\n" and second.stdout == ""
    assert not home.arena_of(tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, code, seen",
    [
        ("import sys; sys.exit(3)", 3, "sys.exit(3)"),
        ("raise KeyError('weight')", 1, "KeyError: 'weight'"),
    ],
)
def test_a_script_that_fails_says_so(tmp_path, text, code, seen):
    script = tmp_path / "train.py"
    script.write_text(text)
    (ended,) = run_script(script, 1, "--run-dir", os.fspath(tmp_path / "run"))
    assert ended.returncode == code and seen in ended.stdout + ended.stderr
    assert not home.arena_of(tmp_path / "run").exists()


def test_sys_exit_means_what_a_shell_sees():
    assert trainer._exit_code(SystemExit()) == trainer._exit_code(SystemExit(0)) == (0, None)
    assert trainer._exit_code(SystemExit(259))[0] == 3
    assert trainer._exit_code(SystemExit(trainer.STOPPED)) == (trainer.STOPPED, None)
    assert trainer._exit_code(SystemExit("no data")) == (1, ("SystemExit: no data", "no data"))


def test_a_missing_script_is_an_error_of_use():
    ended = subprocess.run(
        [sys.executable, "-m", "gemini_gnn.run", "no_such.py"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == 2 and "no_such.py is no file" in ended.stderr


def test_preload_follows_the_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import torch")
    assert "gemini_gnn.training.engine" not in preload_of(script)
    script.write_text("import deepspeed")
    assert "gemini_gnn.training.engine" in preload_of(script)
