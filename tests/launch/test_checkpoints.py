"""Snapshots on storage, as a user sees them: what they survive, what an orderly stop leaves, and a disk that is full."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.observe.status import read_status
from gemini_gnn.recovery import home
from gemini_gnn.snapshot import persist
from gemini_gnn.snapshot.store import arena
from tests.launch.test_resume import ROOT, TINY, processes_of, run_dir, same_run, start_slots, steps_done, wait_for
from tests.trainers import trained

__all__ = ["run_dir"]  # the fixture


def stored(folder):
    return [mark.identity for mark, _ in persist.complete_checkpoints(folder)]


def settings_of(tmp_path, epochs):
    return [
        *TINY,
        f"dataset.cache={tmp_path / 'cache'}",
        f"training.epochs={epochs}",
        "deepspeed=zero1",
        "logger=quiet",
    ]


def said(run_dir):
    lines = next((run_dir / "events").glob("agent-*.jsonl")).read_text().splitlines()
    return [record["text"] for record in map(json.loads, lines) if record["kind"] == "say"]


def kill_all(run_dir):
    while pids := processes_of(run_dir):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.long
def test_the_memory_is_lost_and_the_newest_checkpoint_goes_on_bit_identical(run_dir, tmp_path):
    settings = settings_of(tmp_path, 120)  # a step is named a second ahead, and the persister has to start
    trained(2, tmp_path / "undisturbed", *settings)
    slots = start_slots(run_dir, *settings, "snapshot.persist_every=20 steps")
    wait_for(lambda: read_status(run_dir).get("checkpoint"), "checkpoint")
    kill_all(run_dir)
    assert [slot.wait(30) for slot in slots] == [-signal.SIGKILL] * 2
    newest = stored(run_dir / "checkpoints")[-1]
    total = len(read_losses(tmp_path / "undisturbed" / "losses.csv"))
    assert 20 <= newest.step <= steps_done(run_dir) < total, "the kill came too late to test anything"
    arena.remove(home.arena_of(run_dir))
    again = start_slots(run_dir, *settings, "snapshot.persist_every=never", "resume=must")
    assert [slot.wait(120) for slot in again] == [0, 0], (run_dir / "logs" / "rank-0.log").read_text()[-4000:]
    assert f"going on after step {newest.step} of" in (run_dir / "logs" / "rank-0.log").read_text()
    same_run(run_dir, tmp_path / "undisturbed")
    assert stored(run_dir / "checkpoints")[-1] == newest and not home.arena_of(run_dir).exists()


@pytest.mark.parametrize("every", ["10min", "never"])
def test_an_orderly_stop_leaves_a_checkpoint_of_the_last_step(run_dir, tmp_path, every):
    slots = start_slots(run_dir, *settings_of(tmp_path, 1000), f"snapshot.persist_every={every}")
    wait_for(lambda: True if steps_done(run_dir) > 5 else None, "first steps")
    stop = [sys.executable, "launch/stop.py", f"run_dir={run_dir}"]
    subprocess.run(stop, cwd=ROOT, timeout=60, check=True, stdout=subprocess.DEVNULL)
    assert [slot.wait(60) for slot in slots] == [143, 143]
    steps = [identity.step for identity in stored(run_dir / "checkpoints")]
    assert steps == ([] if every == "never" else [steps_done(run_dir)])
    assert os.listdir(run_dir / "checkpoints") == [persist.tag_of(step) for step in steps]


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB, and the call that fills it."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs root, for a small file system: {mounted.stderr.strip()}")

    def fill():
        with open(path / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    yield path, fill
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_said_once_and_training_goes_on(run_dir, tmp_path, disk):
    folder, fill = disk
    settings = settings_of(tmp_path, 1000)
    slots = start_slots(run_dir, *settings, "snapshot.persist_every=20 steps", f"snapshot.folder={folder}")
    wait_for(lambda: read_status(run_dir).get("checkpoint"), "checkpoint")
    fill()
    wait_for(lambda: next((text for text in said(run_dir) if "No space left" in text), None), "word of the full disk")
    old, then = stored(folder), steps_done(run_dir)
    assert old and "Older checkpoints stay" in said(run_dir)[-1]
    wait_for(lambda: True if steps_done(run_dir) > then + 600 else None, "steps after it")
    assert sum("No space left" in text for text in said(run_dir)) == 1
    (folder / "filler").unlink()
    wait_for(lambda: True if stored(folder) != old else None, "a checkpoint when there is room again")
    for slot in slots:
        slot.send_signal(signal.SIGINT)
    assert [slot.wait(60) for slot in slots] == [130, 130]
    assert stored(folder)[-1].step == steps_done(run_dir) and len(stored(folder)) == 2
