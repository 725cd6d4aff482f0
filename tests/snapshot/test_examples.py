"""The examples, as a user runs them: `python -m gemini_gnn.run`, two ranks, a trainer killed half-way, the same losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_gnn.recovery import home

ROOT = Path(__file__).parents[2]

# Runs an example with a SIGKILL of the last rank just after step `at` of its first life has begun to be captured.
KILLING = """
import os, runpy, signal, sys
import gemini_gnn.snapshot as snapshot
import gemini_gnn.snapshot.session
script, at = sys.argv[1], int(sys.argv[2])
real = snapshot.attach
def attach(*args, **kwargs):
    snapshots = real(*args, **kwargs)
    after = snapshots.after_step
    def dying(step, capture):
        after(step, capture)
        if step == at and snapshots.restored is None and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    snapshots.after_step = dying
    return snapshots
snapshot.attach = attach
sys.argv[:] = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


def launch(tmp_path, name, example, at, steps):
    """Both ranks' output, and the losses."""
    losses, script = tmp_path / f"{name}.losses", tmp_path / "killing.py"
    script.write_text(KILLING)
    preload = ["--preload", "deepspeed"] if "zero" in example else []
    command = [sys.executable, "-m", "gemini_gnn.run", "--run-dir", tmp_path / name, *preload, script]
    command += [ROOT / "examples" / example, at, "--steps", steps, "--losses", losses]
    ranks = []
    for rank in range(2):
        place = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_SIZE=2, LOCAL_WORLD_SIZE=2)
        place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=0, GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
        env = os.environ | {k: str(v) for k, v in place.items()}
        out = open(tmp_path / f"{name}.{rank}.log", "w")
        ranks.append(subprocess.Popen([*map(str, command)], env=env, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT))
        out.close()
    try:
        codes = [process.wait(150) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    said = "".join((tmp_path / f"{name}.{rank}.log").read_text() for rank in range(2))
    assert codes == [0, 0], said
    return said, losses.read_text()


@pytest.mark.processes
@pytest.mark.parametrize(("example", "steps"), [("plain_ddp.py", 60), ("transformer_zero1.py", 12)])
def test_a_killed_example_goes_on_with_the_same_losses(tmp_path, example, steps):
    before = set(os.listdir("/dev/shm"))
    said, undisturbed = launch(tmp_path, "whole", example, -1, steps)
    assert "a fresh start" in said and "going on" not in said
    said, resumed = launch(tmp_path, "killed", example, steps // 2, steps)
    assert "going on after step" in said
    assert resumed == undisturbed and len(resumed.splitlines()) == steps
    for name in ("whole", "killed"):
        assert not home.arena_of(tmp_path / name).exists()
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("deepspeed")}
