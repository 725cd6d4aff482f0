"""End a job in order: ``python launch/stop.py run_dir=runs/my_run [keep=true]``.

The trainers finish their step, every process of the job on this machine ends, and its snapshots in host memory are
removed; with ``keep=true`` they stay, and the command that started the job goes on from them.
"""

import sys
from pathlib import Path

from gemini_gnn.errors import GeminiError
from gemini_gnn.recovery.stop import stop

USAGE = "usage: python launch/stop.py run_dir=RUN_DIR [keep=true] [snapshot.arena=/dev/shm]"


def main(arguments: list[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, USAGE, sep="\n")
        return 0
    pairs = [("keep=true" if a == "--keep" else a).partition("=") for a in arguments]
    settings = {name: value for name, _, value in pairs}
    if "run_dir" not in settings or not settings.keys() <= {"run_dir", "keep", "snapshot.arena"}:
        print(USAGE, file=sys.stderr)
        return 2
    if settings.get("keep", "false") not in ("true", "false"):
        print(f"keep: expected true or false; got {settings['keep']!r}\n{USAGE}", file=sys.stderr)
        return 2
    try:
        print(
            stop(
                Path(settings["run_dir"]),
                keep=settings.get("keep") == "true",
                arena_root=settings.get("snapshot.arena"),
            )
        )
    except GeminiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
