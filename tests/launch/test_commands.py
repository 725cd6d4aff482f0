"""What a user types, with the real launcher; slow, so few."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from gemini_gnn.observe.run_directory import read_losses
from tests.recovery.jobs import wait_for

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
TINY = ["dataset.nodes=600", "dataset.feature_dim=16", "model.hidden=16", "sampling.batch_size=16"]


def run(*command, timeout_s=150, **environ):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    # The launcher must be this environment's.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= environ
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def environment_in(folder):
    """A virtual environment with this one's packages, and its `deepspeed` as pip writes it. Returns its bin/."""
    venv.create(folder, symlinks=True)
    packages = [str(ROOT), *(path for path in sys.path if path.endswith("-packages"))]
    next(folder.glob("lib/python3*/site-packages")).joinpath("these.pth").write_text("\n".join(packages))
    script = folder / "bin" / "deepspeed"
    script.write_text(f"#!{folder}/bin/python\nfrom deepspeed.launcher.runner import main\nmain()\n")
    script.chmod(0o755)
    return script.parent


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Under a path with a blank: there the command `deepspeed` does not start."""
    folder = tmp_path_factory.mktemp("my data")
    done = run(
        *("bash", "launch/quickstart.sh", f"run_dir={folder / 'run'}", f"dataset.cache={folder / 'cache'}", *TINY),
        "training.epochs=20",
        VIRTUAL_ENV=str(Path(sys.executable).parent.parent),
        PATH=f"{environment_in(folder / '.venv')}:{os.defpath}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_quickstart_trains_and_recovers(quickstart):
    folder, said = quickstart
    typed = "python -m deepspeed.launcher.runner --quiet --num_accelerators 2 launch/train.py 'run_dir="
    assert f"$ {typed}" in said
    assert "features alone" in said and "structure alone" in said and "dataset=edge_list" in said
    result = json.loads((folder / "run" / "result.json").read_text())
    losses = read_losses(folder / "run" / "losses.csv")
    assert [row[0] for row in losses] == list(range(1, result["steps"] + 1))
    assert "kill -9" in said and "going on after step" in said and "bit for bit" in said
    assert (folder / "run" / "losses.png").stat().st_size > 10_000
    for key in ("test_accuracy", "val_accuracy", "macro_f1", "epochs", "world_size", "epoch_s", "edges_per_s"):
        assert isinstance(result[key], (int, float)), key
    for key in ("communication_fraction", "peak_rss_bytes"):
        assert result[key] > 0, key
    assert result["remote_bytes"] == 0, "ranks of one machine read each other's features"
    assert result["world_size"] == 2 and result["versions"]["torch"] and result["config"]["dataset"]["nodes"] == 600


def test_the_proof_of_recovery_notices_another_loss():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launch" / "quickstart.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = [(1, 1, 0.5), (2, 1, 0.25)]
    done = [(-0.2, 1), (-0.1, 2), (0.6, 2), (0.7, 3)]
    said, same = script.proof(before, [*before, (3, 2, 0.1)], done)
    assert same and "first new step was done 0.70 s later" in said[0] and "step 2 was done twice" in said[-1]
    said, same = script.proof(before, [(1, 1, 0.5), (2, 1, 0.2500001), (3, 2, 0.1)], done)
    assert not same and said[-1].startswith("error: step 2: loss 0.25 before")


def test_evaluate_and_load_give_the_same_predictions_in_original_order(quickstart):
    import gemini_gnn
    from gemini_gnn.compose import compose
    from gemini_gnn.graph.datasets import load_dataset

    folder, _ = quickstart
    done = run(sys.executable, "launch/evaluate.py", f"run_dir={folder / 'run'}", f"out={folder / 'out'}")
    assert done.returncode == 0, done.stderr
    found = {name: np.load(folder / "out" / f"{name}.npy") for name in ("ids", "predictions", "embeddings", "logits")}
    config = compose([*TINY, f"dataset.cache={folder / 'cache'}"])
    graph = load_dataset(config.dataset)
    assert found["ids"].tolist() == list(range(graph.num_nodes)) and found["embeddings"].shape == (600, 16)
    accuracy = (found["predictions"] == graph.y)[graph.test_mask].mean()
    result = json.loads((folder / "run" / "result.json").read_text())
    assert accuracy == pytest.approx(result["test_accuracy"], abs=1e-9)
    again = gemini_gnn.predict(folder / "run", graph)
    np.testing.assert_array_equal(again["logits"], found["logits"])
    assert sum(p.numel() for p in gemini_gnn.load(folder / "run").parameters()) > 0


def test_a_finished_run_is_not_overwritten(quickstart):
    folder, _ = quickstart
    before = (folder / "run" / "losses.csv").read_bytes()
    done = run(sys.executable, "launch/train.py", f"run_dir={folder / 'run'}", *TINY, "snapshot=none")
    assert done.returncode == 2
    assert "holds a finished run" in done.stdout + done.stderr
    assert (folder / "run" / "losses.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dataset=nope"], "dataset: expected one of"),
        (["model.layers=3"], "one fanout per layer"),
        (["dataset=edge_list", "dataset.path=/nowhere/edges.csv", "snapshot=none"], "/nowhere/edges.csv"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, said, tmp_path):
    done = run(
        sys.executable, "launch/train.py", f"run_dir={tmp_path / 'run'}", f"dataset.cache={tmp_path}", *arguments
    )
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    assert "error: " in text and said in text and "Traceback" not in text


@pytest.mark.parametrize(
    "command, said",
    [
        (["launch/train.py", "trainin.epochs=3"], "did you mean training.epochs?"),
        (["launch/train.py", "run_dir={finished}"], "holds a finished run"),
        (["-m", "gemini_gnn.run", "no_such.py"], "no_such.py is no file"),
    ],
)
def test_an_error_of_all_slots_is_said_once(tmp_path, command, said):
    """The launcher ends the others when it sees one end: the silent slot stays until the other has spoken."""
    (tmp_path / "result.json").write_text("{}")
    command = [sys.executable, *(word.format(finished=tmp_path) for word in command)]
    slots = {}
    try:
        for rank in (1, 0):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"}
            with open(tmp_path / f"{rank}.txt", "w") as file:
                slots[rank] = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place}, stdout=file, stderr=file)
            if rank == 1:  # while it still loads the signal itself would end it
                wait_for(lambda: catches(slots[1].pid, signal.SIGTERM), "the wait of the silent slot", 60.0)
        assert slots[0].wait(60) == 2
        assert slots[1].poll() is None, "the silent slot ended first"
        slots[1].terminate()
        assert slots[1].wait(5) == 2
    finally:
        for slot in slots.values():
            slot.kill()
            slot.wait()
    text, silent = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert text.count(said) == 1 and "Traceback" not in text
    assert silent == ""


def catches(pid, number):
    """Whether process ``pid`` has a handler for signal ``number``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


COMMANDS = [str(path) for path in sorted((ROOT / "launch").glob("*.py"))]


@pytest.mark.parametrize(
    "command", [*([path] for path in COMMANDS), ["-m", "gemini_gnn.run"]], ids=lambda c: c[-1][-20:]
)
def test_a_reader_who_has_read_enough_is_no_error(command):
    """As in ``--help | head -1``."""
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "wb") as nobody_reads:
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=ROOT, stdout=nobody_reads, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode in (0, 128 + signal.SIGPIPE) and done.stderr == b""  # 0: argparse does not look


def test_importing_the_package_is_light():
    heavy = "('torch', 'deepspeed', 'torch_geometric')"
    code = f"import sys, gemini_gnn, gemini_gnn.compose; print([m for m in {heavy} if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_every_script_explains_itself():
    for script in sorted((ROOT / "launch").glob("*.py")):
        done = run(sys.executable, str(script), "--help")
        assert done.returncode == 0 and done.stdout, script
