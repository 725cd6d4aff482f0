"""Train the default data set on two local ranks with the real launcher; quickstart.sh runs this after the set-up.

Half-way it kills every trainer with SIGKILL. The job resumes from its snapshots in host memory, and the loss curve shows no
seam.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.compose import command, compose, take
from gemini_gnn.graph.datasets import fingerprint
from gemini_gnn.graph.datasets.files import cache_folder
from gemini_gnn.observe import curve
from gemini_gnn.observe.run_directory import read_losses
from gemini_gnn.observe.status import read_status

ROOT = Path(__file__).resolve().parent.parent
PURPOSE = """Train the default data set on one rank per GPU, or on two ranks without a GPU, and compare with baselines.
Half-way every trainer is killed with SIGKILL, and the job resumes (snapshot=memory only).
It takes any setting of launch/train.py."""


def main(arguments: list[str]) -> int:
    started = time.time()
    others, taken = take(arguments, "run_dir")
    named = taken.get("run_dir") or f"runs/quickstart-{time.strftime('%Y%m%d-%H%M%S')}"
    overrides = [f"run_dir={named}", *others]
    run_dir = (ROOT / named).absolute()
    ranks = gpus() or 2
    line = ["--quiet", "--num_accelerators", str(ranks), "launch/train.py", *overrides]
    # The script `deepspeed` begins with the path of its Python, which a shell cuts off at the first blank.
    deepspeed = "deepspeed" if " " not in sys.executable else "python -m deepspeed.launcher.runner"
    print(
        f"$ {deepspeed} {shlex.join(line)}\n(about ten seconds until training begins: the launcher loads PyTorch too)",
        flush=True,
    )
    environment = os.environ if gpus() else {**os.environ, "DS_ACCELERATOR": "cpu"}
    training = subprocess.Popen([*DEEPSPEED, *line], cwd=ROOT, env=environment)
    baselines: subprocess.Popen[bytes] | None = None
    try:
        config = compose(overrides)
        kept = cache_folder(config.dataset) / "baselines" / f"{fingerprint(config.dataset)}.json"
        if not kept.exists():  # a child of its own: it computes while the launcher imports
            command_line = [sys.executable, str(Path(__file__).with_name("baselines.py")), *overrides]
            baselines = subprocess.Popen(command_line, stdout=subprocess.DEVNULL)
        import matplotlib.figure  # noqa: F401  # while the launcher imports its own; later it would slow the recovery

        killed = kill_half_way(training, run_dir) if config.snapshot.mode == "memory" else None
        code = training.wait()
        if baselines is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                baselines.wait(timeout=300)
    finally:
        if baselines is not None:
            baselines.kill()
        if training.poll() is None:
            training.send_signal(signal.SIGINT)
            training.wait()
    if code != 0:
        print(f"error: training ended with exit code {code}; see {run_dir}/logs and {run_dir}/errors", file=sys.stderr)
        return code
    result = json.loads((run_dir / "result.json").read_text())
    print(f"\n{config.dataset.name}: test accuracy")
    print(f"  {config.model.name} on {ranks} ranks      {result['test_accuracy']:.4f}")
    for name, value in json.loads(kept.read_text() if kept.exists() else "{}").items():
        print(f"  {name:<19} {value:.4f}")
    losses = read_losses(run_dir / "losses.csv")
    print(f"\nloss {losses[0][2]:.3f} {curve.spark([row[2] for row in losses])} {losses[-1][2]:.3f}")
    if [row[0] for row in losses] != list(range(1, result["steps"] + 1)):
        print("error: losses.csv does not hold every step once", file=sys.stderr)
        return 1
    if killed is None:
        curve.draw_losses(losses, run_dir / "losses.png")
    else:
        before, when = killed
        done = [(e["t"] - when, e["step"]) for e in events_of(run_dir, 0) if e["kind"] == "step"]
        curve.draw_losses(losses, run_dir / "losses.png", done)
        said, same = proof(before, losses, done)
        print("\n".join(said))
        if not same:
            return 1
        whole = f"{named}-not-killed"
        again = [each for each in others if not each.startswith("snapshot=")] + ["snapshot=none", f"run_dir={whole}"]
        print("  the same without a kill, compared bit for bit:")
        print(
            f"  bash launch/quickstart.sh {shlex.join(again)} && cmp {named}/losses.csv {whole}/losses.csv && echo identical"
        )
    print(f"\nresults in {run_dir}: result.json losses.csv losses.png metrics.jsonl model.safetensors")
    print(f"finished in {time.time() - started:.1f} s; next:")
    if Path(sys.prefix) == ROOT / ".venv":
        print("  source .venv/bin/activate")
    print(f"  python launch/evaluate.py run_dir={config.run_dir}")
    print(f"  tensorboard --logdir {config.run_dir}/tensorboard")
    print("  own data (edges as `source,target`, labels as `id,label`, one node or edge per line):")
    print(
        f"  {deepspeed} --num_accelerators {ranks} launch/train.py dataset=edge_list dataset.path=edges.csv "
        "dataset.labels=labels.csv run_dir=runs/mine"
    )
    return 0


Row = tuple[int, int, float]  # step, epoch, loss


def kill_half_way(training: subprocess.Popen[bytes], run_dir: Path) -> tuple[list[Row], float] | None:
    """SIGKILL to every trainer when half of the steps are done. Returns (losses until then, time); None if it ended before."""
    while training.poll() is None:
        time.sleep(0.03)
        try:
            status = read_status(run_dir)
            losses = read_losses(run_dir / "losses.csv")
        except (OSError, ValueError):
            continue
        total = status.get("total_steps")
        if status.get("state") != "running" or total is None or len(losses) < total / 2:
            continue
        pids = [trainer_of(run_dir, rank) for rank in range(status["world_size"])]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # the agent was faster: it ends the others when one is gone
                continue
        when = time.time()
        losses = read_losses(run_dir / "losses.csv")  # nobody writes there before the next trainers have restored
        print(f"\n>>> kill -9 {' '.join(map(str, pids))}   (every trainer, after step {losses[-1][0]})\n", flush=True)
        return losses, when
    return None


def proof(before: list[Row], after: list[Row], done: list[tuple[float, int]]) -> tuple[list[str], bool]:
    """The proof in words that the run resumed where it was killed, and whether it holds. Pure.

    Args:
        before: ``losses.csv`` at the kill; after: at the end of the run.
        done: (seconds after the kill, negative before it; step) for every step that any trainer of rank 0 has done.
    """
    last = before[-1][0]
    new = [t for t, step in done if t > 0 and step > last]
    said = [
        f"every trainer was killed with SIGKILL after step {last}; "
        + (f"the first new step was done {min(new):.2f} s later" if new else "no step was left to do"),
        f"  each of the {len(after)} steps is in losses.csv once",
    ]
    loss_then, loss_now = ({step: loss for step, _, loss in rows} for rows in (before, after))
    wrong = [step for step in loss_then if loss_now.get(step) != loss_then[step]]
    if wrong:
        return [
            *said,
            f"error: step {wrong[0]}: loss {loss_then[wrong[0]]!r} before the kill, {loss_now.get(wrong[0])!r} now",
        ], False
    for step in sorted({step for t, step in done if t > 0} & loss_then.keys()):
        said.append(f"  step {step} was done twice, before the kill and after it: loss {loss_now[step]!r} both times")
    return said, True


def events_of(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    text = (run_dir / "events" / f"rank-{rank}.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def trainer_of(run_dir: Path, rank: int) -> int:
    return [event["pid"] for event in events_of(run_dir, rank) if event["kind"] == "start"][-1]


def gpus() -> int:
    """GPUs of this machine, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


if __name__ == "__main__":
    command(main, PURPOSE)
