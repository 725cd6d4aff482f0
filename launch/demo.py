"""Pull the plug of a machine in the middle of a training; demo.sh runs this after the set-up.

Four hosts train and a fifth stands by. All are hosts of the tests' lab (docs/lab.md): namespaces on this machine, which the
kernel removes when this process ends, however it ends. The same training then runs undisturbed, on one host.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quickstart import events_of

from gemini_gnn.cluster.hosts import random_port
from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.compose import command, take
from gemini_gnn.observe import curve, waterfall
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.observe.status import ENDED, read_status

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.lab.lab import Lab, kill_group, missing  # noqa: E402  # in the repository, not in the package

PURPOSE = """Build 4 hosts and a standby on this machine (needs root), train on them, and pull the plug of one.
The job goes on by itself. Then compare its losses with those of an undisturbed run, bit for bit.
usage: bash launch/demo.sh [root] [OVERRIDES]
root: pull the plug of h0, which has the root agent, rank 0 and the launcher. It takes any setting of launch/train.py."""
SETTINGS = ["training.epochs=60", "dataset.nodes=2000", "training.threads=1", "logger=quiet"]
WHEN = 15  # steps that are done when the plug is pulled
END_S = 120.0  # until anything that is waited for


def main(arguments: list[str]) -> int:
    if reason := missing():
        print(f"error: {reason}; without hosts type: bash launch/quickstart.sh", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the lab and its folder go
    root = arguments[:1] == ["root"]
    others, taken = take(arguments[root:], "run_dir")
    overrides = [*SETTINGS, *others]
    victim, viewer = ("h0", "h1") if root else ("h2", "h0")
    began = time.time()
    run_dir = (ROOT / (taken.get("run_dir") or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
    whole = run_dir.with_name(f"{run_dir.name}-undisturbed")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, Lab.up(Path(folder) / "lab", owned=True) as lab:
        hosts = lab.hostfile(list(lab.hosts))
        print(f"{len(lab.hosts)} hosts on this machine: {' '.join(lab.hosts)}", flush=True)
        settings = ["recovery.standby_machines=1", "snapshot.replicas=2", *overrides]
        with started(lab, "h0", run_dir, ["--hostfile", str(hosts)], settings) as job:
            until(lambda: steps(run_dir) >= WHEN, run_dir, job)
            status = [sys.executable, "launch/status.py", f"run_dir={run_dir}"]
            with running(lab.popen(viewer, status, cwd=ROOT)) as viewed:
                viewed.wait(20)
            failed_s = time.time()
            lab.power_off(victim)
            print(f"\n>>> power off {victim}   (after step {steps(run_dir)})\n", flush=True)
            with running(lab.popen(viewer, [*status, "--watch"], cwd=ROOT)) as viewed:
                until(lambda: read_status(run_dir).get("state") in ENDED, run_dir)
                viewed.wait(20)
        print("\nthe same training on one host, undisturbed:", flush=True)
        alone = ["--num_accelerators", "4", "--master_port", str(random_port())]
        with started(lab, viewer, whole, alone, ["snapshot=none", *overrides]) as job:
            code = job.wait(END_S)
        if code:
            raise SystemExit(f"error: it ended with exit code {code}; see {whole}/logs")
    last_s, new_s, done = resumed(events_of(run_dir, 0))
    failed_s = max(failed_s, last_s)  # a step that was on its way still ended
    print(f"the first new step was done {new_s - failed_s:.2f} s after the loss of power")
    alike = {
        f"the losses of all {steps(whole)} steps": same("losses.csv", run_dir, whole),
        "the parameters": same("model.safetensors", run_dir, whole),
    }
    for what, is_same in alike.items():
        print(f"  {what} are {'bit-identical to' if is_same else 'DIFFERENT from'} those of the undisturbed run")
    losses = read_losses(run_dir / "losses.csv")
    print(f"\nloss {losses[0][2]:.3f} {curve.spark([row[2] for row in losses])} {losses[-1][2]:.3f}")
    by_clock = [(t - failed_s, step) for t, step in done]
    curve.draw_losses(losses, run_dir / "losses.png", by_clock, f"{victim} without power")
    pictures = [run_dir / "losses.png", waterfall.draw(run_dir, run_dir / "failures.png")]
    print(f"pictures: {' '.join(map(str, pictures))}")
    show(pictures)
    print(f"finished in {time.time() - began:.0f} s")
    return 0 if all(alike.values()) else 1


def resumed(events: Sequence[Mapping[str, Any]]) -> tuple[float, float, list[tuple[float, int]]]:
    """When the first trainer of rank 0 did its last step, and the last trainer its first new one; (time, step) of all."""
    begun = max(i for i, event in enumerate(events) if event["kind"] == "start")
    done = [(event["t"], event["step"], i > begun) for i, event in enumerate(events) if event["kind"] == "step"]
    last_s, last = max(((t, step) for t, step, again in done if not again), default=(0.0, 0))
    new_s = min((t for t, step, again in done if again and step > last), default=None)
    if not last or new_s is None:
        raise SystemExit("error: the machine was lost when no step was left to do; give it more: training.epochs=200")
    return last_s, new_s, [(t, step) for t, step, _ in done]


def same(name: str, one: Path, other: Path) -> bool:
    return (one / name).read_bytes() == (other / name).read_bytes()


@contextmanager
def started(lab: Lab, host: str, run_dir: Path, where: list[str], settings: list[str]) -> Iterator[Any]:
    """The real launcher on ``host``; its output goes into a file beside ``run_dir``."""
    line = [*where, "launch/train.py", f"run_dir={run_dir}", *settings]
    print(f"{host}$ deepspeed {' '.join(line)}\n(about 20 s until training begins)", flush=True)
    with open(f"{run_dir}.log", "wb") as log:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        process = lab.popen(host, [*DEEPSPEED, *line], stdout=log, stderr=log, cwd=ROOT, env=environment)
    with running(process):
        yield process


@contextmanager
def running(process: Any) -> Iterator[Any]:
    try:
        yield process
    finally:
        kill_group(process)  # of a host that lost its power too; the launcher waits for a lost host for a long time
        process.wait(20)


def steps(run_dir: Path) -> int:
    path = run_dir / "losses.csv"
    return len(read_losses(path)) if path.exists() else 0


def until(ready: Callable[[], bool], run_dir: Path, job: Any = None) -> None:
    deadline = time.monotonic() + END_S
    while not ready():
        if time.monotonic() > deadline or (job is not None and job.poll() is not None):
            raise SystemExit(f"error: the job did not go on; see {run_dir}.log")
        time.sleep(0.02)


def show(pictures: list[Path]) -> None:
    """Where there is a display."""
    opener = shutil.which("xdg-open")
    if opener and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        for picture in pictures:
            subprocess.Popen([opener, str(picture)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    command(main, PURPOSE)
