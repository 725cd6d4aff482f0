"""A run that is killed and started again is the run that was never killed, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gemini_gnn.cluster.hosts import random_port
from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.run_directory import read_losses
from tests.trainers import logs, train_ranks, trained

ROOT = Path(__file__).parents[2]
TINY = ["dataset.nodes=1500", "dataset.feature_dim=16", "model.hidden=32", "sampling.batch_size=16"]
TINY += ["sampling.fanouts=[5,5]", "optimizer.schedule=cosine", "optimizer.warmup_steps=5", "training.threads=1"]


def processes_of(run_dir: Path) -> list[int]:
    """Every process of the job but this one: they name its run directory in their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(run_dir).encode() in text and state != "Z":
            found.append(int(entry.name))
    return found


def wait_for(condition, what, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (value := condition()) is not None:
            return value
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {timeout_s} s")


def start(run_dir, *overrides):
    port = str(random_port())  # without a worker agent it is used as given
    command = [*DEEPSPEED, "--num_accelerators", "2", "--master_port", port, "launch/train.py"]
    command += [f"run_dir={run_dir}", *overrides]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "TEST_OF": str(run_dir)}
    log = open(f"{run_dir}.log", "ab")
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)


def start_slots(run_dir, *overrides, world=2, output=subprocess.DEVNULL):
    """The same without a launcher, which costs as long as the trainers' own start."""
    slots = []
    for rank in range(world):
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "DS_ACCELERATOR": "cpu"}
        environ = {**os.environ, **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, "launch/train.py", f"run_dir={run_dir}", *overrides]
        slots.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output))
    return slots


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    yield path
    for pid in processes_of(path):
        os.kill(pid, signal.SIGKILL)
    subprocess.run(
        [sys.executable, "launch/stop.py", f"run_dir={path}", "keep=false"], cwd=ROOT, timeout=60, check=False
    )


def steps_done(run_dir):
    try:
        return len(read_losses(run_dir / "losses.csv"))
    except OSError:
        return 0


def same_run(a: Path, b: Path) -> None:
    assert read_losses(a / "losses.csv") == read_losses(b / "losses.csv")
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)


def test_everything_killed_and_the_command_typed_again(run_dir, tmp_path):
    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", "training.epochs=40", "deepspeed=zero1"]
    trained(2, tmp_path / "undisturbed", *settings)
    job = start(run_dir, *settings, "logger=quiet")
    total = len(read_losses(tmp_path / "undisturbed" / "losses.csv"))
    wait_for(lambda: True if steps_done(run_dir) > total // 5 else None, "first steps")
    while pids := processes_of(run_dir):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    job.wait(30)
    before = steps_done(run_dir)
    assert 0 < before < total, "the kill came too late to test anything"
    again = start(run_dir, *settings, "logger=quiet", "resume=must")
    assert again.wait(120) == 0, Path(f"{run_dir}.log").read_text()[-4000:]
    assert "going on after step" in (run_dir / "logs" / "rank-0.log").read_text()
    same_run(run_dir, tmp_path / "undisturbed")
    assert not processes_of(run_dir)
    from gemini_gnn.recovery import home

    assert not home.arena_of(run_dir).exists(), "nothing stays in memory after the end"


@pytest.mark.parametrize(
    ("zero", "training"), [(0, "default"), (3, "default"), (0, "bf16_products"), (3, "bf16_products")]
)
def test_checkpoints_on_a_shared_folder_resume_bit_identical(tmp_path, zero, training):
    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", f"training={training}", "training.epochs=4"]
    settings += [f"deepspeed=zero{zero}"]
    trained(2, tmp_path / "undisturbed", *settings)
    nfs = [*settings, "snapshot=nfs", "snapshot.nfs_every=5"]
    codes = train_ranks(2, tmp_path / "run", *nfs, "faults.at=kill-rank 1 @ step 14")
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    trained(2, tmp_path / "run", *nfs, "resume=must")
    assert "going on after step 10" in logs(tmp_path / "run", 2)
    same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_settings_that_cannot_change_losses_may_change_in_a_resumed_run(tmp_path):
    settings = [
        *TINY,
        f"dataset.cache={tmp_path / 'cache'}",
        "training.epochs=3",
        "snapshot=nfs",
        "snapshot.nfs_every=5",
    ]
    expected, _ = trained(2, tmp_path / "undisturbed", *settings)
    train_ranks(2, tmp_path / "run", *settings, "faults.at=kill-rank 1 @ step 14")
    others = ["evaluation.every=2", "evaluation.fanouts=[3,3]", "evaluation.batch_size=100", "logger=default"]
    others += [
        "sampling.topology=partitioned",
        "sampling.prefetch=0",
        "sampling.chunk_bytes=4096",
        "features.in_ram=false",
    ]
    assert train_ranks(2, tmp_path / "run", *settings, "resume=must", "training.threads=2") == [2, 2]
    assert "training.threads: 1 -> 2" in logs(tmp_path / "run", 2)
    losses, _ = trained(2, tmp_path / "run", *settings, "resume=must", *others)
    assert "going on after step 10" in logs(tmp_path / "run", 2)
    assert losses == expected


def test_resume_must_needs_something_to_resume(tmp_path):
    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", "resume=must"]
    assert train_ranks(1, tmp_path / "run", *settings) == [2]
    assert "snapshot=none keeps nothing" in logs(tmp_path / "run", 1)
    assert train_ranks(1, tmp_path / "run2", *settings, "snapshot=nfs") == [2]
    assert "no complete checkpoint" in logs(tmp_path / "run2", 1)


def test_a_checkpoint_that_is_gone_is_not_begun_without(tmp_path):
    """But a run that was killed before its first one was due begins again; what it had done is kept beside."""
    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", "training.epochs=4", "snapshot=nfs"]
    run, path = tmp_path / "run", tmp_path / "run" / "losses.csv"
    train_ranks(1, run, *settings, "snapshot.nfs_every=5", "faults.at=kill-rank 0 @ step 14")
    before = path.read_bytes()
    (run / "checkpoints").rename(run / "elsewhere")
    assert train_ranks(1, run, *settings, "snapshot.nfs_every=5") == [2]
    assert "13 steps were done, but there is no complete checkpoint in" in logs(run, 1)
    assert path.read_bytes() == before and not (run / "losses.1.csv").exists()
    losses, _ = trained(1, run, *settings, "snapshot.nfs_every=500")
    assert (run / "losses.1.csv").read_bytes() == before
    assert losses[:13] == [row[2] for row in read_losses(run / "losses.1.csv")]


def test_steps_whose_snapshots_are_lost_are_not_begun_again(run_dir, tmp_path):
    """As after a restart of the machine: an error, nothing changed; resume=never begins again and keeps the old losses."""
    from gemini_gnn.recovery import home

    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", "training.epochs=1000", "logger=quiet"]
    settings.append("snapshot.persist_every=never")
    slots = start_slots(run_dir, *settings)
    wait_for(lambda: True if steps_done(run_dir) > 5 else None, "first steps")
    for slot in slots:
        slot.send_signal(signal.SIGINT)
    assert [slot.wait(60) for slot in slots] == [130, 130]
    before, stopped = (run_dir / "losses.csv").read_bytes(), steps_done(run_dir)
    home.remove_snapshots(home.arena_of(run_dir))
    again = start_slots(run_dir, *settings)
    assert [slot.wait(60) for slot in again] == [2, 2]
    said = "".join((run_dir / "logs" / f"rank-{rank}.log").read_text() for rank in range(2))  # whole in one of them
    assert f"{stopped} steps were done, but no snapshot in host memory can be restored: the memory of this job" in said
    assert (run_dir / "losses.csv").read_bytes() == before and not (run_dir / "losses.1.csv").exists()
    assert not home.arena_of(run_dir).exists(), "no room stays taken"
    fresh = start_slots(run_dir, *settings, "resume=never")
    wait_for(lambda: True if (run_dir / "losses.1.csv").exists() and steps_done(run_dir) > 0 else None, "new steps")
    assert (run_dir / "losses.1.csv").read_bytes() == before
    for slot in fresh:
        slot.send_signal(signal.SIGINT)
    assert [slot.wait(60) for slot in fresh] == [130, 130]


def test_an_orderly_stop_loses_no_step(run_dir, tmp_path):
    """Ctrl-C between two snapshots: the same command goes on after the very step it stopped at."""
    settings = [
        *TINY,
        f"dataset.cache={tmp_path / 'cache'}",
        "training.epochs=200",
        "snapshot.every=1000",
        "logger=quiet",
    ]
    job = start(run_dir, *settings)
    wait_for(lambda: True if steps_done(run_dir) > 10 else None, "first steps")
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) != 0
    stopped = steps_done(run_dir)
    with open(tmp_path / "refused", "w") as said:
        other = start_slots(run_dir, *settings, world=3, output=said)
        assert [slot.wait(60) for slot in other] == [2, 2, 2]
    assert "expected 2 ranks, as the run in it has, each for a part" in (tmp_path / "refused").read_text()
    again = start_slots(run_dir, *settings, "resume=must")
    wait_for(lambda: True if steps_done(run_dir) > stopped + 5 else None, "new steps")
    assert f"going on after step {stopped} of" in (run_dir / "logs" / "rank-0.log").read_text()
    for slot in again:
        slot.send_signal(signal.SIGINT)
    assert [slot.wait(60) for slot in again] == [130, 130]


@pytest.mark.parametrize("how", ["hang", "SIGSTOP"])
def test_a_rank_that_hangs_is_restarted_and_loses_nothing(run_dir, tmp_path, how):
    """Bit for bit, with the stacks of all trainers in their logs."""
    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", "training.epochs=8", "deepspeed=zero1"]
    trained(2, tmp_path / "undisturbed", *settings)
    quick = ["recovery.hang_factor=5", "recovery.hang_floor_s=1.5", "logger=quiet"]
    if how == "hang":
        quick += ["faults.allow=true", "faults.at=hang-collective 1 @ step 31 in sampling"]
    slots = start_slots(run_dir, *settings, *quick)
    if how == "SIGSTOP":
        wait_for(lambda: True if steps_done(run_dir) > 20 else None, "first steps")
        os.kill(trainers_of(run_dir)[1], signal.SIGSTOP)
    assert [slot.wait(120) for slot in slots] == [0, 0], (run_dir / "logs" / "rank-0.log").read_text()[-4000:]
    same_run(run_dir, tmp_path / "undisturbed")
    events = next((run_dir / "events").glob("agent-*.jsonl")).read_text()
    hangs = [json.loads(line) for line in events.splitlines() if '"hang"' in line]
    assert len(hangs) == 1 and 1 in hangs[0]["ranks"], hangs
    if how == "hang":
        assert "rank 1 hangs in sampling of step 31 for" in hangs[0]["text"]
    else:  # maybe where both were in one collective
        assert hangs[0]["text"].endswith("; stopped by a signal or a debugger: rank 1")
    for rank in range(2):
        log = (run_dir / "logs" / f"rank-{rank}.log").read_text()
        assert " in train\n" in log and "most recent call first" in log
    assert " in commit\n" in (run_dir / "logs" / "rank-1.log").read_text() or how == "SIGSTOP"


def trainers_of(run_dir: Path) -> dict[int, int]:
    """Pid by rank, from what their agent has noted."""
    text = next((run_dir / "events").glob("agent-*.jsonl")).read_text()
    forked = [json.loads(line) for line in text.splitlines() if '"trainer_forked"' in line]
    return {one["rank"]: one["pid"] for one in forked}


@pytest.mark.parametrize(
    "faults",
    [
        ["kill-rank 1 @ step 0 in start-up", "kill-rank 0 @ step 9 in exchange", "kill-rank 1 @ step 9 in evaluation"],
        ["kill-rank 0 @ step 7 in backward", "kill-rank 1 @ step 6 in start-up", "kill-rank 0 @ step 20 in capture"],
        ["kill-rank 1 @ step 8 in agreement", "kill-rank 0 @ step 15 in step", "kill-rank 1 @ step 20 in writing"],
        ["kill-rank 0 @ step 11 in reduction"],
    ],
    ids=["start-up exchange evaluation", "backward recovery capture", "agreement step writing", "reduction"],
)
def test_kills_in_every_phase_cost_no_bit_and_strike_once(run_dir, tmp_path, faults):
    """The second of the middle ones strikes while the job recovers from the first."""
    settings = [*TINY, f"dataset.cache={tmp_path / 'cache'}", "training.epochs=4", "deepspeed=zero1"]
    trained(2, tmp_path / "undisturbed", *settings)
    slots = start_slots(run_dir, *settings, "logger=quiet", f"faults.at=[{', '.join(faults)}]")
    assert [slot.wait(120) for slot in slots] == [0, 0], (run_dir / "logs" / "rank-0.log").read_text()[-4000:]
    same_run(run_dir, tmp_path / "undisturbed")
    names = {f"{fault.replace(' @ ', '-').replace(' ', '-')}.1" for fault in faults}
    assert names | {"begun"} == {path.name for path in (run_dir / "faults").iterdir()}
    said = "".join(path.read_text() for path in (run_dir / "logs").glob("rank-*.log"))
    assert [said.count(f"injected fault: {fault}, in") for fault in faults] == [1] * len(faults)
