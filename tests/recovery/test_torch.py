"""Trainers with torch, and scripts under ``python -m gemini_gnn.run``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.recovery import home
from gemini_gnn.recovery.worker import entry
from gemini_gnn.run import preload_of
from tests.recovery.jobs import PATIENCE_S, job

__all__ = ["job"]  # the fixture

pytestmark = pytest.mark.processes

EXAMPLES = Path(__file__).parents[2] / "examples"
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


def test_ranks_meet_over_the_agents_socket_and_again_after_each_kill_in_a_collective(job):
    run = job()
    launch = run.launch(3, "torch_ranks", preload=["torch", "torch.distributed"], kills=2)
    code, _, err = run.end(launch)
    assert code == 0, err
    notes = run.notes("sum", generation=3)
    assert [note["total"] for note in notes] == [3.0, 3.0, 3.0]
    assert len({note["draw"] for note in notes}) == 1  # torch's seed in a new process is a constant
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
    assert entry._exit_code(SystemExit()) == entry._exit_code(SystemExit(0)) == (0, None)
    assert entry._exit_code(SystemExit(259))[0] == 3
    assert entry._exit_code(SystemExit(entry.STOPPED)) == (entry.STOPPED, None)
    code, failed = entry._exit_code(SystemExit("no data"))
    assert (code, failed.code, failed.summary, failed.text) == (1, 1, "SystemExit: no data", "no data")


def test_a_missing_script_is_an_error_of_use():
    ended = subprocess.run(
        [sys.executable, "-m", "gemini_gnn.run", "no_such.py"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == 2 and "no_such.py is no file" in ended.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "dataset.name=cora",
            r"--set: expected a setting that begins with recovery. or snapshot.; got 'dataset.name=cora'",
        ),
        ("snapshot.replicas=3", r"snapshot.replicas: expected at most one copy for each of the 1 machine"),
        ("recovery.silence=1", r"recovery.silence"),
    ],
)
def test_settings_are_checked_before_anything_starts(setting, said):
    command = [sys.executable, "-m", "gemini_gnn.run", "--set", setting, os.fspath(EXAMPLES / "plain_ddp.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 2 and re.search(said, ended.stderr), ended.stderr


ZERO = """
import os
import deepspeed, torch
from gemini_gnn.snapshot import attach, context

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
generation, rank = context.current().generation, os.environ["RANK"]

def train(name, guarded):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 8)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "steps_per_print": 10**9},
    )
    snapshots = attach(engine) if guarded else None
    for step in range(engine.global_steps, 6):
        loss = engine(torch.full((1, 64), step + 1.0)).square().sum()
        engine.backward(loss)
        engine.step()
        if rank == "0":
            print(name, generation, step, repr(float(loss.detach())), flush=True)
        if guarded and rank == "1" and step == 3 and generation == 1:
            os.kill(os.getpid(), 9)
    if snapshots is not None:
        snapshots.close()

train("guarded", True)
train("quiet", False)
"""


def test_deepspeed_script_goes_on_after_a_kill_under_its_launcher(tmp_path):
    """ZeRO-1, a rank killed after step 3: the second generation goes on from memory, with the losses of a quiet run."""
    script = tmp_path / "train.py"
    script.write_text(ZERO)
    command = [*DEEPSPEED, "--num_gpus", "2", "--module", "gemini_gnn.run", "--run-dir", os.fspath(tmp_path / "run")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        [*command, os.fspath(script)], env=environment, capture_output=True, text=True, timeout=2 * PATIENCE_S
    )
    assert ended.returncode == 0, ended.stderr
    assert "restarting all 2 trainers as generation 2" in ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines() if line.startswith(("guarded ", "quiet "))]
    guarded = {step: loss for name, _, step, loss in rows if name == "guarded"}
    quiet = {step: loss for name, _, step, loss in rows if name == "quiet"}
    assert guarded == quiet and len(quiet) == 6
    assert next(step for name, generation, step, _ in rows if generation == "2") in ("3", "4")  # not the beginning
    assert not home.arena_of(tmp_path / "run").exists()


def test_preload_follows_the_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import torch")
    assert "gemini_gnn.training.engine" not in preload_of(script)
    assert "gemini_gnn.training.engine" in preload_of(script, ["deepspeed"])
    assert preload_of(script, ["scipy"]) == [*preload_of(script), "scipy"]
    script.write_text("import deepspeed")
    assert "gemini_gnn.training.engine" in preload_of(script, ["scipy"])
    assert "gemini_gnn.training.engine" in preload_of(script)


STEPS = """
import threading, torch
from gemini_gnn import snapshot
from gemini_gnn.snapshot import context

module = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(module.parameters())
snapshots = snapshot.attach((module, optimizer))
while snapshots.steps < 20:
    if snapshots.steps == 12 and context.current().generation == 1:
        threading.Event().wait()
    module(torch.ones(4)).sum().backward()
    optimizer.step()
    snapshots.wait()  # or steps of microseconds are over before the last one is committed, and are not captured
print("done after step", snapshots.steps, "from", snapshots.restored.step)
"""


def test_a_script_that_hangs_between_two_steps_goes_on_where_that_was_asked_for(tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    options = ["--run-dir", os.fspath(tmp_path / "run"), "--hang-factor", "5", "--hang-floor", "1"]
    (slot,) = run_script(script, 1, *options)
    assert slot.returncode == 0, slot.stderr
    assert "rank 0 hangs in step 13 for " in slot.stderr
    assert "done after step 20 from 12" in slot.stdout
    assert 'steps.py", line' in (tmp_path / "run" / "logs" / "rank-0.log").read_text()  # its stack
