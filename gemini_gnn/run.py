"""Run any training script under a worker agent: ``python -m gemini_gnn.run [options] script.py arguments...``.

This process is only the shim. The agent forks a trainer, and the script runs in it: so ``gemini_gnn.snapshot.attach`` can
keep snapshots that outlive the script. Any launcher will do:

    python -m gemini_gnn.run train.py --lr 0.1
    deepspeed --module gemini_gnn.run train.py --lr 0.1
    srun python -m gemini_gnn.run train.py --lr 0.1

In the script, ``torch.distributed.init_process_group()`` and ``deepspeed.init_distributed()`` need no address: the store
listens already, on a port of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from gemini_gnn.cluster import launcher
from gemini_gnn.cluster.place import Place, discover
from gemini_gnn.compose import compose, exit_with
from gemini_gnn.config import Config, replicas_of, seats_of
from gemini_gnn.errors import ConfigError

SETTINGS = ("recovery.", "snapshot.")  # of launch/train.py, which --set takes too
ALWAYS = ["torch", "torch.distributed"]  # the store needs them

_store: Any = None  # the process groups' store, served by rank 0 for as long as it lives


def run_script(payload: dict[str, Any], place: Place, listen_fd: int | None) -> int:
    """The trainer's side: serve the store where the agent has bound one, then run the script as ``__main__``."""
    import runpy

    global _store
    if listen_fd is not None:
        import datetime

        import torch.distributed as dist

        _store = dist.TCPStore(
            place.master_addr,
            place.master_port,
            place.world_size,
            is_master=True,
            timeout=datetime.timedelta(minutes=10),
            wait_for_workers=False,
            master_listen_fd=listen_fd,
        )
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # env:// then connects on rank 0 too, and does not bind
    sys.argv[:] = [payload["script"], *payload["arguments"]]
    sys.path[:] = [os.path.dirname(os.path.abspath(payload["script"])), *sys.path]
    runpy.run_path(payload["script"], run_name="__main__")
    return 0


def preload_of(script: Path, asked: Sequence[str] = ()) -> list[str]:
    """The modules that the warm parent imports for a script: those that its text shows it needs, and those ``asked`` for.

    Only speed depends on it. DeepSpeed is imported as our engine does it: so nothing is compiled when process groups are made.
    """
    mentioned = "deepspeed" in script.read_text(errors="replace") or "deepspeed" in asked
    return [*ALWAYS, *(["gemini_gnn.training.engine"] if mentioned else []), *asked]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gemini_gnn.run",
        description="Run a training script under a worker agent, so that its snapshots in host memory outlive it.",
    )
    parser.add_argument("--run-dir", type=Path, help="identifies the job (default: runs/<script>)")
    parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto")
    parser.add_argument("--arena", default="/dev/shm", help="RAM file system for the snapshots")
    parser.add_argument("--preload", action="append", metavar="MODULE", help="imported before trainers are forked")
    parser.add_argument(
        "--same-step-failures",
        type=int,
        default=5,
        metavar="N",
        help="so many failures in a row without a new step end the job (default 5; 0: the first failure does)",
    )
    parser.add_argument(
        "--hang-factor",
        type=float,
        default=0.0,
        help="a trainer hangs when a step takes so many times as long as the longest lately, and longer than --hang-floor; "
        "default 0: never, as an evaluation between two steps may take any time",
    )
    parser.add_argument("--hang-floor", type=float, default=30.0, metavar="SECONDS", help="default 30")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="a setting of launch/train.py that begins with recovery. or snapshot., like snapshot.replicas=3",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it in front
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{parser.format_usage().rstrip()}")

    parser.error = refuse  # type: ignore[method-assign]  # it would say so in every slot
    place = discover(os.environ)
    with launcher.first_speaks(place):
        options = parser.parse_args(arguments)
        if not options.script.is_file():
            refuse(f"expected a Python script; {options.script} is no file")
        if not (options.hang_factor == 0 or options.hang_factor > 1) or not options.hang_floor > 0:
            refuse("expected --hang-factor above 1, or 0 (never), and --hang-floor above 0")
        if strange := [one for one in options.set if not one.startswith(SETTINGS)]:
            refuse(f"--set: expected a setting that begins with {' or '.join(SETTINGS)}; got {strange[0]!r}")
        config = compose(options.set) if options.set else Config()  # 4 s of Hydra: only where it is asked for
        replicas_of(config.snapshot, seats_of(config.recovery, place.machines))
    given: dict[str, Any] = {"same_step_failures": options.same_step_failures}
    given |= {"hang_factor": options.hang_factor, "hang_floor_s": options.hang_floor}
    given = {name: value for name, value in given.items() if not any(name in one for one in options.set)}
    from gemini_gnn.observe.progress import say
    from gemini_gnn.recovery import shim
    from gemini_gnn.recovery.outcome import STOPPED

    passed_on = [f"--local_rank={options.local_rank}"] if options.local_rank is not None else []
    payload = {
        "script": os.fspath(options.script.absolute()),
        "arguments": passed_on + options.arguments,
    }
    if place.rank == 0:
        say("loading PyTorch, a few seconds")
    code = shim.run(
        place,
        options.run_dir or Path("runs") / options.script.stem,
        "gemini_gnn.run:run_script",
        payload,
        preload=preload_of(options.script, options.preload or []),
        resume=options.resume,
        terminal=True,
        arena_root=options.arena,
        recovery=replace(config.recovery, **given),
        snapshot=config.snapshot,
    )
    if code not in (0, STOPPED):
        launcher.free_launcher(place)
    return code


if __name__ == "__main__":
    exit_with(main)
