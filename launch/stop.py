"""End a job in order: ``python launch/stop.py run_dir=runs/my_run [keep=false]``.

The trainers finish their step, then every process of the job exits, on all its machines. Any machine that sees the run
directory will do; a job on one machine is stopped there. The snapshots in host memory stay: the command that started the
job resumes from them. ``keep=false`` removes them on all machines. If the job no longer runs, it removes those of this one.
"""

import sys
from pathlib import Path

from gemini_gnn.compose import exit_with
from gemini_gnn.recovery.stop import stop

USAGE = "usage: python launch/stop.py run_dir=RUN_DIR [keep=false] [snapshot.arena=/dev/shm]"


def main(arguments: list[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, USAGE, sep="\n")
        return 0
    pairs = [a.partition("=") for a in arguments]
    settings = {name: value for name, _, value in pairs}
    if "run_dir" not in settings or not settings.keys() <= {"run_dir", "keep", "snapshot.arena"}:
        print(USAGE, file=sys.stderr)
        return 2
    if settings.get("keep", "true") not in ("true", "false"):
        print(f"keep: expected true or false; got {settings['keep']!r}\n{USAGE}", file=sys.stderr)
        return 2
    keep, arena_root = settings.get("keep") != "false", settings.get("snapshot.arena")
    print(stop(Path(settings["run_dir"]), keep=keep, arena_root=arena_root))
    return 0


if __name__ == "__main__":
    exit_with(main)
