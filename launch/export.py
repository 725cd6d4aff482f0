"""Write a checkpoint of a job as one plain state dict: ``python launch/export.py run_dir=runs/my_run [step=N] [out=FILE]``.

The file is in safetensors: every parameter whole, in fp32 where the optimizer keeps it so, and every buffer, by the names of
``model.state_dict()``. It makes no difference which ZeRO stage wrote the checkpoint. Neither DeepSpeed nor torch is needed.
Load it with ``model.load_state_dict(safetensors.torch.load_file(FILE))``.

step=             of the checkpoint; default: the newest complete one
out=              file to write; default RUN_DIR/export-<step>.safetensors; force=true replaces it
snapshot.folder=  of the checkpoints; default: as the job's config.yaml says, else RUN_DIR/checkpoints
--list            show the checkpoints that there are: step, time, size, whether complete
--check           compare every byte with the checksums of capture; exit code 1, and the file's name, on damage
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gemini_gnn.compose import exit_with
from gemini_gnn.errors import ConfigError, RunDirError
from gemini_gnn.snapshot import export as exports
from gemini_gnn.snapshot import persist

USAGE = """usage: python launch/export.py run_dir=RUN_DIR [step=N] [out=FILE] [force=true] [snapshot.folder=FOLDER]
       python launch/export.py [--list | --check] run_dir=RUN_DIR [step=N] [snapshot.folder=FOLDER]"""
QUIET_S = 2.0


def main(arguments: list[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, USAGE, sep="\n")
        return 0
    flags = [a for a in arguments if a in ("--list", "--check")]
    settings = {name: value for name, _, value in (a.partition("=") for a in arguments if a not in flags)}
    known = {"run_dir", "step", "out", "force", "snapshot.folder"} - ({"out", "force"} if flags else set())
    if "run_dir" not in settings or not settings.keys() <= known or not all(settings.values()) or len(flags) > 1:
        print(USAGE, file=sys.stderr)
        return 2
    if settings.get("force", "false") not in ("true", "false"):
        raise ConfigError(f"force: expected true or false; got {settings['force']!r}")
    step = settings.get("step")
    if step is not None and not step.isdecimal():
        raise ConfigError(f"step: expected the number of a step; got {step!r}; --list shows those there are")
    run_dir = Path(settings["run_dir"])
    folder = folder_of(run_dir, settings.get("snapshot.folder"))
    if flags == ["--list"]:
        found = [c for c in persist.survey(folder) if step is None or c.step == int(step)]
        print(exports.table(found) if found else f"no checkpoints in {folder}")
        return 0
    mark, path = exports.choose(folder, None if step is None else int(step))
    progress = Progress(sum(mark.shards.values()))
    if flags == ["--check"]:
        problems = exports.check(mark, path, progress)
        for problem in problems:
            print(f"damaged: {problem}", file=sys.stderr)
        print(f"{path}: {len(problems)} of {len(mark.shards)} shards are damaged" if problems else f"{path}: good")
        return 1 if problems else 0
    out = Path(settings.get("out", run_dir / f"export-{mark.identity.step}.safetensors"))
    if out.exists() and settings.get("force") != "true":
        raise ConfigError(f"{out} exists; give another out=FILE, or force=true to replace it")
    count = exports.export(mark, path, out, progress)
    print(f"{out}: {count} tensors of step {mark.identity.step}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def folder_of(run_dir: Path, said: str | None) -> Path:
    """The folder of the checkpoints."""
    if said is None and (run_dir / "config.yaml").is_file():
        from gemini_gnn.observe.run_directory import read_config

        said = read_config(run_dir).snapshot.folder
    folder = Path(said) if said is not None else run_dir / "checkpoints"
    if not folder.is_dir():
        raise RunDirError(
            f"expected the folder of a job's checkpoints at {folder}; there is none. Give the run_dir of a training that "
            "has written a checkpoint, or snapshot.folder=FOLDER"
        )
    return folder


class Progress:
    """How far it is, every two seconds; nothing about what takes less."""

    def __init__(self, total: int):
        self.total, self.done, self.said_s = total, 0, time.monotonic()

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        if time.monotonic() - self.said_s > QUIET_S:
            self.said_s = time.monotonic()
            print(f"{self.done / 1e9:.1f} GB read; the checkpoint has {self.total / 1e9:.1f} GB", file=sys.stderr)


if __name__ == "__main__":
    exit_with(main)
