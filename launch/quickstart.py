"""The default data set, trained on two local ranks by the real launcher; what quickstart.sh runs after the set-up."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gemini_gnn.compose import command, compose

ROOT = Path(__file__).resolve().parent.parent
PURPOSE = "Train the default data set on two local ranks and compare with baselines. Any setting of launch/train.py."


def main(arguments: list[str]) -> int:
    started = time.time()
    overrides = list(arguments)
    if not any(a.startswith("run_dir=") for a in overrides):
        overrides.insert(0, f"run_dir=runs/quickstart-{time.strftime('%Y%m%d-%H%M%S')}")
    config = compose(overrides)
    run_dir = Path(config.run_dir).absolute()
    ranks = gpus() or 2
    line = ["deepspeed", "--num_accelerators", str(ranks), "launch/train.py", *overrides]
    print(f"$ {shlex.join(line)}\n", flush=True)
    environment = os.environ if gpus() else {**os.environ, "DS_ACCELERATOR": "cpu"}
    # A child of its own for the baselines: they run while the launcher imports what it needs.
    baselines = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("baselines.py")), *overrides], stdout=subprocess.PIPE, text=True
    )
    try:
        code = subprocess.call(line, cwd=ROOT, env=environment)
        said, _ = baselines.communicate(timeout=300)
    finally:
        baselines.kill()
    if code != 0:
        print(f"error: training ended with exit code {code}; see {run_dir}/logs and {run_dir}/errors", file=sys.stderr)
        return code
    result = json.loads((run_dir / "result.json").read_text())
    print(f"\n{config.dataset.name}: test accuracy")
    print(f"  {config.model.name} on {ranks} ranks      {result['test_accuracy']:.4f}")
    for name, value in json.loads(said or "{}").items():
        print(f"  {name:<19} {value:.4f}")
    print(f"\nresults in {run_dir}: result.json losses.csv metrics.jsonl model.safetensors")
    print(f"finished in {time.time() - started:.1f} s; next:")
    print(f"  python launch/evaluate.py run_dir={config.run_dir}")
    print(f"  tensorboard --logdir {config.run_dir}/tensorboard")
    print("  own data (edges as `source,target`, labels as `id,label`, one node or edge per line):")
    print(
        f"  deepspeed --num_accelerators {ranks} launch/train.py dataset=edge_list dataset.path=edges.csv "
        "dataset.labels=labels.csv run_dir=runs/mine"
    )
    return 0


def gpus() -> int:
    """GPUs of this machine, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


if __name__ == "__main__":
    command(main, PURPOSE)
