"""From SIGKILL to the first new step, with snapshots in memory and with checkpoints in a folder.

    python benchmarks/recovery.py [--rounds 3]

trainers   snapshot=memory: every trainer killed; its worker agent forks new ones
retyped    snapshot=memory: everything killed (launcher, agent, trainers), and the command typed again at once
checkpoint plain_deepspeed.py: the same, from DeepSpeed's checkpoint every `--every` steps; the steps since then are done again

One real `deepspeed` job of two ranks each, in turns. Time runs from the kill to the end of the first step that had not been
done before the kill, by the clock of the events in the run directory. Losses of every disturbed run are compared with those
of an undisturbed one, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from common import machine, median, write

from gemini_gnn.cluster.hosts import random_port
from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.observe.run_directory import read_losses

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["training.epochs=40", "evaluation.every=10", "logger=quiet"]


def start(run_dir: Path, *settings: str, script: str = "launch/train.py") -> subprocess.Popen[bytes]:
    port = str(random_port())  # that of a job just killed may not be free again
    command = [*DEEPSPEED, "--num_accelerators", "2", "--master_port", port, script]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "BENCHMARK_JOB": str(run_dir)}
    with open(f"{run_dir}.log", "ab") as log:
        return subprocess.Popen(
            [*command, f"run_dir={run_dir}", *SETTINGS, *settings],
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def processes(run_dir: Path) -> list[int]:
    """Living processes that carry this job's mark in their environment; none of anybody else's."""
    mark, found = f"BENCHMARK_JOB={run_dir}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def events(run_dir: Path) -> list[dict]:
    path = run_dir / "events" / "rank-0.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def trainers(run_dir: Path) -> list[int]:
    found = []
    for path in (run_dir / "events").glob("rank-*.jsonl"):
        starts = [json.loads(line) for line in path.read_text().splitlines() if '"kind": "start"' in line]
        found.append(starts[-1]["pid"])
    return found


def steps(run_dir: Path) -> int:
    path = run_dir / "losses.csv"
    return len(read_losses(path)) if path.exists() else 0


def said(run_dir: Path) -> str:
    """The end of a job's output: its folder is removed with us."""
    return Path(f"{run_dir}.log").read_text()[-3000:]


def disturbed(run_dir: Path, how: str, at: int, every: int) -> tuple[float, int]:
    """(seconds from the kill to the first new step, steps done again)."""

    def begin() -> subprocess.Popen[bytes]:
        if how != "checkpoint":
            return start(run_dir)
        return start(run_dir, "snapshot=nfs", f"snapshot.nfs_every={every}", script="benchmarks/plain_deepspeed.py")

    job = begin()
    deadline = time.monotonic() + 300
    while steps(run_dir) < at:
        if time.monotonic() > deadline or job.poll() is not None:
            raise SystemExit(f"{how}: no step {at}\n{said(run_dir)}")
        time.sleep(0.005)
    when = time.time()
    kill(trainers(run_dir) if how == "trainers" else processes(run_dir))
    before = steps(run_dir)
    if how != "trainers":
        kill(processes(run_dir))
        job.wait(30)
        job = begin()
    if job.wait(300) != 0:
        raise SystemExit(f"{how}: the job failed after the kill\n{said(run_dir)}")
    after = [e for e in events(run_dir) if e["kind"] == "step" and e["t"] > when]
    first_new = min(e["t"] for e in after if e["step"] > before)
    return first_new - when, before - min(e["step"] for e in after) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--output", type=Path, default=Path("results/recovery.json"))
    options = parser.parse_args()
    print(machine())
    contenders = ("trainers", "retyped", "checkpoint")
    times: dict[str, list[float]] = {how: [] for how in contenders}
    again: dict[str, list[int]] = {how: [] for how in contenders}
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder) / "calm"
        if start(calm, "snapshot=none").wait(300) != 0:
            raise SystemExit(said(calm))
        expected = read_losses(calm / "losses.csv")
        for i in range(options.rounds):
            for how in contenders:
                run_dir = Path(folder) / f"{how}{i}"
                # In the middle between two checkpoints: what a kill costs on average.
                at = len(expected) // 2 // options.every * options.every + options.every // 2
                seconds, redone = disturbed(run_dir, how, at, options.every)
                if read_losses(run_dir / "losses.csv") != expected:
                    raise SystemExit(f"{how}: losses differ from those of the undisturbed run")
                times[how].append(seconds)
                again[how].append(redone)
                print(f"  {how:<10} {seconds:6.2f} s, {redone} steps done again, losses bit-identical", flush=True)
    medians = {how: median(values) for how, values in times.items()}
    for how in contenders:
        ratio = medians["checkpoint"] / medians[how]
        print(f"{how:<10} median {medians[how]:6.2f} s  ({ratio:.1f}x faster than checkpoint)")
    write(options.output, {"machine": machine(), "seconds": times, "steps_done_again": again, "medians": medians})


if __name__ == "__main__":
    main()
